import json
from dataclasses import replace

import numpy as np
import pytest

from core.prompts import load_prompts, load_references
from tests.worlds.shapes.scenes.test_prompts import FOLDER, pixels
from worlds.shapes.scenes.captions import SPLITS
from worlds.shapes.scenes.edits import KINDS, Edit, in_split
from worlds.shapes.scenes.inserts import sample_insert
from worlds.shapes.scenes.prompts import COUNTS, insert_lines
from worlds.shapes.scenes.render import render, render_batch
from worlds.shapes.scenes.world import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZE, Scene
from worlds.shapes.scoring.rewards import EditShapes
from worlds.shapes.scoring.template import TemplateEdit

EXAMPLES = [sample_insert(seed, "train") for seed in range(150)]


def grades(targets: list[Scene], reward=EditShapes, noise: float = 0.0) -> np.ndarray:
    """Instruction and preservation of what was drawn for EXAMPLES, [N, 2]."""
    edits = [Edit.from_json(json.loads(json.dumps(item.metadata["edit"]))) for item in EXAMPLES]
    disturbance = np.random.default_rng(0).normal(0, noise, (len(targets), SIZE, SIZE, 3))
    pictures = np.clip(render_batch(targets) + disturbance, 0, 255).astype(np.uint8)
    return np.array(reward().judge(pictures, edits))


def changed(**attributes: dict[str, str]) -> list[Scene]:
    """The right targets, but for attributes of the object that was added: each name becomes the one it maps to."""
    scenes = []
    for item in EXAMPLES:
        *kept, new = item.target.objects
        other = {name: names[getattr(new, name)] for name, names in attributes.items()}
        scenes.append(Scene(item.target.background, (*kept, replace(new, **other))))
    return scenes


def following(names) -> dict[str, str]:
    """Each name to the next one."""
    names = list(names)
    return dict(zip(names, names[1:] + names[:1], strict=True))


def test_the_second_picture_alone_says_what_to_add():
    words, shown = {word for item in EXAMPLES for word in item.instruction.split()}, set()
    # An object in the middle would leave no room for another.
    assert words == {"add", "it", "at", "the", *" ".join(PLACES).split()} - {"center"}
    for item in EXAMPLES:
        new = Edit.from_json(item.metadata["edit"])[0].result
        (seen,) = item.shown.objects
        assert (seen.shape, seen.color) == (new.shape, new.color)
        shown.add((seen.shape, seen.color))
        assert PLACES[seen.cell] == "center"
    assert len(shown) == len(SHAPES) * len(COLORS)
    assert {item.shown.background for item in EXAMPLES} == {*BACKGROUNDS}


def test_samples_are_sound():
    stated = 0
    for item in EXAMPLES:
        edit, source = Edit.from_json(item.metadata["edit"])
        assert edit.kind == "insert" not in KINDS
        assert (source, edit.apply(source)) == (item.source, item.target)
        assert 1 <= len(source.objects) <= 2 and in_split(source, "train")
        where = "" if edit.anywhere else f" at the {PLACES[edit.result.cell]}"
        assert item.instruction == f"add it{where}"
        stated += not edit.anywhere
        assert len({(o.shape, o.color) for o in item.target.objects}) == len(source.objects) + 1
    assert 50 < stated < 100
    with pytest.raises(ValueError, match=r"edit\.index: 0 does not suit an edit of kind insert"):
        Edit.from_json({**EXAMPLES[0].metadata["edit"], "index": 0})
    assert EXAMPLES[:20] == [sample_insert(seed, "train") for seed in range(20)]


@pytest.mark.parametrize("reward", [EditShapes, TemplateEdit])
def test_right_pictures_score_full_marks_and_a_copy_of_the_first_none(reward):
    right = grades([item.target for item in EXAMPLES], reward)
    assert right.prod(axis=1).min() > 0.96
    copy = grades([item.source for item in EXAMPLES], reward)
    assert copy[:, 0].max() == 0 and copy[:, 1].min() > 0.96


def test_noise_of_a_rollout_costs_little():
    assert grades([item.target for item in EXAMPLES], noise=25).prod(axis=1).mean() > 0.95


def test_half_an_object_is_half_the_instruction():
    shapes, colors = following(SHAPES), following(COLORS)
    for scenes in (changed(shape=shapes), changed(color=colors)):
        assert grades(scenes)[:, 0] == pytest.approx(0.5, abs=0.03)
    assert grades(changed(shape=shapes, color=colors))[:, 0].max() < 0.03


def test_the_rest_must_stay():
    alone = [Scene(item.target.background, item.target.objects[-1:]) for item in EXAMPLES]
    found = grades(alone)
    assert found[:, 0].min() > 0.96 and found[:, 1].max() < 0.03
    new = grades([replace(t, background=following(["white", "grey", "black"])[t.background])
                  for t in (item.target for item in EXAMPLES)])  # fmt: skip
    assert new.prod(axis=1).max() < 0.03


@pytest.mark.parametrize("split", SPLITS)
def test_files_are_what_the_code_makes(split):
    path = FOLDER / f"insert_{split}.jsonl"
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    fresh = list(insert_lines(split, COUNTS[split]["insert"]))
    for old, new in zip(kept, fresh, strict=True):
        # Pixel for pixel: zlib builds compress differently.
        for first, second in zip(old.pop("references"), new.pop("references"), strict=True):
            assert (pixels(first) == pixels(second)).all()
        assert old == new
    assert path.stat().st_size < 1e6


def test_both_pictures_are_named_in_their_order():
    for prompt, item in zip(
        load_prompts(FOLDER / "insert_train.jsonl", "edit")[:20], _drawn("train"), strict=False
    ):
        first, second = load_references(prompt)
        assert (np.asarray(first) == render(item.source)).all()
        assert (np.asarray(second) == render(item.shown)).all()


def _drawn(split):
    rng = np.random.default_rng({"train": 1, "heldout": 2}[split])
    return [sample_insert(rng, split) for _ in range(20)]


def test_train_and_heldout_share_no_scene():
    scenes = {
        split: {
            Edit.from_json(prompt.metadata["edit"])[1].content
            for prompt in load_prompts(FOLDER / f"insert_{split}.jsonl", "edit")
        }
        for split in SPLITS
    }
    assert not scenes["train"] & scenes["heldout"]
    assert min(map(len, scenes.values())) > 500
