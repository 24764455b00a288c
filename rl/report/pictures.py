"""Single pictures out of the grids a run has drawn, as data URIs, each stored once."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from rl.report.reading import Notes, Record, number, read_object

LOSSLESS_COLORS = 2048
"""Pictures of no more colours than this are kept without loss, which is small then: those enlarged from few pixels."""
QUALITY = 82


@dataclass
class Shelf:
    """Data URIs by number. The reference of an edit is the same at every step and is kept once."""

    uris: list[str] = field(default_factory=list)
    size: int = 0
    _numbers: dict[str, int] = field(default_factory=dict)

    def add(self, picture: Image.Image) -> int:
        """The number of a picture."""
        uri = "data:image/webp;base64," + base64.b64encode(_webp(picture)).decode()
        if uri not in self._numbers:
            self._numbers[uri] = len(self.uris)
            self.uris.append(uri)
            self.size += len(uri)
        return self._numbers[uri]


@dataclass(frozen=True)
class Cut:
    """One sample of a grid; `picture` and `reference` are numbers on the shelf."""

    prompt: str
    seed: str
    reward: float | None
    picture: int
    reference: int | None


def cut_grid(path: Path, shelf: Shelf, notes: Notes) -> tuple[Record, list[Cut]] | None:
    """The index of a grid and its samples; None with a note when the grid or its index cannot be read."""
    index = read_object(path.with_suffix(".json"), notes)
    where = f"{path.parent.name}/{path.name}"
    if index is None:
        return None
    try:
        with Image.open(path) as opened:
            grid = opened.convert("RGB")
        return index, [_cut(sample, grid, shelf) for sample in index["samples"]]
    except (OSError, AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
        notes.append(f"{where} cannot be cut into pictures ({type(error).__name__}: {error})")
        return None


def _cut(sample: Record, grid: Image.Image, shelf: Shelf) -> Cut:
    reference = sample.get("reference_box")
    return Cut(
        prompt=str(sample["prompt"]),
        seed=str(sample["seed"]),  # a JavaScript number would lose its last digits
        reward=number(sample.get("reward")),
        picture=shelf.add(grid.crop(_box(sample["box"], grid))),
        reference=None if reference is None else shelf.add(grid.crop(_box(reference, grid))),
    )


def _box(value: Any, grid: Image.Image) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = (int(edge) for edge in value)
    if not (0 <= x0 < x1 <= grid.width and 0 <= y0 < y1 <= grid.height):
        raise ValueError(f"box {value} lies outside of the picture")
    return x0, y0, x1, y1


def _webp(picture: Image.Image) -> bytes:
    few = picture.getcolors(LOSSLESS_COLORS) is not None
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", lossless=few, quality=QUALITY)
    return buffer.getvalue()
