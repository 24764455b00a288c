"""DPG-Bench: reading questions, parents by graph and by row, categories, and what a public run would print."""

import csv
import itertools
import json
from pathlib import Path

import pytest

from rewards.benchmarks import dpg
from rewards.benchmarks.dpg_questions import Question, read_prompts, read_questions
from rewards.benchmarks.items import DataError, ScoredItem

DATA = Path(__file__).parents[2] / "data" / "dpg"
HEADER = (DATA / "questions.csv").read_text().splitlines()[0]


def chain(*parents_of):
    """Questions 1, 2 ... with these parents, in this order of rows."""
    return tuple(
        Question(id, f"q{id}?", parents, "entity - whole", row)
        for row, (id, parents) in enumerate(parents_of)
    )


def scored(item, *answers):
    """The item with one picture per dict of question id -> 1, 0; None for a picture that is absent."""
    images = []
    questions = dpg.questions_of(item.prompt.metadata)
    for found in answers:
        if found is None:
            images.append(None)
            continue
        values = {f"q{id}": float(value) for id, value in found.items()}
        try:
            score = dpg.image_score(questions, {id: float(value) for id, value in found.items()})
        except (KeyError, ValueError):
            score = None
        images.append(values if score is None else values | {"score": score})
    return ScoredItem(item, tuple(images))


def values(rows):
    return {row.name: row.value for row in rows}


@pytest.fixture(scope="module")
def items():
    return {item.key: item for item in dpg.read(DATA / "questions.csv")}


def test_the_official_prompts_are_read_as_one_file_and_as_a_folder(tmp_path):
    found = read_prompts(DATA / "prompts.json")
    assert len(found) == 1065
    assert found["226"].startswith("On a worn-out stretch of city pavement")
    for key in ("226", "partiprompts155"):
        (tmp_path / f"{key}.txt").write_text(found[key] + "\n")
    assert read_prompts(tmp_path) == {key: found[key] for key in ("226", "partiprompts155")}
    assert [item.key for item in dpg.read(DATA / "prompts.json", scored=False)][:2] == [
        "226",
        "partiprompts155",
    ]
    with pytest.raises(DataError, match="holds no questions, so --generate-only is all it is good for"):
        dpg.read(DATA / "prompts.json")


def test_questions_are_read_in_the_official_format(items):
    assert list(items) == ["first", "sorted", "unsorted", "apart", "whole"]
    questions = dpg.questions_of(items["first"].prompt.metadata)
    assert [q.id for q in questions] == [1, 2, 3, 4]
    assert questions[3].parents == (1, 3)
    assert (questions[1].category, questions[1].broad) == ("attribute - color", "attribute")
    assert [q.id for q in dpg.questions_of(items["apart"].prompt.metadata)] == [1, 2], (
        "rows need not be neighbours"
    )
    json.dumps([item.prompt.metadata for item in items.values()])


@pytest.mark.parametrize("order", list(itertools.permutations(((1, ()), (2, (1,)), (3, (2,))))))
def test_a_no_takes_all_that_rests_on_it_whatever_the_order_of_rows(order):
    questions = chain(*order)
    assert dpg.image_score(questions, {1: 0.0, 2: 1.0, 3: 1.0}) == 0.0
    assert dpg.image_score(questions, {1: 1.0, 2: 0.0, 3: 1.0}) == pytest.approx(1 / 3)
    assert dpg.image_score(questions, {1: 1.0, 2: 1.0, 3: 1.0}) == 1.0


def test_an_unanswered_question_leaves_a_picture_open_unless_a_no_settles_it():
    questions = chain((1, ()), (2, (1,)), (3, ()))
    assert dpg.image_score(questions, {1: 1.0, 3: 1.0}) is None
    assert dpg.image_score(questions, {1: 0.0, 3: 1.0}) == pytest.approx(1 / 3)
    assert dpg.image_score(questions, {2: 0.0, 3: 1.0}) is None, "question 1 may still count"
    assert dpg.image_score(questions, {}) is None


def test_hand_worked_figures(items):
    first = scored(items["first"], {1: 0, 2: 1, 3: 1, 4: 1}, {1: 1, 2: 1, 3: 1, 4: 1})  # 1/4 and 4/4
    unsorted = scored(items["unsorted"], {1: 0, 2: 1, 3: 1}, {1: 1, 2: 1, 3: 0})  # 0 and 2/3
    rows = dpg.figures([first, unsorted])
    found = values(rows)
    assert found["overall"] == pytest.approx(100 * ((1 / 4 + 1) / 2 + (0 + 2 / 3) / 2) / 2)
    # Bare answers of every picture: entity 0+1 of (1, 3), twice; boat and sail 0, 1 and 1, 1.
    assert found["entity"] == pytest.approx(100 * (1 + 2 + 1 + 2) / 8)
    assert found["entity - whole"] == pytest.approx(100 * (1 + 2 + 0 + 1) / 6)
    assert found["attribute - state"] == pytest.approx(100 * 1 / 2)
    assert (rows[0].expected, rows[0].missing) == (4, 0)


def test_missing_pictures_are_counted_and_the_others_make_the_mean(items):
    rows = dpg.figures([
        scored(items["sorted"], {1: 1, 2: 1, 3: 0}, None, None, None),
        scored(items["whole"], None, None, None, None),
    ])  # fmt: skip
    assert rows[0].value == pytest.approx(100 * 2 / 3)
    assert (rows[0].expected, rows[0].missing, rows[0].prompts) == (8, 7, 1)


def public_script(path, answers, pictures):
    """What compute_dpg_bench.py prints, from a reading of it: (overall, broad categories); answers[item][picture][qid].

    Its parse_csv skips row 0 and starts an item anew at every change of item_id; a prompt that raises is left out.
    """
    table, previous = {}, ""
    for number, row in enumerate(csv.DictReader(path.open(newline=""))):
        if number == 0:
            continue
        id = int(row["proposition_id"])
        if row["item_id"] != previous:
            table[row["item_id"]] = ({}, {})
        tuples, parents = table[row["item_id"]]
        tuples[id] = row["tuple"]
        parents[id] = [int(d) for d in row["dependency"].split(",")]
        previous = row["item_id"]
    totals, categories = [], {}
    for item in answers:
        try:
            tuples, parents = table[item]
            found, bare = [], {}
            for picture in range(pictures):
                counts = {id: float(answers[item][picture][id]) for id in tuples}
                bare = dict(counts)
                for id, mine in parents.items():
                    if any(parent and counts[parent] == 0 for parent in mine):
                        counts[id] = 0
                found.append(sum(counts.values()) / len(counts))
        except KeyError:
            continue
        totals.append(sum(found) / len(found))
        for id, text in tuples.items():
            categories.setdefault(text.split("(")[0].split("-")[0].strip(), []).append(bare[id])
    return 100 * sum(totals) / len(totals), {k: 100 * sum(v) / len(v) for k, v in categories.items()}


def test_compat_agrees_with_the_public_script_over_all_patterns_of_answers(items):
    """Every pattern for three questions of an unsorted prompt, beside fixed answers for the other prompts."""
    order = ["sorted", "unsorted", "apart", "whole"]
    for pattern in itertools.product((0, 1), repeat=6):
        answers = {
            "first": [dict.fromkeys((1, 2, 3, 4), 1)] * 2,
            "sorted": [{1: 1, 2: 0, 3: 1}, {1: 0, 2: 1, 3: 1}],
            "unsorted": [dict(zip((1, 2, 3), part, strict=True)) for part in (pattern[:3], pattern[3:])],
            "apart": [{1: 1, 2: 1}, {1: 1, 2: 0}],
            "whole": [{1: 0}, {1: 1}],
        }
        overall, broad = public_script(DATA / "questions.csv", answers, 2)
        rows = dpg.figures([scored(items[key], *answers[key]) for key in ["first", *order]], compat=True)
        found = values(rows)
        assert found["overall"] == pytest.approx(overall), pattern
        assert {name: found[name] for name in broad} == pytest.approx(broad), pattern


def test_what_compat_repeats(items):
    everything_right = {"first": {1: 1, 2: 1, 3: 1, 4: 1}, "whole": {1: 1}}
    first, whole = (scored(items[key], answers) for key, answers in everything_right.items())
    assert dpg.figures([first, whole])[0].prompts == 2
    # Row 0 is question 1 of the first prompt; question 2 then looks for a parent that is not there.
    assert dpg.figures([first, whole], compat=True)[0].prompts == 1
    # Row 3 comes before row 2 and row 2 before row 1: the public script sees the no of 1 too late for 3.
    unsorted = scored(items["unsorted"], {1: 0, 2: 1, 3: 1})
    assert values(dpg.figures([unsorted]))["overall"] == 0.0
    assert values(dpg.figures([unsorted], compat=True))["overall"] == pytest.approx(100 / 3)
    # Categories: the last picture alone.
    two = scored(items["whole"], {1: 0}, {1: 1})
    assert values(dpg.figures([two]))["global"] == 50.0
    assert values(dpg.figures([two], compat=True))["global"] == 100.0
    # The rows of `apart` are not neighbours: the first of them is lost, and the other one's parent with it.
    apart = scored(items["apart"], {1: 1, 2: 1})
    assert values(dpg.figures([apart]))["overall"] == 100.0
    assert dpg.figures([apart, whole], compat=True)[0].prompts == 1
    # A prompt with a missing picture is gone without trace.
    assert dpg.figures([scored(items["sorted"], {1: 1, 2: 1, 3: 1}, None), two], compat=True)[0].expected == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a,x,,1,2,,,t,q?", "a,x,,2,1,,,t,q?"], "depend on each other in a circle"),
        (["a,x,,1,1,,,t,q?"], "depend on each other in a circle"),
        (["a,x,,1,0,,,t,q?", "a,x,,2,7,,,t,q?"], "question 2 depends on 7, which is not there"),
        (["a,x,,1,0,,,t,q?", "a,x,,1,0,,,t,r?"], "proposition_id 1 is used more than once"),
        (["a,x,,1,0,,,t,q?", "a,y,,2,0,,,t,r?"], "another text here than before"),
        (["a,x,,one,0,,,t,q?"], "proposition_id 'one' and dependency '0' must be whole numbers"),
        (["a,x,,1,,,,t,q?"], "dependency '' must be whole numbers"),
        (["a,x,,1,0,,,t,"], "question_natural_language is empty"),
        ([",x,,1,0,,,t,q?"], "item_id and text must not be empty"),
        ([], "holds no questions"),
    ],
)
def test_files_that_cannot_be_scored_are_refused(tmp_path, rows, message):
    path = tmp_path / "questions.csv"
    path.write_text("\n".join([HEADER, *rows]) + "\n")
    with pytest.raises(DataError) as caught:
        read_questions(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_compat_reads_what_the_public_script_reads(tmp_path, items):
    path = tmp_path / "questions.csv"
    path.write_text(f"{HEADER}\nz,skipped,,1,0,,,t,q?\na,x,,1,2,,,t,q?\na,x,,2,1,,,t,r?\nb,y,,1,9,,,t,s?\n")
    found = dpg.read(path, compat=True)
    rows = dpg.figures(
        [scored(item, {1: 1, 2: 0} if item.key == "a" else {1: 1}) for item in found], compat=True
    )
    assert (rows[0].value, rows[0].prompts) == (0.0, 1), "z is skipped, b has no such parent"


def test_another_file_is_told_from_the_question_file(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(
        DataError, match="has no column item_id, text, .*dpg_bench.csv of github.com/TencentQQGYLab"
    ):
        read_questions(path)
