import json
from collections import Counter

import numpy as np
import pytest

from worlds.shapes.scenes.captions import SPLITS
from worlds.shapes.scenes.edits import KINDS, Edit, in_split, sample_edit
from worlds.shapes.scenes.world import PLACES, Scene, Shape, sample_scene

RED, BLUE = Shape("circle", "red", 8.0, 8.0), Shape("square", "blue", 24.0, 24.0)
PAIR = Scene("white", (RED, BLUE))


@pytest.mark.parametrize(
    ("edit", "target"),
    [
        (Edit("recolour", 0, Shape("circle", "green", 8.0, 8.0)), (Shape("circle", "green", 8.0, 8.0), BLUE)),
        (Edit("add", None, Shape("cross", "red", 24.0, 8.0)), (RED, BLUE, Shape("cross", "red", 24.0, 8.0))),
        (Edit("remove", 0), (BLUE,)),
        (Edit("replace", 1, Shape("cross", "red", 24.0, 24.0)), (RED, Shape("cross", "red", 24.0, 24.0))),
        (Edit("move", 0, Shape("circle", "red", 24.0, 8.0)), (Shape("circle", "red", 24.0, 8.0), BLUE)),
    ],
)
def test_apply(edit, target):
    assert edit.apply(PAIR) == Scene("white", target)
    assert Edit.from_json(json.loads(json.dumps(edit.to_json(PAIR)))) == (edit, PAIR)


def test_apply_background():
    edit = Edit("background", background="black")
    assert edit.apply(PAIR) == Scene("black", PAIR.objects)
    assert Edit.from_json(edit.to_json(PAIR)) == (edit, PAIR)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "twist"}, "edit.kind: 'twist'"),
        ({"index": None}, "edit.index: None"),
        ({"index": 2}, "not one of the source's 2 objects"),
        ({"result": None}, "edit.result: None"),
        ({"background": "black"}, "edit.background: 'black'"),
        ({"source": {}}, "missing background, objects"),
    ],
)
def test_malformed_edits_are_named(change, message):
    sound = Edit("recolour", 0, Shape("circle", "green", 8.0, 8.0)).to_json(PAIR)
    with pytest.raises(ValueError, match=message):
        Edit.from_json({**sound, **change})


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_sound(kind):
    rng = np.random.default_rng(0)
    for _ in range(150):
        example = sample_edit(rng, "train", kind)
        edit, source = Edit.from_json(example.metadata["edit"])
        assert (edit.kind, source, edit.apply(source)) == (kind, example.source, example.target)
        assert example.target != example.source
        assert 1 <= len(example.target.objects) <= 3
        assert len(example.instruction.split()) <= 14
        for scene in (example.source, example.target):
            kinds = [(item.shape, item.color) for item in scene.objects]
            assert len(set(kinds)) == len(kinds)  # so that "the red circle" names one object
            cells = [divmod(item.cell, 3) for item in scene.objects]
            far = [max(abs(a - c), abs(b - d)) >= 2 for a, b in cells for c, d in cells if (a, b) != (c, d)]
            assert all(far)


def wording(edit: Edit, source: Scene) -> str:
    """The instruction, written from the ground truth."""
    old, new = source.objects[edit.index or 0], edit.result or BLUE
    name = f"the {old.color} {old.shape}"
    noun = f"{'an' if new.color == 'orange' else 'a'} {new.color} {new.shape}"
    where = "" if edit.anywhere else f" at the {PLACES[new.cell]}"
    return {
        "recolour": f"make {name} {new.color}",
        "remove": f"remove {name}",
        "replace": f"replace {name} with {noun}",
        "move": f"move {name} to the {PLACES[new.cell]}",
        "background": f"make the background {edit.background}",
        "add": f"add {noun}{where}",
    }[edit.kind]


def test_instructions_say_what_the_ground_truth_does():
    rng = np.random.default_rng(0)
    stated = Counter()
    for _ in range(600):
        example = sample_edit(rng, "train")
        edit, source = Edit.from_json(example.metadata["edit"])
        assert example.instruction == wording(edit, source)
        stated[edit.kind, edit.anywhere] += 1
    assert {kind for kind, _ in stated} == set(KINDS)
    assert min(stated["add", True], stated["add", False]) > 20


def test_scenes_belong_to_one_split_whatever_their_jitter_and_order():
    shares = Counter()
    for seed in range(2000):
        scene = sample_scene(seed)
        shares[in_split(scene, "heldout")] += 1
        assert in_split(scene, "heldout") != in_split(scene, "train")
        moved = tuple(Shape(i.shape, i.color, i.x - 0.125, i.y) if i.x > 16 else i for i in scene.objects)
        if all(a.cell == b.cell for a, b in zip(moved, scene.objects, strict=True)):
            assert in_split(Scene(scene.background, moved[::-1]), "heldout") == in_split(scene, "heldout")
    assert 0.22 < shares[True] / 2000 < 0.28


def test_samples_keep_to_their_split():
    rng = np.random.default_rng(0)
    scenes = {split: {sample_edit(rng, split).source.content for _ in range(400)} for split in SPLITS}
    assert not scenes["train"] & scenes["heldout"]
    with pytest.raises(ValueError, match="split: 'test'"):
        sample_edit(rng, "test")


def test_a_seed_gives_one_sample():
    assert [sample_edit(s, "train") for s in range(50)] == [sample_edit(s, "train") for s in range(50)]
