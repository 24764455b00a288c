"""GenEval's rules against an independent reference: on the official prompts, and on any record and boxes."""

import json
import random
from pathlib import Path

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rewards.geneval import RELATIONS, TAGS, Detection, evaluate
from tests.rewards.geneval.test_rules import at

DATA = Path(__file__).parents[2] / "data" / "geneval"


def _reference(record: dict, objects: dict[str, list[Detection]], colors: dict[int, str]) -> bool:
    """GenEval's verdict, short and with numpy, as an independent check on `correct`."""
    bar = 0.9 if record["tag"] == "counting" else 0.3
    top = {
        name: sorted([d for d in found if d.score > bar], key=lambda d: -d.score)[:16]
        for name, found in objects.items()
    }
    groups: list = []
    for clause in record["include"]:
        group = top.get(clause["class"], [])[: clause["count"]]
        good = len(group) == clause["count"]
        if good and "color" in clause:
            good = all(colors[id(d)] == clause["color"] for d in group)
        if good and "position" in clause:
            relation, target = clause["position"]
            axis = 0 if relation in ("left of", "right of") else 1
            sign = -1 if relation in ("left of", "above") else 1
            good = groups[target] is not None
            for a, b in [(a, b) for a in group for b in groups[target] or []]:
                p, q = (np.array(d.box).reshape(2, 2) for d in (a, b))
                gap = p.mean(0) - q.mean(0)
                length = abs(gap[axis]) - 0.1 * (np.ptp(p, 0) + np.ptp(q, 0))[axis]
                good &= bool(sign * gap[axis] > 0 and length / np.linalg.norm(gap) > 0.5)
        groups.append(group if good else None)
    surplus = any(len(top.get(e["class"], [])) >= e["count"] for e in record.get("exclude", []))
    return None not in groups and not surplus


def test_official_prompts_agree_with_an_independent_reference():
    lines = (DATA / "evaluation_metadata.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 553
    rng = random.Random(0)
    correct = 0
    for record in records * 4:
        objects = {
            clause["class"]: [
                at(
                    rng.uniform(0, 90),
                    rng.uniform(0, 90),
                    rng.choice((0.2, 0.5, 0.95, 0.99)),
                    rng.uniform(5, 30),
                )
                for _ in range(rng.randint(0, clause["count"] + 2))
            ]
            for clause in record["include"]
        }
        colors = {
            id(d): clause["color"] if rng.random() < 0.8 else "brown"
            for clause in record["include"]
            if "color" in clause
            for d in objects[clause["class"]]
        }
        result = evaluate(
            record, objects, classify_color=lambda _, asked, c=colors: [c[id(d)] for d in asked]
        )
        assert result.correct == _reference(record, objects, colors), (record, result.reason)
        assert 0 <= result.dense <= 1
        assert result.strict == (result.dense == 1)
        assert not result.strict or result.correct
        correct += result.correct
    assert 200 < correct < 2000  # both outcomes were tried


NAMES = ("cat", "dog", "bird")
edges = st.floats(0, 100, width=16)
found = st.builds(
    lambda x, y, width, height, score: Detection((x, y, x + width, y + height), score),
    edges, edges, edges, edges, st.sampled_from((0.1, 0.3, 0.5, 0.9, 0.95, 1.0)),
)  # fmt: skip


@st.composite
def records(draw):
    """Any clauses that the rules can read, with objects and their colours."""
    include = []
    for index in range(draw(st.integers(1, 3))):
        clause: dict = {"class": draw(st.sampled_from(NAMES)), "count": draw(st.integers(1, 3))}
        if draw(st.booleans()):
            clause["color"] = draw(st.sampled_from(("red", "blue")))
        if index and draw(st.booleans()):
            clause["position"] = [draw(st.sampled_from(RELATIONS)), draw(st.integers(0, index - 1))]
        include.append(clause)
    surplus = st.fixed_dictionaries({"class": st.sampled_from(NAMES), "count": st.integers(1, 4)})
    record = {
        "tag": draw(st.sampled_from(TAGS)),
        "include": include,
        "exclude": draw(st.lists(surplus, max_size=1)),
    }
    objects = {name: draw(st.lists(found, max_size=4)) for name in NAMES}
    colors = {
        id(d): draw(st.sampled_from(("red", "red", "blue"))) for group in objects.values() for d in group
    }
    return record, objects, colors


@settings(deadline=None, max_examples=200)
@given(records())
def test_any_record_on_any_boxes_agrees_with_the_reference(example):
    record, objects, colors = example
    for a, b in [
        (a, b) for group in objects.values() for a in group for other in objects.values() for b in other
    ]:
        offset = [(a.box[k] + a.box[k + 2] - b.box[k] - b.box[k + 2]) / 2 for k in (0, 1)]
        sizes = [abs(d.box[k + 2] - d.box[k]) for k in (0, 1) for d in (a, b)]
        for k in (
            0,
            1,
        ):  # on the edge of a relation the two may round apart, and a thousandth of a pixel is none
            rest = abs(offset[k]) - 0.1 * (sizes[2 * k] + sizes[2 * k + 1])
            assume(not np.any(offset) or abs(rest / np.hypot(*offset) - 0.5) > 1e-6)
            assume(not 0 < rest < 1e-2)
    result = evaluate(record, objects, classify_color=lambda _, asked: [colors[id(d)] for d in asked])
    assert result.correct == _reference(record, objects, colors), (record, result.reason)
    assert 0 <= result.dense <= 1 and result.strict == (result.dense == 1) and result.strict <= result.correct
    assert -14 <= result.flow_grpo_compat <= 1 and bool(result.reason) != result.correct


def test_object_names_are_the_classes_of_the_prompts():
    names = (DATA / "object_names.txt").read_text().splitlines()
    records = [json.loads(line) for line in (DATA / "evaluation_metadata.jsonl").read_text().splitlines()]
    assert {clause["class"] for r in records for clause in r["include"]} <= set(names)
    assert {c["position"][0] for r in records for c in r["include"] if "position" in c} == set(RELATIONS)
