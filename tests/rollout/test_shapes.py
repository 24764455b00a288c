"""Which shape a prompt's pictures have: from the heads of its references, its own wish, or a draw by seed."""

import json
from collections import Counter

import pytest
from PIL import Image

from core.prompts import Prompt, load_prompts
from rollout.shapes import Shape, ShapeRule, UnreadableError
from tests.cases.conftest import CASES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The configs of a model that makes sides of 8 to 128 px; chosen ones are multiples of 16."""
    place = tmp_path_factory.mktemp("model")
    for part, config in (
        ("transformer", {"patch_size": 2, "pos_embed_max_size": 16, "sample_size": 8}),
        ("vae", {"block_out_channels": [8, 16, 16]}),
    ):
        (place / part).mkdir()
        (place / part / "config.json").write_text(json.dumps(config))
    return place


def picture(folder, width, height):
    path = folder / f"{width}x{height}.png"
    Image.new("RGB", (width, height), "red").save(path)
    return str(path)


def edit(*references, size=None):
    return Prompt(0, "edit", "make it blue", references, size=size)


def test_edits_keep_their_proportions_upright_by_the_released_rule(folder):
    rule = ShapeRule(folder, (32, 32), longer_edge=64)
    prompts = load_prompts(CASES / "references" / "edit.jsonl", "edit")
    found = [rule.of(prompt, 1) for prompt in prompts[:5]]
    sizes = [(64, 32), (16, 64), (64, 64), (64, 32), (32, 64)]  # the fifth lies on its side in the file
    assert found == [Shape(size, (size,)) for size in sizes]
    with pytest.raises(ValueError, match="4000 x 40 are beyond 8:1"):
        rule.possible(prompts[5])


def test_without_a_longer_edge_no_picture_is_looked_at(tmp_path):
    rule = ShapeRule(tmp_path / "no model", (32, 48))
    gone = str(tmp_path / "gone.png")
    assert rule.possible(edit(gone)) == (Shape((32, 48), ((32, 48),)),)
    assert rule.of(Prompt(0, "t2i", "x"), 1) == Shape((32, 48))


def test_a_lines_own_size_comes_first(folder, tmp_path):
    rule = ShapeRule(folder, (32, 32), ((16, 16), (64, 64)), (1.0, 1.0), longer_edge=64)
    thin = picture(tmp_path, 100, 1)
    assert rule.of(edit(thin, size=(8, 128)), 1) == Shape((8, 128), ((8, 128),))
    assert rule.of(Prompt(0, "t2i", "x", size=(8, 128)), 1) == Shape((8, 128))
    with pytest.raises(ValueError, match=r"pictures of 8 x 136 px .* at most 128"):
        rule.check(edit(thin, size=(8, 136)))


def test_text_to_image_draws_by_weight_and_seed_alone():
    rule = ShapeRule(CASES, (32, 32), ((16, 32), (32, 16)), (3.0, 1.0))
    drawn = [rule.of(Prompt(0, "t2i", "x"), seed) for seed in range(400)]
    assert drawn == [rule.of(Prompt(1, "t2i", "y"), seed) for seed in range(400)]
    assert 270 < Counter(drawn)[Shape((16, 32))] < 330
    assert set(drawn) == set(rule.possible(Prompt(0, "t2i", "x")))
    assert rule.of(edit("p.png"), 1).size == (32, 32), "edits draw nothing"


def test_further_references_have_their_own_proportions_within_the_budget(folder, tmp_path):
    first, second = picture(tmp_path, 100, 50), picture(tmp_path, 30, 60)
    rule = ShapeRule(folder, (32, 32), longer_edge=64)
    assert rule.of(edit(first, second), 1) == Shape((32, 64), ((32, 64), (64, 32)))
    tight = ShapeRule(folder, (32, 32), longer_edge=64, reference_pixels=32 * 64 + 512)
    assert tight.of(edit(first, second), 1) == Shape((32, 64), ((32, 64), (32, 16)))
    assert tight.of(edit(first, second), 1).pixels == 2 * 32 * 64 + 512
    with pytest.raises(ValueError, match="leaves 10 pixels for each further one"):
        ShapeRule(folder, (32, 32), longer_edge=64, reference_pixels=2058).possible(edit(first, second))


def test_a_picture_that_cannot_be_read_is_left_to_the_encoder(folder, tmp_path, caplog):
    rule, gone = ShapeRule(folder, (32, 32), longer_edge=64), edit(str(tmp_path / "gone.png"))
    with pytest.raises(UnreadableError, match=r"gone\.png is unreadable"):
        rule.possible(gone)
    assert rule.of(gone, 1) == Shape((32, 32), ((32, 32),)) and "gone.png is unreadable" in caplog.text
    picture(tmp_path, 100, 50)
    (tmp_path / "100x50.png").rename(tmp_path / "gone.png")
    assert rule.of(gone, 1).size == (32, 64), "a failure is not kept"
