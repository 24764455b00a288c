"""The classical detector: components of a picture as GenEval detections, with graded confidence.

It stands where Mask2Former and CLIP stand on photographs. The classes are the four shapes and `background`,
which is always one detection whose colour is white, grey or black.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewards.geneval import Detection
from worlds.shapes.scenes.world import BACKGROUNDS, COLORS, SHAPES, SIZE
from worlds.shapes.scoring.components import Component, Picture, analyse, prototypes

TOLERANCE = np.array([0.012, 0.02, 0.009, 0.0042, 0.008])
"""One standard deviation of each moment for a shape that a person would still call that shape."""

MISFIT = (9.0, 45.0)
"""Squared distance to the nearest prototype at which confidence begins to fall, and at which it is 0."""

SHARE = (0.05, 0.95)
"""Share of likelihood up to which a component is not at all that shape, and from which on fully."""

AREA_RATIO = ((0.25, 0.6), (1.5, 2.5))
"""Area over the shape's own: confidence rises through the first pair and falls through the second."""

COLOR_DISTANCE = (30.0, 85.0)
"""RGB distance to a named colour up to which it is fully that colour, and from which on it is not at all."""

BACKGROUND_DISTANCE = (25.0, 60.0)


def falling(value: float, bounds: tuple[float, float]) -> float:
    """1 up to the lower bound, 0 from the upper bound on, linear between."""
    low, high = bounds
    return float(min(max((high - value) / (high - low), 0.0), 1.0))


def shape_scores(component: Component) -> dict[str, float]:
    """How much the component is each shape, in [0, 1]: its share of likelihood, and the best one's fit."""
    means, areas = prototypes()
    squared = (((component.moments - means) / TOLERANCE) ** 2).sum(axis=1)
    likelihood = np.exp(squared.min() - squared)
    fit = falling(float(squared.min()), MISFIT)
    ratios = component.area / areas
    size = [min(1 - falling(r, AREA_RATIO[0]), falling(r, AREA_RATIO[1])) for r in ratios]
    shares = [1 - falling(share, SHARE) for share in likelihood / likelihood.sum()]
    return {shape: shares[k] * fit * size[k] for k, shape in enumerate(SHAPES)}


def color_score(component: Component, color: str) -> float:
    """How much the component has a named colour, and that one throughout, in [0, 1]."""
    distance = float(np.linalg.norm(component.color - COLORS[color]))
    return falling(distance, COLOR_DISTANCE) * component.purity


def background_score(picture: Picture, background: str) -> float:
    """How much the picture's background has a named colour, in [0, 1]."""
    distance = float(np.linalg.norm(picture.background - BACKGROUNDS[background]))
    return falling(distance, BACKGROUND_DISTANCE)


@dataclass(frozen=True)
class Detected:
    """Detections of one image, and the colours behind them."""

    detections: dict[str, list[Detection]]
    picture: Picture

    def classify_color(self, class_name: str, detections: Sequence[Detection]) -> list[str]:
        """The named colour nearest to each detection's own, as GenEval's rules ask for it."""
        if class_name == "background":
            return [nearest(self.picture.background, BACKGROUNDS) for _ in detections]
        by_box = {component.box: component.color for component in self.picture.components}
        return [nearest(by_box[detection.box], COLORS) for detection in detections]


def detect(images: np.ndarray) -> list[Detected]:
    """Detect shapes in uint8 images [B, H, W, 3]; a component is one detection, of its likeliest class."""
    return [Detected(_detections(picture), picture) for picture in analyse(images)]


def _detections(picture: Picture) -> dict[str, list[Detection]]:
    found: dict[str, list[Detection]] = {}
    for component in picture.components:
        scores = shape_scores(component)
        best = max(scores, key=lambda shape: scores[shape])
        score = scores[best] * component.purity
        found.setdefault(best, []).append(Detection(component.box, score, component.mask))
    confidence = max(background_score(picture, name) for name in BACKGROUNDS)
    everything = (0.0, 0.0, float(SIZE), float(SIZE))
    found["background"] = [Detection(everything, confidence, ~picture.foreground)]
    return found


def nearest(color: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    """The name of the nearest RGB colour."""
    return min(names, key=lambda name: float(np.linalg.norm(color - names[name])))
