"""Finding objects in a picture: background by median, objects by connected components, shapes by moments.

A picture is smoothed; its background is the median of all pixels (objects never cover half of it), and what
differs clearly from it falls into connected components. A component has a colour (the mean of its core) and a
shape, read from central moments up to the fourth order. Smoothing and soft edges let all of it bear the noise
that the last SDE steps leave in a rollout.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from worlds.shapes.scenes.render import render_batch
from worlds.shapes.scenes.world import SHAPES, SIZE, Scene, Shape

FOREGROUND_DISTANCE = 68.0
"""Euclidean RGB distance (0 to 441) from the background at which a smoothed pixel belongs to an object."""

MIN_AREA = 14
"""Components of fewer pixels are specks, not objects; the smallest shape covers 53."""

EDGE = (0.25, 0.75)
"""Coverage of a pixel rises from 0 to 1 while its contrast rises through these shares of the core's."""

CORE = 0.85
"""Pixels with at least this share of the core's contrast give a component its colour."""


@dataclass(frozen=True)
class Component:
    """One blob.

    x, y: centroid, px. area: soft, px². color: mean RGB of its core, 0 to 255. purity: share of the
    core that is near that colour. moments: see `moments`. box: x1 y1 x2 y2, px. mask: bool [H, W].
    """

    x: float
    y: float
    area: float
    color: np.ndarray
    purity: float
    moments: np.ndarray
    box: tuple[float, float, float, float]
    mask: np.ndarray


@dataclass(frozen=True)
class Picture:
    """What was found: `background` RGB, `foreground` bool [H, W], and the components, largest first."""

    background: np.ndarray
    foreground: np.ndarray
    components: tuple[Component, ...]


def analyse(images: np.ndarray) -> list[Picture]:
    """Find the objects in uint8 images [B, H, W, 3]."""
    smooth = _smooth(images.astype(np.float32))
    backgrounds = np.median(smooth.reshape(len(images), SIZE * SIZE, 3), axis=1)
    contrast = np.linalg.norm(smooth - backgrounds[:, None, None], axis=-1)
    foreground = contrast > FOREGROUND_DISTANCE
    return [
        Picture(backgrounds[b], foreground[b], _components(smooth[b], contrast[b], foreground[b]))
        for b in range(len(images))
    ]


def moments(weight: np.ndarray) -> np.ndarray:
    """Shape in five numbers that do not change with place and size, from coverage weights [h, w].

    With z = x + iy from the centroid, in units of sqrt(area): the means of |z|², Re z², Re z⁴ and of Im z³
    and Im z⁴. Circle: |z|² least, the rest 0; square: Re z⁴ < 0; cross: Re z⁴ > 0; triangle: Im z³ > 0. What
    is stretched or askew differs from all four.
    """
    share = weight / weight.sum()
    ys, xs = np.indices(weight.shape)
    z = (xs - (share * xs).sum()) + 1j * (ys - (share * ys).sum())
    square = z * z / weight.sum()
    fourth = (share * square * square).sum()
    third = (share * square * z).sum() / np.sqrt(weight.sum())
    return np.array(
        [(share * np.abs(square)).sum(), (share * square).sum().real, third.imag, fourth.real, fourth.imag]
    )


@cache
def prototypes() -> tuple[np.ndarray, np.ndarray]:
    """Moments [K, 5] and soft areas [K] of the clean shapes, in the order of SHAPES."""
    clean = render_batch([Scene("black", (Shape(shape, "yellow", 16.0, 16.0),)) for shape in SHAPES])
    found = [picture.components[0] for picture in analyse(clean)]
    return np.stack([c.moments for c in found]), np.array([c.area for c in found])


def _smooth(images: np.ndarray) -> np.ndarray:
    """Binomial filter (1 2 1) / 4 along both axes, edges repeated."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    return (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 16


def _components(smooth: np.ndarray, contrast: np.ndarray, foreground: np.ndarray) -> tuple[Component, ...]:
    labels, count = ndimage.label(foreground)
    found = []
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels, count), start=1):
        window = (
            slice(max(rows.start - 1, 0), rows.stop + 1),
            slice(max(columns.start - 1, 0), columns.stop + 1),
        )
        part = labels[window]
        if np.count_nonzero(part == label) >= MIN_AREA:
            # The rim of half-covered pixels below the threshold belongs to the blob as well.
            own = np.where((part == label) | (part == 0), contrast[window], 0.0)
            found.append(_describe(smooth[window], own, window))
    return tuple(sorted(found, key=lambda c: -c.area))


def _describe(colors: np.ndarray, contrast: np.ndarray, window: tuple[slice, slice]) -> Component:
    level = np.sort(contrast, axis=None)[-MIN_AREA // 2]
    core = colors[contrast > CORE * level]
    color = core.mean(axis=0)
    low, high = EDGE
    weight = np.clip((contrast / level - low) / (high - low), 0.0, 1.0)
    area = float(weight.sum())
    top, left = window[0].start, window[1].start
    ys, xs = np.nonzero(weight > 0.5)
    x1, y1, x2, y2 = left + xs.min(), top + ys.min(), left + xs.max() + 1, top + ys.max() + 1
    rows, columns = np.indices(weight.shape) + 0.5
    mask = np.zeros((SIZE, SIZE), bool)
    mask[window] = weight > 0.5
    return Component(
        x=left + float((weight * columns).sum()) / area,
        y=top + float((weight * rows).sum()) / area,
        area=area,
        color=color,
        purity=float((np.linalg.norm(core - color, axis=-1) < FOREGROUND_DISTANCE).mean()),
        moments=moments(weight),
        box=(float(x1), float(y1), float(x2), float(y2)),
        mask=mask,
    )
