"""DPG-Bench (Hu et al., 2024, with ELLA): 1065 dense prompts, yes/no questions on each of four pictures.

As published: a question counts 1 if the answer is yes and all its parents count 1; a picture's score is the mean
over its questions, the benchmark's the mean over prompts of the mean over pictures, times 100. Categories are
means over questions of the bare answers, without regard to parents.

Where we differ from dpg_bench/compute_dpg_bench.py: parents are followed through the graph (theirs looks at each
row once, in the order of the file, so a grandparent counts only if the rows happen to be sorted); categories
take in every picture (theirs the last one alone, ELLA issue 60); the first row of the file is read (theirs
skips it, and with it, as a rule, the whole first prompt: issue 61); rows of a prompt that are not neighbours
stay together; what is missing is counted (theirs drops a prompt that fails and reports the mean of the rest).
`compat` repeats all of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.prompts import Prompt
from rewards.benchmarks.dpg_questions import (
    GET_DATA,
    Question,
    QuestionSet,
    questions_json,
    questions_of,
    read_prompts,
    read_questions,
)
from rewards.benchmarks.figures import Contribution, Figure
from rewards.benchmarks.items import DataError, Item, ScoredItem

SCALE = 100.0


def read(path: Path, *, compat: bool = False, scored: bool = True) -> list[Item]:
    """The prompts of a question file; keys are its `item_id`. Without scoring, prompts alone will do.

    Raises DataError.
    """
    if path.is_dir() or path.suffix == ".json":
        prompts = read_prompts(path)
        if scored:
            raise DataError(
                [f"{path}: holds no questions, so --generate-only is all it is good for; {GET_DATA}"]
            )
        return [
            Item(key, "", Prompt(index, "t2i", text)) for index, (key, text) in enumerate(prompts.items())
        ]
    return [
        Item(
            item.item_id,
            "",
            Prompt(index, "t2i", item.text, metadata={"questions": questions_json(item.questions)}),
        )
        for index, item in enumerate(read_questions(path, compat=compat))
    ]


def answer_name(question: Question) -> str:
    """Name under which the answer to a question is kept: 1 for yes, 0 for no."""
    return f"q{question.id}"


def image_score(questions: Sequence[Question], answers: Mapping[int, float]) -> float | None:
    """Share of questions that count, in [0, 1]; None while an unanswered question leaves it open.

    answers: question id -> 1 or 0, without the questions that were not answered. A question under a no is 0
    whatever its own answer would have been. Raises graphlib.CycleError or KeyError for a broken graph.
    """
    counts: dict[int, float | None] = {}
    for question in QuestionSet("", "", tuple(questions)).parents_first():
        rests_on = [answers.get(question.id), *(counts[parent] for parent in question.parents)]
        counts[question.id] = 0.0 if 0.0 in rests_on else None if None in rests_on else 1.0
    found = [value for value in counts.values() if value is not None]
    return sum(found) / len(questions) if len(found) == len(questions) else None


def figures(scored: Sequence[ScoredItem], *, compat: bool = False) -> list[Figure]:
    """Overall, then broad and detailed categories, all times 100."""
    views = [(_compat_view if compat else _view)(item) for item in scored]
    if compat:
        views = [view for view in views if view.scores]
    rows = [_overall(views)]
    for name in (lambda question: question.broad, lambda question: question.category):
        categories = sorted({name(question) for view in views for question in view.questions})
        rows += [_category(category, views, name) for category in categories if category]
    return list({row.name: row for row in rows}.values())


@dataclass(frozen=True)
class _View:
    """What counts of a prompt: its questions, the scores of its scored pictures, and for categories the answers of
    every picture."""

    questions: tuple[Question, ...]
    pictures: int
    scores: tuple[float, ...]
    answers: tuple[Mapping[int, float], ...]


def _view(item: ScoredItem) -> _View:
    questions = questions_of(item.metadata)
    answers = tuple(_answers(questions, image or {}) for image in item.images)
    scores = [image_score(questions, found) for found in answers]
    return _View(questions, len(answers), tuple(score for score in scores if score is not None), answers)


def _compat_view(item: ScoredItem) -> _View:
    """The prompt as the public script sees it; without scores where that script fails and goes on.

    Whatever is not a yes is a no there, so an unanswered question is one too.
    """
    questions = _last_run([question for question in questions_of(item.metadata) if question.row != 0])
    if not questions or None in item.images:
        return _View(questions, len(item.images), (), ())
    yes = [
        {question.id: image.get(answer_name(question), 0.0) for question in questions}
        for image in item.images
        if image is not None
    ]
    scores = [_row_order_score(questions, answers) for answers in yes]
    if None in scores:
        return _View(questions, len(item.images), (), ())
    return _View(questions, len(yes), tuple(score for score in scores if score is not None), tuple(yes[-1:]))


def _last_run(questions: Sequence[Question]) -> tuple[Question, ...]:
    """The rows after the last gap between neighbours, later ones of an id in place of earlier ones."""
    run: dict[int, Question] = {}
    previous: int | None = None
    for question in questions:
        if previous is not None and question.row != previous + 1:
            run = {}
        run[question.id] = question
        previous = question.row
    return tuple(run.values())


def _row_order_score(questions: Sequence[Question], answers: Mapping[int, float]) -> float | None:
    """Each question looked at once, in the order of the file; None where a parent is not there."""
    counts = dict(answers)
    for question in questions:
        for parent in question.parents:
            if parent not in counts:
                return None
            if counts[parent] == 0.0:
                counts[question.id] = 0.0
                break
    return sum(counts.values()) / len(counts)


def _answers(questions: Sequence[Question], image: Mapping[str, float]) -> dict[int, float]:
    return {q.id: image[answer_name(q)] for q in questions if answer_name(q) in image}


def _overall(views: Sequence[_View]) -> Figure:
    """The mean over prompts of the mean over their scored pictures: every prompt weighs the same."""
    rows: list[Contribution] = [
        (SCALE * sum(view.scores) / len(view.scores), 1.0) if view.scores else (0.0, 0.0) for view in views
    ]
    expected = sum(view.pictures for view in views)
    return Figure("overall", {"": tuple(rows)}, expected, expected - sum(len(view.scores) for view in views))


def _category(category: str, views: Sequence[_View], name: Callable[[Question], str]) -> Figure:
    """The mean over all answers to the category's questions; `expected` and `missing` count answers."""
    rows: list[Contribution] = []
    expected = missing = 0
    for view in views:
        asked = [question.id for question in view.questions if name(question) == category]
        found = [answers[id] for answers in view.answers for id in asked if id in answers]
        rows.append((SCALE * sum(found), float(len(found))))
        expected += len(asked) * len(view.answers)
        missing += len(asked) * len(view.answers) - len(found)
    return Figure(category, {"": tuple(rows)}, expected, missing)
