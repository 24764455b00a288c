import numpy as np
import pytest

from rewards.geneval import TAGS, evaluate
from worlds.shapes.scenes.captions import sample_t2i
from worlds.shapes.scenes.render import render, render_batch
from worlds.shapes.scenes.world import BACKGROUNDS, COLORS, SHAPES, Scene, Shape
from worlds.shapes.scoring.components import analyse
from worlds.shapes.scoring.detector import detect, falling, shape_scores


def noisy(images: np.ndarray, sigma: float, seed: int = 0) -> np.ndarray:
    """White noise of `sigma` grey levels."""
    noise = np.random.default_rng(seed).normal(0, sigma, images.shape)
    return np.clip(np.round(images + noise), 0, 255).astype(np.uint8)


def accuracy(tag: str, sigma: float, count: int) -> float:
    rng = np.random.default_rng(1)
    metadata, scenes = zip(*[sample_t2i(rng, "train", tag) for _ in range(count)], strict=True)
    found = detect(noisy(render_batch(scenes), sigma))
    verdicts = [
        evaluate(m, d.detections, classify_color=d.classify_color)
        for m, d in zip(metadata, found, strict=True)
    ]
    return float(np.mean([v.strict for v in verdicts]))


@pytest.mark.parametrize("tag", TAGS)
def test_clean_renders_pass(tag):
    assert accuracy(tag, 0.0, 200) >= 0.99


@pytest.mark.parametrize("tag", TAGS)
def test_noise_of_a_tenth_of_the_range_is_borne(tag):
    assert accuracy(tag, 25.0, 200) >= 0.97


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("color", COLORS)
def test_every_shape_colour_and_background_is_named(background, color):
    for shape in SHAPES:
        (found,) = detect(render(Scene(background, (Shape(shape, color, 8.25, 23.75),)))[None])
        assert set(found.detections) == {shape, "background"}
        (item,) = found.detections[shape]
        assert item.score > 0.99
        assert (item.box[0] + item.box[2]) / 2 == pytest.approx(8.25, abs=0.6)
        assert (item.box[1] + item.box[3]) / 2 == pytest.approx(23.75, abs=0.8)
        assert item.mask[int(item.box[1]) : int(item.box[3]), int(item.box[0]) : int(item.box[2])].any()
        assert found.classify_color(shape, [item]) == [color]
        assert found.classify_color("background", found.detections["background"]) == [background]


def test_confidence_falls_from_one_shape_to_the_next():
    circle = render(Scene("white", (Shape("circle", "blue", 16.0, 16.0),))).astype(float)
    cross = render(Scene("white", (Shape("cross", "blue", 16.0, 16.0),))).astype(float)
    scores = []
    for share in np.linspace(0, 1, 21):
        (picture,) = analyse(np.round((1 - share) * circle + share * cross).astype(np.uint8)[None])
        scores.append(shape_scores(picture.components[0]))
    assert scores[0]["circle"] == 1 and scores[0]["cross"] == 0
    assert scores[-1]["circle"] == 0 and scores[-1]["cross"] == 1
    assert any(max(s.values()) < 0.9 for s in scores)  # what is neither is not called either


def test_empty_and_meaningless_pictures_hold_no_objects():
    flat = np.full((1, 32, 32, 3), 128, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3)).astype(np.uint8)
    for found in detect(np.concatenate([flat, noise])):
        confident = [d for name in SHAPES for d in found.detections.get(name, []) if d.score > 0.3]
        assert not confident


def test_background_between_two_names_is_unsure():
    between = np.full((1, 32, 32, 3), 185, np.uint8)
    (found,) = detect(between)
    assert found.detections["background"][0].score < 0.3


def test_a_pictures_verdict_does_not_depend_on_its_batch():
    rng = np.random.default_rng(0)
    images = noisy(render_batch([sample_t2i(rng, "train")[1] for _ in range(8)]), 20.0)
    together = detect(images)
    for image, found in zip(images, together, strict=True):
        (alone,) = detect(image[None])
        assert {k: [(d.box, d.score) for d in v] for k, v in alone.detections.items()} == {
            k: [(d.box, d.score) for d in v] for k, v in found.detections.items()
        }
    assert detect(np.empty((0, 32, 32, 3), np.uint8)) == []


def test_falling():
    assert [falling(v, (1.0, 3.0)) for v in (0.0, 1.0, 2.0, 3.0, 9.0)] == [1, 1, 0.5, 0, 0]
