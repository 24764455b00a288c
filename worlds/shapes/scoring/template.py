"""The second scorer: template matching against the renderer, for evaluation only.

A gain that training shows could be an exploit of its own reward's detector. So evaluation scores both tasks
again by another method, which shares nothing with the detector and the verifier: every shape in every colour
at every place is a hypothesis that predicts pixels, drawn by the renderer, and the best predictions win. No
smoothing, components or moments, and for edits no partial likeness: an object is found or it is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from rewards.geneval import Detection
from worlds.shapes.scenes.edits import Edit
from worlds.shapes.scenes.render import HALF_EXTENT, SPRITE_RADIUS, sprite
from worlds.shapes.scenes.world import BACKGROUNDS, COLORS, SHAPES, SIZE, Scene, Shape
from worlds.shapes.scoring.rewards import EditShapes, GenEvalShapes
from worlds.shapes.scoring.verifier import EditScore

FIRST, LAST = 4, 28
"""Range of whole-pixel centres that are searched, both ends included."""

PHASES = (0.0, 0.5)
"""Offsets within a pixel at which each shape is tried, in x and y."""

EXPLAINED = (0.3, 0.65)
"""Share of the local contrast that must be explained for confidence to begin to rise, and for it to be 1."""

FOUND = 0.3
"""Confidence above which an object counts as found in an edit, as in GenEval's rules."""

SEPARATION = 9.5
"""A hypothesis whose centre is nearer than this, px, to a better one would overlap it, and is dropped."""

MATCH_DISTANCE = 3.5
"""An object within this distance, px, of a place is at it; within twice that, the place is not empty."""

BACKGROUND_MARGIN = 80.0
"""RGB distance within which a pixel shows a named background."""
BACKGROUND_SHARE = 0.4
"""Least share of the pixels that must show the background."""


@dataclass(frozen=True)
class Match:
    """An object found: what, where (centre, px) and how surely, in [0, 1]."""

    shape: str
    color: str
    x: float
    y: float
    confidence: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        width, height = HALF_EXTENT[self.shape]
        return self.x - width, self.y - height, self.x + width, self.y + height


@dataclass(frozen=True)
class Matched:
    """What a picture holds: its background's name and share of pixels, and its objects, surest first."""

    background: str
    background_share: float
    objects: tuple[Match, ...]

    @property
    def detections(self) -> dict[str, list[Detection]]:
        """In the form that GenEval's rules read."""
        found: dict[str, list[Detection]] = {}
        for item in self.objects:
            found.setdefault(item.shape, []).append(Detection(item.box, item.confidence))
        if self.background_share >= BACKGROUND_SHARE:
            found["background"] = [Detection((0.0, 0.0, float(SIZE), float(SIZE)), 1.0)]
        return found

    def classify_color(self, class_name: str, detections: Sequence[Detection]) -> list[str]:
        """The colour with which each detection was found."""
        if class_name == "background":
            return [self.background for _ in detections]
        colors = {(item.shape, item.box): item.color for item in self.objects}
        return [colors[class_name, detection.box] for detection in detections]


@cache
def _templates() -> tuple[np.ndarray, list[tuple[str, float, float]]]:
    """Coverage masks [N, S*S], float32, and the shape and sub-pixel offset of each."""
    names = [(shape, dx, dy) for shape in SHAPES for dx in PHASES for dy in PHASES]
    return np.stack([sprite(*name).ravel() for name in names]), names


def match(image: np.ndarray) -> Matched:
    """Search one picture, uint8 [H, W, 3], for shapes of every colour.

    A hypothesis (shape, colour, centre) predicts pixels; its gain is by how much it lowers the sum of squared
    errors below that of a plain background: least squares, so maximum likelihood under white noise.
    """
    pixels = image.astype(np.float32)
    near = {
        name: float((np.linalg.norm(pixels - rgb, axis=-1) < BACKGROUND_MARGIN).mean())
        for name, rgb in BACKGROUNDS.items()
    }
    background = max(near, key=lambda name: near[name])
    # Beyond the edge lies more background, which predicts nothing.
    margin = ((SPRITE_RADIUS, SPRITE_RADIUS), (SPRITE_RADIUS, SPRITE_RADIUS), (0, 0))
    offset = np.pad(pixels - np.asarray(BACKGROUNDS[background], np.float32), margin)
    return Matched(background, near[background], _peaks(offset, background))


def _gains(offset: np.ndarray, background: str) -> np.ndarray:
    """Gain [colour, template, y, x] of every hypothesis, from pixels less background [H', W', 3]."""
    templates, _ = _templates()
    energy = (templates**2).sum(axis=1)[:, None]
    side, count = 2 * SPRITE_RADIUS, LAST - FIRST + 1
    gains = np.empty((len(COLORS), len(templates), count * count), np.float32)
    for k, rgb in enumerate(COLORS.values()):
        step = np.asarray(rgb, np.float32) - np.asarray(BACKGROUNDS[background], np.float32)
        windows = np.lib.stride_tricks.sliding_window_view(offset @ step, (side, side))
        windows = windows[FIRST : LAST + 1, FIRST : LAST + 1].reshape(count * count, -1)
        gains[k] = 2 * templates @ windows.T - energy * (step @ step)
    return gains.reshape(len(COLORS), len(templates), count, count)


def _peaks(offset: np.ndarray, background: str) -> tuple[Match, ...]:
    """Objects: the hypothesis of greatest gain first, each blotting out what is near it."""
    gains, names, colors = _gains(offset, background), _templates()[1], tuple(COLORS)
    ys, xs = np.mgrid[FIRST : LAST + 1, FIRST : LAST + 1]
    low, high = EXPLAINED
    found: list[Match] = []
    while gains.max() > 0:
        kind, template, row, column = np.unravel_index(int(gains.argmax()), gains.shape)
        shape, dx, dy = names[int(template)]
        x, y = FIRST + int(column) + dx, FIRST + int(row) + dy
        color, box = colors[int(kind)], (FIRST + int(row), FIRST + int(column))
        confidence = (_explained(offset, background, color, int(template), box) - low) / (high - low)
        if confidence > 0:
            found.append(Match(shape, color, x, y, min(confidence, 1.0)))
        gains[:, :, np.hypot(xs - x, ys - y) < SEPARATION] = -1.0
    return tuple(sorted(found, key=lambda item: -item.confidence))


def _explained(
    offset: np.ndarray, background: str, color: str, template: int, corner: tuple[int, int]
) -> float:
    """Share of the squared contrast under and around a hypothesis that it explains; 1 on a clean render.

    corner: row and column of the template's top left pixel in `offset`.
    """
    cover = _templates()[0][template].reshape(2 * SPRITE_RADIUS, -1)
    around = ndimage.binary_dilation(cover > 0)
    step = np.asarray(COLORS[color], np.float32) - np.asarray(BACKGROUNDS[background], np.float32)
    top, left = corner
    seen = offset[top : top + 2 * SPRITE_RADIUS, left : left + 2 * SPRITE_RADIUS]
    error = ((seen - cover[..., None] * step) ** 2)[around].sum()
    return 1.0 - float(error / (seen**2)[around].sum())


def judge_edit(matched: Matched, edit: Edit, source: Scene) -> EditScore:
    """Grades of an edit's result; objects count as found or not."""
    found = [item for item in matched.objects if item.confidence > FOUND]
    kept = [item for i, item in enumerate(source.objects) if i != edit.index]
    preserved = [_find(found, item, anywhere=False) for item in kept]
    background = matched.background if matched.background_share >= BACKGROUND_SHARE else None
    instruction = float(background == edit.background) if edit.background else 1.0
    if edit.result is not None:
        instruction = float(_find(found, edit.result, anywhere=edit.anywhere))
    if edit.index is not None:
        old = source.objects[edit.index]
        left = [item for item in found if math.hypot(item.x - old.x, item.y - old.y) < 2 * MATCH_DISTANCE]
        instruction *= not left
    preservation = float(np.mean(preserved)) if preserved else 1.0
    if not edit.background:
        preservation *= background == source.background
    return EditScore(instruction, preservation * 0.5 ** len(found))


def _find(found: list[Match], item: Shape, *, anywhere: bool) -> bool:
    """Take an object out of the found ones, if it is there."""
    for other in found:
        near = anywhere or math.hypot(other.x - item.x, other.y - item.y) < MATCH_DISTANCE
        if near and (other.shape, other.color) == (item.shape, item.color):
            found.remove(other)
            return True
    return False


class TemplateGenEval(GenEvalShapes):
    """GenEval on the objects that template matching finds."""

    def find(self, images: np.ndarray) -> Sequence[Matched]:
        """See `GenEvalShapes.find`."""
        return [match(image) for image in images]


class TemplateEdit(EditShapes):
    """Edits judged by template matching: instruction x preservation, as in `EditShapes` but found or not."""

    def judge(self, images: np.ndarray, edits: Sequence[tuple[Edit, Scene]]) -> list[EditScore]:
        """See `EditShapes.judge`."""
        return [judge_edit(match(image), *edit) for image, edit in zip(images, edits, strict=True)]
