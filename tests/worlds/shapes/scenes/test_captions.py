import numpy as np
import pytest

from rewards.geneval import TAGS, Detection, evaluate
from worlds.shapes.scenes.captions import (
    FAMILIES,
    OPPOSITE,
    SPLITS,
    Caption,
    captions,
    noun,
    sample_caption,
    sample_t2i,
    scene_of,
)
from worlds.shapes.scenes.render import HALF_EXTENT
from worlds.shapes.scenes.world import BACKGROUNDS, COLORS, SHAPES, SIZE, Scene


def truth(scene: Scene) -> tuple[dict, dict]:
    """Detections and their colours, straight from the scene."""
    detections: dict[str, list[Detection]] = {"background": [Detection((0, 0, SIZE, SIZE), 1.0)]}
    colors = {id(detections["background"][0]): scene.background}
    for item in scene.objects:
        w, h = HALF_EXTENT[item.shape]
        found = Detection((item.x - w, item.y - h, item.x + w, item.y + h), 1.0)
        detections.setdefault(item.shape, []).append(found)
        colors[id(found)] = item.color
    return detections, colors


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("split", SPLITS)
def test_scenes_satisfy_their_captions(tag, split):
    rng = np.random.default_rng(0)
    for _ in range(150):
        metadata, scene = sample_t2i(rng, split, tag)
        detections, colors = truth(scene)
        result = evaluate(
            metadata, detections, classify_color=lambda _, asked, c=colors: [c[id(d)] for d in asked]
        )
        assert result.correct and result.strict and result.dense == 1, (metadata, scene, result.reason)


def test_scenes_hold_nothing_that_the_caption_leaves_out():
    rng = np.random.default_rng(0)
    for _ in range(200):
        metadata, scene = sample_t2i(rng, "train")
        asked = sum(c["count"] for c in metadata["include"] if c["class"] != "background")
        assert len(scene.objects) == asked


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        (Caption("single_object", (("circle", None),)), "a circle"),
        (
            Caption("two_object", (("circle", None), ("cross", None)), background="grey"),
            "a circle and a cross on grey",
        ),
        (Caption("counting", (("cross", None),), 3), "three crosses"),
        (Caption("counting", (("square", "orange"),), 2), "two orange squares"),
        (Caption("colors", (("circle", "orange"),)), "an orange circle"),
        (
            Caption("position", (("circle", None), ("square", "red")), relation="left of"),
            "a circle left of a red square",
        ),
        (Caption("color_attr", (("circle", "red"), ("square", "blue"))), "a red circle and a blue square"),
    ],
)
def test_wording(caption, text):
    assert caption.text == text
    assert caption.metadata()["prompt"] == text


def test_metadata_has_genevals_form():
    item = Caption("position", (("circle", None), ("square", "red")), relation="above", background="black")
    assert item.metadata() == {
        "tag": "position",
        "include": [
            {"class": "square", "count": 1, "color": "red"},
            {"class": "circle", "count": 1, "position": ["above", 0]},
            {"class": "background", "count": 1, "color": "black"},
        ],
        "prompt": "a circle above a red square on black",
    }
    three = Caption("counting", (("cross", None),), 3).metadata()
    assert three["exclude"] == [{"class": "cross", "count": 4}]


def test_same_meaning_is_one_core():
    left = Caption("position", (("circle", "red"), ("square", None)), relation="left of")
    right = Caption("position", (("square", None), ("circle", "red")), relation="right of", background="grey")
    assert left.core == right.core
    assert left.core != Caption("position", left.items, relation="right of").core


def test_splits_are_disjoint_and_every_word_is_trained():
    cores: dict[str, set[str]] = {split: set() for split in SPLITS}
    words: dict[str, set[str]] = {split: set() for split in SPLITS}
    for tag, families in FAMILIES.items():
        for colored in families:
            family = {split: captions(tag, colored, split) for split in SPLITS}
            assert family["heldout"], f"{tag}: nothing held out"
            # A quarter, and at least one; cores of pairs hold two or more captions each.
            share = len(family["heldout"]) / sum(map(len, family.values()))
            assert 0.15 <= share <= 0.26
            for split, items in family.items():
                cores[split] |= {item.core for item in items}
                words[split] |= {word for item in items for word in item.text.split()}
    assert not cores["train"] & cores["heldout"]
    assert words["heldout"] <= words["train"]
    expected = {*SHAPES, *COLORS, "a", "an", "and", "two", "three", "crosses", "circles"}
    assert expected | {word for relation in OPPOSITE for word in relation.split()} <= words["train"]


def test_samples_keep_to_their_split_and_are_short():
    rng = np.random.default_rng(0)
    backgrounds = set()
    for split in SPLITS:
        for _ in range(300):
            caption = sample_caption(rng, split)
            plain = any(
                Caption(caption.tag, caption.items, caption.count, caption.relation)
                in captions(caption.tag, c, split)
                for c in FAMILIES[caption.tag]
            )
            assert plain and len(caption.text.split()) <= 14
            backgrounds.add(caption.background)
    assert backgrounds == {None, *BACKGROUNDS}


def test_a_seed_gives_one_sample():
    assert [sample_t2i(s, "train") for s in range(50)] == [sample_t2i(s, "train") for s in range(50)]
    assert scene_of(Caption("colors", (("circle", "red"),)), 3) == scene_of(
        Caption("colors", (("circle", "red"),)), 3
    )


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="split: 'test'"):
        captions("colors", True, "test")


def test_article():
    assert (noun("circle", "orange"), noun("circle", "red")) == ("an orange circle", "a red circle")
