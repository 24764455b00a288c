"""What the rules need from models: objects in pictures and the colour of an object; how two boxes stand.

A detector and a colour rule each have a `scoring` and a `label`. The first is a short name of what made boxes, scores
or colours: it is part of the name of every component in the log, so that results of different backends are never
mixed. The second says the same at length, with versions and sha256.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from PIL import Image

RELATIONS = ("left of", "right of", "above", "below")

SCORE_THRESHOLD = 0.3
"""Detections count only above this score."""
POSITION_MARGIN = 0.1
"""Share of the two boxes' summed sizes by which an offset is shrunk before a relation is read from it."""
POSITION_THRESHOLD = 0.5


@dataclass(frozen=True)
class Detection:
    """A box (x1, y1, x2, y2) in pixels, y running down, with its confidence in [0, 1] and perhaps a mask.

    Raises ValueError for a box that is not four finite numbers or a score outside [0, 1].
    """

    box: tuple[float, float, float, float]
    score: float
    mask: Any = None

    def __post_init__(self) -> None:
        if len(self.box) != 4 or not all(math.isfinite(v) for v in self.box):
            raise ValueError(f"box: expected four finite numbers x1 y1 x2 y2, got {self.box!r}")
        if not 0 <= self.score <= 1:
            raise ValueError(f"score: {self.score!r} is not in [0, 1]")


Detections: TypeAlias = dict[str, list[Detection]]
"""GenEval class name -> everything found of that class, unfiltered, in any order."""

NO_COLOR = ""
"""The answer for an object whose crop is empty: no colour at all, so whatever is asked is wrong."""


class Detector(Protocol):
    """Finds objects."""

    scoring: str
    label: str

    def detect(self, images: Sequence[Image.Image]) -> list[Detections]:
        """Objects in RGB images of any sizes; masks are bool arrays [H, W] of the image's own size.

        One that cannot count, since its score is at most `SCORE_THRESHOLD`, may lack its mask.

        A batch gives what its images give singly, up to rounding. Safe to call from several threads.
        """
        ...


@dataclass(frozen=True)
class ColorQuestion:
    """Which colour has this object? `image` is the whole RGB picture."""

    image: Image.Image
    class_name: str
    detection: Detection


class ColorClassifier(Protocol):
    """Names colours."""

    scoring: str
    label: str

    def classify(self, questions: Sequence[ColorQuestion]) -> list[str]:
        """One colour name for each question, or `NO_COLOR`. Safe to call from several threads."""
        ...


def relations(box: Sequence[float], target: Sequence[float]) -> set[str]:
    """The relations in which a box stands to a target: none, one, or two on a diagonal.

    The offset of the centres, shrunk on each axis by POSITION_MARGIN times the sum of both sizes, divided by
    the norm of the unshrunk offset, must exceed POSITION_THRESHOLD.
    """
    offsets, shrunk = [], []
    for low, high in ((0, 2), (1, 3)):
        offset = (box[low] + box[high] - target[low] - target[high]) / 2
        margin = POSITION_MARGIN * (abs(box[high] - box[low]) + abs(target[high] - target[low]))
        offsets.append(offset)
        shrunk.append(math.copysign(max(abs(offset) - margin, 0.0), offset))
    if all(abs(value) < 1e-3 for value in shrunk):
        return set()
    dx, dy = (value / math.hypot(*offsets) for value in shrunk)
    found = {
        "left of": dx < -POSITION_THRESHOLD,
        "right of": dx > POSITION_THRESHOLD,
        "above": dy < -POSITION_THRESHOLD,
        "below": dy > POSITION_THRESHOLD,
    }
    return {name for name, holds in found.items() if holds}
