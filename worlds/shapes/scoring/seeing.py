"""What a judge of the shapes world sees and thinks: grades of a picture from the pixels and the words alone.

The rules are the exact verifier's and GenEval's; what they need to know beyond the words, the source scene, is
found in the source picture by the detector. Grades lie in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from rewards.geneval import evaluate
from worlds.shapes.scenes.instructions import parse_caption, parse_edit
from worlds.shapes.scenes.render import centroid
from worlds.shapes.scenes.world import BACKGROUNDS, COLORS, SHAPES, SIZE, Scene, Shape
from worlds.shapes.scoring.components import Component, Picture, analyse, prototypes
from worlds.shapes.scoring.detector import (
    TOLERANCE,
    background_score,
    color_score,
    detect,
    nearest,
    shape_scores,
)
from worlds.shapes.scoring.verifier import EditScore, verify


def pixels(image: Image.Image) -> np.ndarray:
    """A picture of any size as the world's: uint8 [1, H, W, 3]."""
    image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(image, np.uint8)[None]


def scene_in(picture: Picture) -> Scene:
    """The scene that a clean picture shows: each component as its likeliest shape and nearest colour."""
    background = nearest(picture.background, BACKGROUNDS)
    return Scene(background, tuple(_object(component) for component in picture.components))


def grade_edit(source: Image.Image, result: Image.Image, instruction: str) -> EditScore:
    """The verifier's two terms for an edit. Raises UnknownRequest."""
    before, after = analyse(np.concatenate([pixels(source), pixels(result)]))
    scene = scene_in(before)
    return verify(after, parse_edit(instruction, scene), scene)


def grade_caption(result: Image.Image, text: str) -> float:
    """GenEval's dense credit for a text-to-image picture. Raises UnknownRequest."""
    (found,) = detect(pixels(result))
    record = parse_caption(text).metadata()
    return evaluate(record, found.detections, classify_color=found.classify_color).dense


def grade_quality(result: Image.Image) -> tuple[float, float]:
    """How far a picture holds nothing but (shapes of the world, even colours of the world), whatever was asked.

    The first is the mean over the objects of the best shape's score, the second that of the best colour's, times
    the background's. An empty picture has nothing malformed in it.
    """
    (picture,) = analyse(pixels(result))
    ground = max(background_score(picture, name) for name in BACKGROUNDS)
    shape = [max(shape_scores(component).values()) for component in picture.components]
    color = [max(color_score(component, name) for name in COLORS) for component in picture.components]
    return _mean(shape), ground * _mean(color)


def _object(component: Component) -> Shape:
    misfit = (((component.moments - prototypes()[0]) / TOLERANCE) ** 2).sum(axis=1)
    shape = SHAPES[int(misfit.argmin())]
    x, y = centroid(Shape(shape, "red", 0.0, 0.0))
    return Shape(shape, nearest(component.color, COLORS), component.x - x, component.y - y)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 1.0
