"""What a detector hands to the rules, and in which relation two boxes stand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

RELATIONS = ("left of", "right of", "above", "below")

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
