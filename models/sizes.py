"""Which sizes of picture a model can make, and the released scripts' rule that chooses one. Needs no torch.

Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONGER_EDGE = 512
"""Of the released scripts. A model whose own size is smaller has that as its default."""

MAX_ASPECT = 8
"""Longer over shorter edge up to which a size is chosen. Training went to 16:9; beyond this a picture is a line."""

Size = tuple[int, int]


@dataclass(frozen=True)
class ModelGeometry:
    """What sizes a model can generate: each side a multiple of `multiple` px and at most `largest` px.

    Attributes:
        side: the size it is built for, a square's edge in px (`sample_size`).
    """

    multiple: int
    largest: int
    side: int

    @property
    def step(self) -> int:
        """Sides that are chosen are multiples of this, 32 px for SD3.5: what one token of MetaQuery's VLM sees."""
        return 2 * self.multiple

    @property
    def longer_edge(self) -> int:
        """Where none is asked for."""
        return max(self.step, min(LONGER_EDGE, self.side) // self.step * self.step)


def vae_factor(config: Mapping[str, Any]) -> int:
    """Pixels per latent along a side: 8 for SD3.5."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def geometry(folder: str | Path) -> ModelGeometry:
    """From the configs of VAE and transformer."""
    transformer = json.loads((Path(folder) / "transformer" / "config.json").read_text(encoding="utf-8"))
    vae = json.loads((Path(folder) / "vae" / "config.json").read_text(encoding="utf-8"))
    factor = vae_factor(vae)
    multiple = factor * transformer["patch_size"]
    return ModelGeometry(
        multiple, multiple * transformer["pos_embed_max_size"], factor * transformer["sample_size"]
    )


def check_size(model: ModelGeometry, height: int, width: int) -> None:
    """Raise ValueError for a size that the model cannot make."""
    if any(side < 1 or side % model.multiple or side > model.largest for side in (height, width)):
        raise ValueError(
            f"pictures of {height} x {width} px (height x width): this model makes sides that are multiples of "
            f"{model.multiple} and at most {model.largest}"
        )


def parse_aspect_ratio(text: str) -> tuple[int, int]:
    """Width and height of `W:H`. Raises ValueError."""
    found = re.fullmatch(r"([1-9]\d{0,4}):([1-9]\d{0,4})", text.strip())
    if not found:
        raise ValueError(f"aspect ratio {text!r}: write it as width:height, for example 16:9")
    return int(found[1]), int(found[2])


def longer_edge_size(width: float, height: float, longer_edge: int, step: int) -> Size:
    """The size nearest to the proportions width : height whose longer edge is `longer_edge`, a multiple of `step`.

    As the released scripts choose it, for the shorter edge then is rounded to a multiple of `step`; but at least one
    `step`, where they come to 0.

    Raises:
        ValueError: a longer edge off the grid, or proportions beyond `MAX_ASPECT`.
    """
    if longer_edge < step or longer_edge % step:
        raise ValueError(f"longer edge of {longer_edge} px: must be a multiple of {step}")
    _check_proportions(width, height)
    shorter = max(step, round(longer_edge * min(width, height) / max(width, height) / step) * step)
    return (shorter, longer_edge) if width >= height else (longer_edge, shorter)


def reference_sizes(
    pictures: Sequence[Size], drawn: Size, multiple: int, budget: int | None = None
) -> list[Size]:
    """At which size each reference is shown: the first at that of the picture that is drawn, every further one in its
    own proportions, with at most as many pixels as that.

    Args:
        pictures: the upright references' own sizes.
        multiple: of which the sides are multiples.
        budget: pixels of all references together; those after the first share equally what it leaves.

    Raises:
        ValueError: a budget that leaves a further reference less than one square of `multiple`, or proportions beyond
            `MAX_ASPECT`.
    """
    area, further = drawn[0] * drawn[1], len(pictures) - 1
    if further > 0 and budget is not None:
        area = min(area, (budget - area) // further)
        if area < multiple**2:
            raise ValueError(
                f"{further + 1} references in {budget} pixels: the first takes {drawn[0]} x {drawn[1]}, which leaves "
                f"{max(0, area)} pixels for each further one; raise the budget or give fewer references"
            )
    return [drawn, *(_fit(size, area, multiple) for size in pictures[1:])] if pictures else []


def _check_proportions(width: float, height: float) -> None:
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(
            f"proportions of {width:g} x {height:g} are beyond {MAX_ASPECT}:1, and no size is chosen for them: crop "
            "the picture, or give height and width"
        )


def _fit(size: Size, area: int, multiple: int) -> Size:
    """The proportions of `size` at no more than `area` pixels (at least one square), in whole multiples."""
    _check_proportions(size[1], size[0])
    scale = math.sqrt(area / (size[0] * size[1]))
    height, width = (max(multiple, round(side * scale / multiple) * multiple) for side in size)
    while height * width > area and max(height, width) > multiple:
        height, width = (height - multiple, width) if height > width else (height, width - multiple)
    return height, width


def choose_size(
    model: ModelGeometry,
    *,
    height: int | None = None,
    width: int | None = None,
    aspect_ratio: str | None = None,
    longer_edge: int | None = None,
    picture: tuple[int, int] | None = None,
) -> Size:
    """Height and width as given, else by the longer edge: in `aspect_ratio`, else as the picture to edit, else square.

    Args:
        picture: width and height of the upright picture to edit.

    Raises:
        ValueError: sizes that contradict each other or that the model cannot make.
    """
    if (height is None) != (width is None):
        raise ValueError(f"height {height} and width {width}: give both, or neither")
    if height is not None and width is not None:
        if aspect_ratio is not None or longer_edge is not None:
            raise ValueError("height and width leave nothing to aspect_ratio and longer_edge: give one pair")
        size = (height, width)
    else:
        proportions = parse_aspect_ratio(aspect_ratio) if aspect_ratio else picture or (1, 1)
        edge = model.longer_edge if longer_edge is None else longer_edge
        size = longer_edge_size(*proportions, edge, model.step)
    check_size(model, *size)
    return size
