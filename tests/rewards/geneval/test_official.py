"""GenEval's 553 official prompts: unchanged, readable, worded as ours, and sound under the rules."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

from core.prompts import load_prompts
from rewards.geneval import TAGS, Detection, evaluate
from rewards.geneval.names import CLASS_NAMES, COLORS
from rewards.geneval.prompt_config import TagWeights, TrainPromptConfig
from rewards.geneval.prompt_grammar import prompt_text
from rewards.geneval.train_prompts import generate

DATA = Path(__file__).parents[2] / "data"
OFFICIAL = DATA / "geneval" / "evaluation_metadata.jsonl"
RECORDS = [json.loads(line) for line in OFFICIAL.read_text(encoding="utf-8").splitlines()]

PUBLISHED = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}

SUPPLY = {
    "single_object": 1,
    "two_object": 2,
    "counting": 3,
    "colors": 10,
    "position": 2 * 4,
    "color_attr": 2 * 10 * 9,
}
"""How many prompts a tag has over one class, or over two where it takes two."""


def test_files_are_upstreams_and_their_licence_lies_beside_them():
    rows = re.findall(r"^\| `(\S+)` .* `([0-9a-f]{64})` \|$", (DATA / "README.md").read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == {f"geneval/{path.name}" for path in (DATA / "geneval").iterdir()}
    for name, digest in rows:
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == digest, name
    licence = (DATA / "geneval" / "LICENSE").read_text()
    assert licence.startswith("MIT License") and "Copyright (c)" in licence


def test_all_load_as_a_prompt_set_with_every_tag_as_published():
    prompts = load_prompts(OFFICIAL, task="t2i")
    assert len(prompts) == 553
    assert Counter(p.metadata["tag"] for p in prompts) == PUBLISHED
    assert tuple(PUBLISHED) == TAGS
    assert [{**p.metadata, "prompt": p.prompt} for p in prompts] == RECORDS
    assert all(not p.references for p in prompts)


def test_the_names_are_the_official_ones():
    assert list(CLASS_NAMES) == (DATA / "geneval" / "object_names.txt").read_text().splitlines()
    colors = {clause["color"] for r in RECORDS for clause in r["include"] if "color" in clause}
    assert colors == set(COLORS)


def test_the_grammar_writes_every_official_text_from_its_clauses():
    assert [prompt_text(r["include"]) for r in RECORDS] == [r["prompt"] for r in RECORDS]


def test_the_generator_writes_every_official_line():
    for record in RECORDS:
        config = TrainPromptConfig(
            classes=[clause["class"] for clause in record["include"]],
            tag_weights=TagWeights(**{tag: float(tag == record["tag"]) for tag in TAGS}),
        )
        made = list(generate(config, num=SUPPLY[record["tag"]], seed=0))
        # Key for key in the same order, and once.
        assert [json.dumps(item) for item in made].count(json.dumps(record)) == 1


def scene(record: dict) -> dict[str, list[Detection]]:
    """Sure detections that fulfil a record: the target in the middle, the placed object 100 pixels off."""
    step = {"left of": (-100, 0), "right of": (100, 0), "above": (0, -100), "below": (0, 100)}
    objects = {}
    for clause in record["include"]:
        dx, dy = step[clause["position"][0]] if "position" in clause else (0, 0)
        objects[clause["class"]] = [
            Detection((200 + dx + 12 * i, 200 + dy, 210 + dx + 12 * i, 210 + dy), 0.99)
            for i in range(clause["count"])
        ]
    return objects


def judge(record: dict, objects: dict[str, list[Detection]]):
    asked = {clause["class"]: clause.get("color") for clause in record["include"]}
    return evaluate(record, objects, classify_color=lambda name, found: [asked[name]] * len(found))


def test_what_a_prompt_asks_for_earns_everything():
    for record in RECORDS:
        result = judge(record, scene(record))
        assert (result.correct, result.strict, result.dense, result.flow_grpo_compat) == (True, True, 1, 1)
        assert (result.tag, result.reason) == (record["tag"], "")


def test_one_object_less_is_wrong_and_says_what_is_missing():
    for record in RECORDS:
        for clause in record["include"]:
            objects = scene(record)
            objects[clause["class"]].pop()
            result = judge(record, objects)
            assert not result.correct and not result.strict and result.dense < 1
            assert (
                f"expected {clause['count']} {clause['class']}, found {clause['count'] - 1}" in result.reason
            )


def test_one_object_more_is_wrong_only_where_the_prompt_counts():
    for record in RECORDS:
        for clause in record["include"]:
            objects = scene(record)
            objects[clause["class"]].append(Detection((0, 0, 5, 5), 0.95))
            result = judge(record, objects)
            assert result.correct == (record["tag"] != "counting")
            assert not result.strict and result.dense < 1
