import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rewards.geneval import TAGS
from worlds.shapes.scenes.edits import KINDS, Edit
from worlds.shapes.scenes.prompts import COUNTS, WIDE_COUNT, data_uri, edit_lines, main, write
from worlds.shapes.scenes.render import render
from worlds.shapes.scenes.world import COLORS, SHAPES

FOLDER = Path(__file__).parents[4] / "recipes" / "shapes" / "prompts"
NAMES = [(task, split) for task in ("t2i", "edit") for split in ("train", "heldout")]


def read(folder: Path, task: str, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{task}_{split}.jsonl").read_text().splitlines()]


def pixels(uri: str) -> np.ndarray:
    _, data = uri.split("base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    write(folder)
    return folder


@pytest.mark.parametrize(("task", "split"), NAMES)
def test_files_are_what_the_code_makes(made, task, split):
    """Byte for byte, pictures apart: those pixel for pixel, since zlib builds compress differently."""
    kept, fresh = read(FOLDER, task, split), read(made, task, split)
    assert len(kept) == COUNTS[split][task]
    for old, new in zip(kept, fresh, strict=True):
        if "image" in old:
            assert (pixels(old.pop("image")) == pixels(new.pop("image"))).all()
        assert json.dumps(old) == json.dumps(new)


@pytest.mark.parametrize(("task", "split"), NAMES)
def test_files_are_small_and_balanced_in_every_prefix(task, split):
    assert (FOLDER / f"{task}_{split}.jsonl").stat().st_size < 1.5e6
    kinds = [
        line["metadata"]["tag"] if task == "t2i" else line["metadata"]["edit"]["kind"]
        for line in read(FOLDER, task, split)
    ]
    names = TAGS if task == "t2i" else KINDS
    for start in range(0, len(kinds) - 6, 6):
        assert set(kinds[start : start + 6]) == set(names)


def test_the_wide_training_set_is_what_the_code_makes_and_spends_its_lines_where_texts_are_many(made):
    name = "t2i_train_wide.jsonl"
    assert (FOLDER / name).read_text() == (made / name).read_text()
    lines = read(FOLDER, "t2i", "train_wide")
    tags = [line["metadata"]["tag"] for line in lines]
    texts = {tag: {line["prompt"] for line in lines if line["metadata"]["tag"] == tag} for tag in TAGS}
    assert len(lines) == WIDE_COUNT and sum(map(len, texts.values())) > len(lines) / 2
    # By hand: 12, 40, 168, 72, 5328 and 1080 texts; their fourth roots sum to 25.2.
    shares = {"single_object": 1.86, "two_object": 2.51, "counting": 3.60, "colors": 2.91, "position": 8.54,
              "color_attr": 5.73}  # fmt: skip
    for tag, root in shares.items():
        assert tags.count(tag) / len(lines) == pytest.approx(root / 25.17, abs=0.002)
        assert tags[:1024].count(tag) / 1024 == pytest.approx(root / 25.17, abs=0.03), "mixed, not in blocks"


def test_train_and_heldout_are_disjoint():
    texts = {split: {line["prompt"] for line in read(FOLDER, "t2i", split)} for split in COUNTS}
    texts["train"] |= {line["prompt"] for line in read(FOLDER, "t2i", "train_wide")}
    assert not texts["train"] & texts["heldout"]
    scenes = {
        split: {Edit.from_json(line["metadata"]["edit"])[1].content for line in read(FOLDER, "edit", split)}
        for split in COUNTS
    }
    assert not scenes["train"] & scenes["heldout"]
    # Not by any single word: those are all in training.
    for task in ("t2i", "edit"):
        words = {s: {w for line in read(FOLDER, task, s) for w in line["prompt"].split()} for s in COUNTS}
        assert words["heldout"] <= words["train"]
        assert {*SHAPES, *COLORS} <= words["train"]


def test_texts_repeat_only_where_a_tag_has_too_few():
    unique = {}
    for tag in TAGS:
        texts = [line["prompt"] for line in read(FOLDER, "t2i", "heldout") if line["metadata"]["tag"] == tag]
        unique[tag] = (len(set(texts)), len(texts))
    assert {tag: n for tag, (n, _) in unique.items()} == {
        "single_object": 4,
        "two_object": 8,
        "counting": 56,
        "colors": 24,
        "position": 341,
        "color_attr": 341,
    }
    lines = read(FOLDER, "edit", "heldout")
    keys = {(line["prompt"], json.dumps(line["metadata"]["edit"]["source"])) for line in lines}
    assert len(keys) == len(lines)


def test_pictures_show_the_source_without_loss():
    for line in read(FOLDER, "edit", "heldout")[:50]:
        _, source = Edit.from_json(line["metadata"]["edit"])
        assert (pixels(line["image"]) == render(source)).all()


def test_a_picture_of_too_many_colours_is_refused():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    with pytest.raises(ValueError, match="palette of 256"):
        data_uri(noise)


def test_fresh_editing_prompts_for_training(tmp_path, capsys):
    main([str(tmp_path), "--edit-train", "12", "--seed", "30"])
    (path,) = tmp_path.iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == list(edit_lines("train", 12, 30)) and lines != list(edit_lines("train", 12, 1))
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--edit-train", "0"])
    assert "--edit-train is 0; give 1 or more" in capsys.readouterr().err
