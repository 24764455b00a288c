import numpy as np
import pytest

from rewards.geneval import TAGS, evaluate
from worlds.shapes.scenes.captions import sample_t2i
from worlds.shapes.scenes.edits import KINDS, Edit, sample_edit
from worlds.shapes.scenes.render import render, render_batch
from worlds.shapes.scenes.world import Scene, Shape, sample_scene
from worlds.shapes.scoring.template import judge_edit, match


def noisy(images: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(5).normal(0, sigma, images.shape)
    return np.clip(np.round(images + noise), 0, 255).astype(np.uint8)


def cell(item) -> tuple[int, int]:
    return round(item.x / 8), round(item.y / 8)


@pytest.mark.parametrize("sigma", [0.0, 25.0])
def test_finds_exactly_what_was_drawn(sigma):
    scenes = [sample_scene(seed) for seed in range(60)]
    for scene, image in zip(scenes, noisy(render_batch(scenes), sigma), strict=True):
        found = match(image)
        assert found.background == scene.background and found.background_share > 0.4
        drawn = sorted(scene.objects, key=cell)
        seen = sorted(found.objects, key=cell)
        assert [(i.shape, i.color) for i in seen] == [(i.shape, i.color) for i in drawn]
        assert all(
            abs(a.x - b.x) <= 0.51 and abs(a.y - b.y) <= 0.51 for a, b in zip(seen, drawn, strict=True)
        )


@pytest.mark.parametrize("tag", TAGS)
def test_clean_renders_pass_genevals_rules(tag):
    rng = np.random.default_rng(0)
    for _ in range(40):
        metadata, scene = sample_t2i(rng, "heldout", tag)
        found = match(render(scene))
        result = evaluate(metadata, found.detections, classify_color=found.classify_color)
        assert result.strict, (metadata, result.reason)


@pytest.mark.parametrize("kind", KINDS)
def test_perfect_edits_score_one_and_unchanged_ones_zero(kind):
    rng = np.random.default_rng(0)
    for _ in range(40):
        example = sample_edit(rng, "heldout", kind)
        truth = Edit.from_json(example.metadata["edit"])
        assert judge_edit(match(render(example.target)), *truth) == (1, 1)
        instruction, preservation = judge_edit(match(render(example.source)), *truth)
        assert instruction * preservation == 0


def test_partial_edits():
    red, blue = Shape("circle", "red", 8.0, 8.0), Shape("square", "blue", 24.0, 24.0)
    green, pair = Shape("circle", "green", 8.0, 8.0), Scene("white", (red, blue))
    edit = Edit("recolour", 0, green)
    assert judge_edit(match(render(Scene("white", (green,)))), edit, pair) == (1, 0)
    assert judge_edit(match(render(Scene("grey", (green, blue)))), edit, pair) == (1, 0)
    stranger = Shape("cross", "red", 24.0, 8.0)
    assert judge_edit(match(render(Scene("white", (green, blue, stranger)))), edit, pair) == (1, 0.5)
    copied = Scene("white", (red, blue, Shape("circle", "red", 24.0, 8.0)))
    move = Edit("move", 0, Shape("circle", "red", 24.0, 8.0))
    assert judge_edit(match(render(copied)), move, pair)[0] == 0


def test_noise_alone_holds_no_objects():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    found = match(image)
    assert not [item for item in found.objects if item.confidence > 0.3]
    assert "background" not in found.detections
