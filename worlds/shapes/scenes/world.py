"""Scenes of the shapes world: what can be on a 32 x 32 image, and how it is named.

A scene is a plain background with one to three objects. An object is a shape in a colour at a place. Centres
lie on a 3 x 3 grid of cells (8, 16 and 24 px), moved by at most half a pixel; two objects are never in
neighbouring cells, so they cannot overlap. Everything is sampled from a `numpy.random.Generator` alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np

SIZE = 32
"""Height and width of an image, in pixels."""

SHAPES = ("circle", "square", "triangle", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 16, 40),
    "orange": (255, 125, 0),
    "yellow": (250, 235, 10),
    "green": (16, 160, 60),
    "blue": (24, 64, 230),
    "purple": (160, 20, 210),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (242, 242, 242),
    "grey": (128, 128, 128),
    "black": (14, 14, 14),
}

MAX_OBJECTS = 3
GRID = (8.0, 16.0, 24.0)
JITTER = 0.5
JITTER_STEPS = 9
"""Offsets from the cell's centre are drawn from this many values in [-JITTER, JITTER] (1/8 px apart)."""

PLACES = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
"""Names of the nine cells; a cell is an index into this tuple, row by row."""

Rng: TypeAlias = np.random.Generator | int


@dataclass(frozen=True)
class Shape:
    """One object: shape name, colour name, centre (x to the right, y down) in pixels."""

    shape: str
    color: str
    x: float
    y: float

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape: {self.shape!r} is not one of {', '.join(SHAPES)}")
        if self.color not in COLORS:
            raise ValueError(f"color: {self.color!r} is not one of {', '.join(COLORS)}")

    @property
    def cell(self) -> int:
        """The grid cell nearest to the centre, as an index into PLACES."""
        column, row = (min(max(round(v / 8.0) - 1, 0), 2) for v in (self.x, self.y))
        return 3 * row + column

    def to_json(self) -> list[Any]:
        return [self.shape, self.color, self.x, self.y]

    @classmethod
    def from_json(cls, record: Sequence[Any]) -> Shape:
        """Inverse of `to_json`. Raises ValueError for a malformed record or an unknown name."""
        if len(record) != 4:
            raise ValueError(f"object: expected [shape, color, x, y], got {list(record)!r}")
        shape, color, x, y = record
        return cls(str(shape), str(color), float(x), float(y))


@dataclass(frozen=True)
class Scene:
    """A background colour name and the objects upon it."""

    background: str
    objects: tuple[Shape, ...]

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ValueError(f"background: {self.background!r} is not one of {', '.join(BACKGROUNDS)}")

    def to_json(self) -> dict[str, Any]:
        return {"background": self.background, "objects": [item.to_json() for item in self.objects]}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Scene:
        """Inverse of `to_json`. Raises ValueError when a key is absent or a value unknown."""
        missing = {"background", "objects"} - set(record)
        if missing:
            raise ValueError(f"scene: missing {', '.join(sorted(missing))} in {record!r}")
        return cls(str(record["background"]), tuple(Shape.from_json(item) for item in record["objects"]))

    @property
    def content(self) -> str:
        """The scene in words, without the half-pixel offsets and the order of objects: what splits go by."""
        items = sorted(f"{item.color} {item.shape} {PLACES[item.cell]}" for item in self.objects)
        return "; ".join([self.background, *items])


def cell_offset(first: int, second: int) -> tuple[int, int]:
    """Columns and rows from the second cell to the first."""
    return first % 3 - second % 3, first // 3 - second // 3


def free_of(cell: int, others: Iterable[int]) -> bool:
    """Whether an object in `cell` keeps a whole cell's distance from those in `others`."""
    return all(max(abs(d) for d in cell_offset(cell, other)) >= 2 for other in others)


@cache
def layouts(count: int) -> tuple[tuple[int, ...], ...]:
    """All ordered placements of `count` objects in cells that keep their distance."""
    return tuple(
        cells
        for cells in itertools.permutations(range(len(PLACES)), count)
        if all(free_of(cell, cells[:i]) for i, cell in enumerate(cells))
    )


def place(rng: np.random.Generator, shape: str, color: str, cell: int) -> Shape:
    """An object in a cell, off its centre by a random multiple of 1/8 px up to half a pixel."""
    offsets = rng.integers(JITTER_STEPS, size=2) * (2 * JITTER / (JITTER_STEPS - 1)) - JITTER
    return Shape(shape, color, GRID[cell % 3] + float(offsets[0]), GRID[cell // 3] + float(offsets[1]))


def sample_name(rng: np.random.Generator, names: Iterable[str]) -> str:
    options = tuple(names)
    return options[int(rng.integers(len(options)))]


def sample_layout(rng: np.random.Generator, count: int) -> tuple[int, ...]:
    options = layouts(count)
    return options[int(rng.integers(len(options)))]


def sample_scene(rng: Rng, count: int | None = None) -> Scene:
    """A random scene of `count` objects (1 to 3 when None), no two of them alike in shape and colour."""
    rng = np.random.default_rng(rng)
    count = int(rng.integers(1, MAX_OBJECTS + 1)) if count is None else count
    kinds = rng.choice(len(SHAPES) * len(COLORS), size=count, replace=False)
    names = tuple(COLORS)
    objects = tuple(
        place(rng, SHAPES[kind % len(SHAPES)], names[kind // len(SHAPES)], cell)
        for kind, cell in zip(kinds.tolist(), sample_layout(rng, count), strict=True)
    )
    return Scene(sample_name(rng, BACKGROUNDS), objects)
