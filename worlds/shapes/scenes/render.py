"""Antialiased drawing of scenes in numpy, and PIL pictures as arrays of that form.

An object is a small coverage mask (a sprite) blended over the background. Masks are made once for each shape
and sub-pixel offset and kept, so a scene costs a few tens of microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from worlds.shapes.scenes.world import BACKGROUNDS, COLORS, SIZE, Scene, Shape

SPRITE_RADIUS = 7
"""Half the side of a sprite, in whole pixels: larger than any shape's half extent plus one."""

SUPERSAMPLING = 8
COVERAGE_LEVELS = 16
"""Edge pixels take one of this many coverage steps, which keeps the pictures small as PNG."""

HALF_EXTENT: dict[str, tuple[float, float]] = {
    "circle": (5.0, 5.0),
    "square": (4.5, 4.5),
    "triangle": (5.5, 5.0),
    "cross": (5.5, 5.5),
}
"""Half width and half height of each shape around its centre, in pixels."""

CROSS_ARM = 1.75
"""Half the width of the cross's arms, in pixels."""


def inside(shape: str, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Whether points at offset (dx, dy) px from the centre belong to the shape (y runs down)."""
    width, height = HALF_EXTENT[shape]
    if shape == "circle":
        return dx**2 + dy**2 <= width**2
    box = (np.abs(dx) <= width) & (np.abs(dy) <= height)
    if shape == "square":
        return box
    if shape == "triangle":
        return box & (np.abs(dx) <= width * (dy + height) / (2 * height))
    return box & (np.minimum(np.abs(dx), np.abs(dy)) <= CROSS_ARM)


@lru_cache(maxsize=4096)
def sprite(shape: str, fraction_x: float, fraction_y: float) -> np.ndarray:
    """Coverage in [0, 1], float32 [2R, 2R, 1]; the centre is (fraction_x, fraction_y) px past the middle."""
    side = 2 * SPRITE_RADIUS * SUPERSAMPLING
    points = (np.arange(side) + 0.5) / SUPERSAMPLING - SPRITE_RADIUS
    mask = inside(shape, points[None, :] - fraction_x, points[:, None] - fraction_y)
    cells = mask.reshape(2 * SPRITE_RADIUS, SUPERSAMPLING, 2 * SPRITE_RADIUS, SUPERSAMPLING).mean(axis=(1, 3))
    coverage = (np.round(cells * COVERAGE_LEVELS) / COVERAGE_LEVELS).astype(np.float32)[..., None]
    coverage.flags.writeable = False
    return coverage


def _blend(canvas: np.ndarray, item: Shape, color: np.ndarray) -> None:
    """Blend one object into a float32 canvas [H, W, 3] in place; what lies outside the canvas is cut off."""
    left, top = int(np.floor(item.x)), int(np.floor(item.y))
    mask = sprite(item.shape, item.x - left, item.y - top)
    x0, y0 = left - SPRITE_RADIUS, top - SPRITE_RADIUS
    x1, y1 = x0 + mask.shape[1], y0 + mask.shape[0]
    cx0, cy0, cx1, cy1 = max(x0, 0), max(y0, 0), min(x1, SIZE), min(y1, SIZE)
    if cx0 >= cx1 or cy0 >= cy1:
        return
    mask = mask[cy0 - y0 : cy1 - y0, cx0 - x0 : cx1 - x0]
    window = canvas[cy0:cy1, cx0:cx1]
    window += mask * (color - window)


def centroid(item: Shape) -> tuple[float, float]:
    """Centre of mass of an object, px: its centre, but for the triangle, whose mass lies lower."""
    low = HALF_EXTENT["triangle"][1] / 3 if item.shape == "triangle" else 0.0
    return item.x, item.y + low


def render(scene: Scene) -> np.ndarray:
    """The scene as uint8 [H, W, 3]."""
    return render_batch([scene])[0]


def render_batch(scenes: Sequence[Scene]) -> np.ndarray:
    """The scenes as uint8 [B, H, W, 3]."""
    canvas = np.empty((len(scenes), SIZE, SIZE, 3), np.float32)
    for image, scene in zip(canvas, scenes, strict=True):
        image[:] = BACKGROUNDS[scene.background]
        for item in scene.objects:
            _blend(image, item, np.asarray(COLORS[item.color], np.float32))
    return np.round(canvas).astype(np.uint8)


def silhouette(item: Shape) -> np.ndarray:
    """The pixels of which an object covers at least half, bool [H, W]."""
    canvas = np.zeros((SIZE, SIZE, 3), np.float32)
    _blend(canvas, item, np.ones(3, np.float32))
    return canvas[..., 0] >= 0.5


def stack(images: Sequence[Image.Image]) -> np.ndarray:
    """Pictures as uint8 [B, H, W, 3]. Raises ValueError for a size that is not the world's."""
    for index, image in enumerate(images):
        if image.size != (SIZE, SIZE):
            raise ValueError(
                f"image {index} is {image.width} x {image.height} px, the shapes world {SIZE} x {SIZE}; "
                "set the recipe's height and width to that"
            )
    if not images:
        return np.empty((0, SIZE, SIZE, 3), np.uint8)
    return np.stack([np.asarray(image.convert("RGB"), np.uint8) for image in images])
