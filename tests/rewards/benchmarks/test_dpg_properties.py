"""DPG's score of a picture against its definition, over random graphs of questions in random order of rows."""

import itertools
from collections.abc import Mapping, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.benchmarks.dpg import image_score
from rewards.benchmarks.dpg_questions import Question


@st.composite
def graphs(draw: st.DrawFn) -> list[Question]:
    """Up to seven questions without a circle; ids and rows say nothing of who rests on whom."""
    ids = draw(st.permutations(range(1, draw(st.integers(1, 7)) + 1)))
    parents = [draw(st.lists(st.sampled_from(ids[:place]), unique=True) if place else st.just([]))
               for place in range(len(ids))]  # fmt: skip
    questions = [
        Question(id, f"{id}?", tuple(mine), "entity - whole", row)
        for row, (id, mine) in enumerate(zip(ids, parents, strict=True))
    ]
    return draw(st.permutations(questions))


def counts(question: Question, questions: Sequence[Question], answers: Mapping[int, float]) -> bool:
    """As published: a yes whose parents all count."""
    found = {other.id: other for other in questions}
    return answers[question.id] == 1 and all(counts(found[id], questions, answers) for id in question.parents)


def share(questions: Sequence[Question], answers: Mapping[int, float]) -> float:
    return sum(counts(question, questions, answers) for question in questions) / len(questions)


@settings(max_examples=100, deadline=None)
@given(graphs(), st.data())
def test_a_picture_scores_what_every_way_to_answer_the_rest_comes_to(
    questions: list[Question], data: st.DataObject
) -> None:
    """With all answers that is the definition itself; a score that the missing answers could change is None."""
    given = {
        question.id: data.draw(st.sampled_from([0.0, 1.0, 1.0, 1.0, None]), f"answer {question.id}")
        for question in questions
    }
    known = {id: answer for id, answer in given.items() if answer is not None}
    missing = [id for id, answer in given.items() if answer is None]
    possible = {
        share(questions, known | dict(zip(missing, rest, strict=True)))
        for rest in itertools.product((0.0, 1.0), repeat=len(missing))
    }
    assert image_score(questions, known) == (possible.pop() if len(possible) == 1 else None)


@settings(max_examples=50, deadline=None)
@given(graphs(), st.data())
def test_the_order_of_rows_does_not_matter(questions: list[Question], data: st.DataObject) -> None:
    answers = {question.id: data.draw(st.sampled_from([0.0, 1.0, 1.0])) for question in questions}
    shuffled = data.draw(st.permutations(questions))
    assert image_score(shuffled, answers) == image_score(questions, answers)
