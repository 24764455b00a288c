"""The train-prompt generator: what it writes, what it leaves out, what it holds out, and what it refuses."""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from core.prompts import PromptFileError, load_prompts
from rewards.geneval import TAGS, evaluate
from rewards.geneval.prompt_config import (
    TagWeights,
    TrainPromptConfig,
    load_config,
    unseen_classes,
)
from rewards.geneval.train_prompts import (
    Excluded,
    PromptSupplyError,
    add_arguments,
    canonical,
    generate,
    read_test_sets,
    run,
)

OFFICIAL = Path(__file__).parents[2] / "data" / "geneval" / "evaluation_metadata.jsonl"
RECORDS = [json.loads(line) for line in OFFICIAL.read_text(encoding="utf-8").splitlines()]
FEW = ["dog", "cat", "bench", "orange", "hot dog", "person"]


def only(tag: str, **keys) -> TrainPromptConfig:
    weights = TagWeights(**{name: float(name == tag) for name in TAGS})
    return TrainPromptConfig(**{"tag_weights": weights, **keys})


def everything(config: TrainPromptConfig, **keys) -> list[dict]:
    """All prompts there are; the generator says itself when it is at their end."""
    made = []
    with pytest.raises(PromptSupplyError, match="prompts exist"):
        for record in generate(config, num=10**9, **{"seed": 0, **keys}):
            made.append(record)
    return made


def evenly(**keys) -> TrainPromptConfig:
    return TrainPromptConfig(tag_weights=TagWeights(1, 1, 1, 1, 1, 1), **keys)


def cli(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


def test_records_are_in_genevals_format():
    made = {r["prompt"]: r for tag in TAGS for r in everything(only(tag, classes=["dog", "orange"]))}
    expected = [
        {
            "tag": "single_object",
            "include": [{"class": "orange", "count": 1}],
            "prompt": "a photo of an orange",
        },
        {
            "tag": "two_object",
            "include": [{"class": "dog", "count": 1}, {"class": "orange", "count": 1}],
            "prompt": "a photo of a dog and an orange",
        },
        {
            "tag": "counting",
            "include": [{"class": "dog", "count": 4}],
            "exclude": [{"class": "dog", "count": 5}],
            "prompt": "a photo of four dogs",
        },
        {
            "tag": "colors",
            "include": [{"class": "orange", "count": 1, "color": "blue"}],
            "prompt": "a photo of a blue orange",
        },
        {
            "tag": "position",
            "include": [
                {"class": "orange", "count": 1},
                {"class": "dog", "count": 1, "position": ["above", 0]},
            ],
            "prompt": "a photo of a dog above an orange",
        },
        {
            "tag": "color_attr",
            "include": [
                {"class": "dog", "count": 1, "color": "orange"},
                {"class": "orange", "count": 1, "color": "red"},
            ],
            "prompt": "a photo of an orange dog and a red orange",
        },
    ]
    for record in expected:
        assert made[record["prompt"]] == record


def test_how_many_prompts_there_are_over_few_classes():
    counts = {tag: len(everything(only(tag, classes=FEW))) for tag in TAGS}
    # Six classes, five of them coloured: no person is.
    assert counts == {
        "single_object": 6,
        "two_object": 6 * 5,
        "counting": 6 * 3,
        "colors": 5 * 10,
        "position": 6 * 5 * 4,
        "color_attr": 5 * 4 * 10 * 9,
    }
    colored = everything(only("colors", classes=FEW)) + everything(only("color_attr", classes=FEW))
    assert not any("person" in record["prompt"] for record in colored)
    assert len(everything(only("colors", classes=FEW, uncolored=[]))) == 6 * 10


def test_no_text_comes_twice_and_the_seed_decides_all():
    config = evenly(classes=FEW)
    made = list(generate(config, num=36, seed=5))
    assert len({record["prompt"] for record in made}) == 36
    assert list(generate(config, num=36, seed=5)) == made
    assert list(generate(config, num=12, seed=5)) == made[:12]
    assert list(generate(config, num=36, seed=6)) != made


def test_two_tags_never_share_a_text():
    # An orange juice is a class by itself, or a juice that is orange.
    config = TrainPromptConfig(
        classes=["juice", "orange juice"],
        colors=["orange", "red"],
        tag_weights=TagWeights(1, 0, 0, 2, 0, 0),
    )
    for seed in range(10):
        texts = [record["prompt"] for record in everything(config, seed=seed)]
        assert len(set(texts)) == len(texts) >= 3


def test_any_beginning_keeps_to_the_weights():
    weights = {"two_object": 1, "counting": 2, "position": 3.5, "color_attr": 0.5}
    config = TrainPromptConfig(tag_weights=TagWeights(**weights, colors=0))
    seen: Counter[str] = Counter()
    for number, record in enumerate(generate(config, num=700, seed=1), 1):
        seen[record["tag"]] += 1
        for tag, weight in weights.items():
            assert abs(seen[tag] - number * weight / 7) < 1.5
    assert seen == {"two_object": 100, "counting": 200, "position": 350, "color_attr": 50}


def test_the_rules_can_read_every_record():
    for record in generate(evenly(classes=FEW), num=36, seed=0):
        assert evaluate(record, {}, classify_color=lambda name, found: []).tag == record["tag"]


def test_running_out_names_the_tag_and_what_there_is():
    config = only("counting", classes=FEW)
    assert len(list(generate(config, num=18, seed=0))) == 18
    with pytest.raises(PromptSupplyError, match=r"counting: 18 prompts exist .* need about 19.*--num 18 "):
        list(generate(config, num=19, seed=0))
    # Half of the lines are of a tag of 6, so the 13th cannot be written, and the 12th can.
    halves = TrainPromptConfig(classes=FEW, tag_weights=TagWeights(1, 1, 0, 0, 0, 0))
    with pytest.raises(
        PromptSupplyError, match=r"single_object: 6 prompts exist .* need about 10.*--num 12 "
    ):
        list(generate(halves, num=20, seed=0))
    assert len(list(generate(halves, num=12, seed=0))) == 12


def test_repeats_go_round_in_a_new_order_only_when_asked_for():
    config = only("counting", classes=FEW, repeats=True)
    made = [record["prompt"] for record in generate(config, num=54, seed=0)]
    rounds = [made[:18], made[18:36], made[36:]]
    assert all(sorted(turn) == sorted(rounds[0]) and len(set(turn)) == 18 for turn in rounds)
    assert rounds[0] != rounds[1] != rounds[2]
    nothing = Excluded(clauses=frozenset(canonical(r["include"]) for r in everything(only("counting"))))
    with pytest.raises(PromptSupplyError, match="counting: 0 prompts exist"):
        list(generate(config, num=1, seed=0, excluded=nothing))


# Test sets


DOG, CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ([DOG, CAT], [CAT, DOG], True),
        ([DOG, CAT], [DOG, DOG], False),
        ([DOG], [DOG, CAT], False),
        ([{**DOG, "count": 2}], [{**DOG, "count": 3}], False),
        ([{**DOG, "color": "red"}, CAT], [CAT, {**DOG, "color": "red"}], True),
        ([{**DOG, "color": "red"}, CAT], [{**CAT, "color": "red"}, DOG], False),
        ([CAT, {**DOG, "position": ["left of", 0]}], [DOG, {**CAT, "position": ["right of", 0]}], True),
        ([CAT, {**DOG, "position": ["above", 0]}], [DOG, {**CAT, "position": ["below", 0]}], True),
        ([CAT, {**DOG, "position": ["left of", 0]}], [DOG, {**CAT, "position": ["left of", 0]}], False),
        ([CAT, {**DOG, "position": ["left of", 0]}], [CAT, {**DOG, "position": ["above", 0]}], False),
        ([CAT, {**DOG, "position": ["left of", 0]}], [CAT, DOG], False),
    ],
)
def test_clauses_that_ask_for_the_same_picture(first, second, same):
    assert (canonical(first) == canonical(second)) is same


@pytest.mark.parametrize(
    ("line", "tag", "gone"),
    [
        (
            {"prompt": "x", "tag": "t", "include": [CAT, DOG]},
            "two_object",
            {"cat and a dog", "dog and a cat"},
        ),
        (
            {"prompt": "x", "metadata": {"tag": "t", "include": [CAT, {**DOG, "position": ["left of", 0]}]}},
            "position",
            {"dog left of a cat", "cat right of a dog"},
        ),
        (
            {"prompt": "x", "include": [{**CAT, "color": "red"}, {**DOG, "color": "pink"}]},
            "color_attr",
            {"red cat and a pink dog", "pink dog and a red cat"},
        ),
        # No clauses: known by the text alone, whatever its case, spaces and punctuation.
        ({"prompt": "A photo of  a Cat, and a dog."}, "two_object", {"cat and a dog"}),
        (
            {"prompt": "three benchs", "include": [{"class": "bench", "count": 3}]},
            "counting",
            {"three benches"},
        ),
        (
            {"prompt": "a photo of a giraffe", "include": [{"class": "giraffe", "count": 1}]},
            "two_object",
            set(),
        ),
    ],
)
def test_what_a_test_set_takes_out(tmp_path, line, tag, gone):
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(line) + "\n")
    config = only(tag, classes=["cat", "dog", "bench"], wording="english")
    every = {record["prompt"] for record in everything(config)}
    left = {record["prompt"] for record in everything(config, excluded=read_test_sets([path]))}
    number = "a photo of " if tag == "counting" else "a photo of a "
    assert every - left == {number + words for words in gone}


def variants(record: dict) -> set[str]:
    """The official text, and what it becomes when its two sides trade places, by the words alone."""
    text = record["prompt"]
    if match := re.fullmatch(r"a photo of (.+?) (and|left of|right of|above|below) (.+)", text):
        mirror = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        first, joint, second = match.groups()
        return {text, f"a photo of {second} {mirror.get(joint, joint)} {first}"}
    return {text}


@pytest.mark.parametrize(
    ("tag", "left"),
    [
        ("single_object", 80 - 80),
        ("two_object", 80 * 79 - 2 * 99),
        ("counting", 80 * 3 - 80),
        ("colors", 79 * 10 - 94),
        # Two of the hundred say the same: a laptop left of a cow, a cow right of a laptop.
        ("position", 80 * 79 * 4 - 2 * 99),
    ],
)
def test_the_official_prompts_leave_either_way_round(tag, left):
    made = {record["prompt"] for record in everything(only(tag), excluded=read_test_sets([OFFICIAL]))}
    assert len(made) == left
    assert not made & {text for record in RECORDS for text in variants(record)}


def test_the_official_pairs_of_colours_leave_too():
    # A fifth of the classes, since all of them give 554,580 such prompts.
    classes = sorted(
        {clause["class"] for r in RECORDS if r["tag"] == "color_attr" for clause in r["include"]}
    )
    classes = sorted({*classes[::5], "dog", "potted plant", "car"})
    inside = [
        r
        for r in RECORDS
        if r["tag"] == "color_attr" and all(clause["class"] in classes for clause in r["include"])
    ]
    assert len(inside) > 3
    made = everything(only("color_attr", classes=classes), excluded=read_test_sets([OFFICIAL]))
    texts = {record["prompt"] for record in made}
    assert len(texts) == len(classes) * (len(classes) - 1) * 90 - 2 * len(inside)
    assert not texts & {text for record in RECORDS for text in variants(record)}


def test_several_test_sets_and_bad_ones(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text('{"prompt": "a photo of a dog"}\n')
    two.write_text('{"prompt": "a photo of a cat"}\n')
    made = everything(only("single_object", classes=FEW), excluded=read_test_sets([one, two]))
    assert len(made) == 4
    two.write_text('{"prompt": "a photo of a cat"}\n{"text": "no prompt"}\n')
    with pytest.raises(PromptFileError, match="two.jsonl:2: key 'prompt'"):
        read_test_sets([one, two])
    two.write_text('{"prompt": "a cat", "include": [{"class": "cat"}]}\n')
    with pytest.raises(ValueError, match=r"two.jsonl: prompt 'a cat': include\[0\].count: None"):
        read_test_sets([two])


# Held-out classes


@pytest.mark.parametrize("tag", TAGS)
def test_the_splits_part_the_prompts_by_class(tag):
    config = only(tag, classes=FEW, unseen_classes=["cat", "person"])
    train, unseen = (everything(config, split=split) for split in ("train", "unseen"))
    assert train
    assert not any(re.search(r"\b(cat|person)s?\b", record["prompt"]) for record in train)
    assert all({c["class"] for c in record["include"]} & {"cat", "person"} for record in unseen)
    both = {record["prompt"] for record in train + unseen}
    assert len(both) == len(train) + len(unseen)
    assert both == {record["prompt"] for record in everything(only(tag, classes=FEW))}


def test_no_train_prompt_holds_the_word_in_another_sense():
    for tag in TAGS:
        config = only(tag, classes=FEW, unseen_classes=["dog", "orange"])
        for record in everything(config):
            assert not re.search(r"\b(dog|orange)s?\b", record["prompt"])
        unseen = everything(config, split="unseen")
        assert all({c["class"] for c in r["include"]} & {"dog", "orange"} for r in unseen)
    english = only("counting", classes=FEW, unseen_classes=["person"], wording="english")
    assert not any("people" in record["prompt"] for record in everything(english))
    assert any("people" in record["prompt"] for record in everything(english, split="unseen"))


def test_classes_are_held_out_by_a_seed_of_their_own():
    held = unseen_classes(TrainPromptConfig(unseen_count=20))
    assert len(set(held)) == 20
    backwards = TrainPromptConfig(classes=TrainPromptConfig().classes[::-1], unseen_count=20)
    assert set(unseen_classes(backwards)) == set(held)
    assert set(unseen_classes(TrainPromptConfig(unseen_count=20, unseen_seed=1))) != set(held)
    assert unseen_classes(TrainPromptConfig()) == ()
    with pytest.raises(PromptSupplyError, match="position: 0 prompts exist for the split unseen"):
        list(generate(only("position"), num=1, seed=0, split="unseen"))
    with pytest.raises(ValueError, match="split: 'test' is not one of train, unseen"):
        list(generate(only("position"), num=1, seed=0, split="test"))


# Command line


def test_fifty_thousand_prompts_in_one_file(tmp_path, capsys):
    config = tmp_path / "prompts.yaml"
    config.write_text(
        "tag_weights: {two_object: 1, counting: 0.03, colors: 0.1, position: 4, color_attr: 5}\n"
    )
    path = tmp_path / "train.jsonl"
    assert cli("--output", path, "--num", 50_000, "--config", config, "--exclude", OFFICIAL) == 0
    prompts = load_prompts(path, task="t2i")
    assert len({prompt.prompt for prompt in prompts}) == 50_000
    counts = Counter(prompt.metadata["tag"] for prompt in prompts)
    assert f"{path}: 50000 prompts (two_object {counts['two_object']}, counting " in capsys.readouterr().out
    assert not {p.prompt for p in prompts} & {text for record in RECORDS for text in variants(record)}


def test_the_file_is_a_function_of_its_arguments(tmp_path, capsys):
    config = tmp_path / "prompts.yaml"
    config.write_text("unseen_count: 20\n")
    for name in ("a", "b"):
        assert cli("--output", tmp_path / name, "--num", 200, "--seed", 3, "--config", config) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert cli("--output", tmp_path / "c", "--num", 200, "--config", config, "--split", "unseen") == 0
    held = set(unseen_classes(load_config(config)))
    assert f"held-out classes: {', '.join(unseen_classes(load_config(config)))}" in capsys.readouterr().out
    for name, mentions in (("a", False), ("c", True)):
        for prompt in load_prompts(tmp_path / name, task="t2i"):
            assert bool(held & {clause["class"] for clause in prompt.metadata["include"]}) is mentions


def test_what_cannot_be_met_leaves_the_file_alone(tmp_path, capsys):
    path = tmp_path / "train.jsonl"
    path.write_text("as it was")
    assert cli("--output", path, "--num", 50_000, "--exclude", OFFICIAL) == 2
    assert "counting: 160 prompts exist" in capsys.readouterr().err
    assert cli("--output", path, "--num", 0, "--exclude", tmp_path / "nowhere.jsonl", path) == 2
    problems = capsys.readouterr().err
    assert "--num: 0 is below 1" in problems and "is also a test set" in problems
    assert cli("--output", path, "--num", 5, "--exclude", tmp_path / "nowhere.jsonl") == 2
    assert "nowhere.jsonl: cannot be read" in capsys.readouterr().err
    assert cli("--output", path / "below", "--num", 5, "--exclude", OFFICIAL) == 2
    assert [item.name for item in tmp_path.iterdir()] == ["train.jsonl"]
    assert path.read_text() == "as it was"


def test_a_set_without_a_test_set_or_with_foreign_classes_is_warned_of(tmp_path, caplog):
    config = tmp_path / "prompts.yaml"
    config.write_text("classes: [keyboard, dog, cat, ox]\ncounts: [2, 3, 4, 5]\n")
    assert cli("--output", tmp_path / "out.jsonl", "--num", 20, "--config", config) == 0
    assert "no --exclude" in caplog.text
    assert "'keyboard' is not one of GenEval's detector; did you mean 'computer keyboard'?" in caplog.text
    assert "class 'ox'" in caplog.text and "'dog'" not in caplog.text
