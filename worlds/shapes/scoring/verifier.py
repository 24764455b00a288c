"""The edit verifier: was the instruction carried out, and was the rest left alone? From exact ground truth.

    score = instruction x preservation, each in [0, 1]

It stands where EditReward or GPT-4.1 stand on photographs. It compares the components of the result with the
source *scene* rather than with the source picture, which is exact and immune to what a codec does to a
picture. Every term falls smoothly from 1 to 0, and each one that the instruction asks for is 0 in the source
itself, so an edit that changes nothing scores 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from worlds.shapes.scenes.edits import Edit
from worlds.shapes.scenes.render import centroid, silhouette
from worlds.shapes.scenes.world import Scene, Shape
from worlds.shapes.scoring.components import Component, Picture
from worlds.shapes.scoring.detector import background_score, color_score, falling, shape_scores

PLACE_DISTANCE = (1.75, 5.0)
"""Distance of centroids, px, up to which an object is at its place, and from which on it is elsewhere."""

REACH = 6.5
"""A component whose centroid is within this distance, px, of an object's is taken for that object."""

RESIDUE = (0.05, 0.5)
"""Share of a vacated place that still differs from the background: fully vacated up to, occupied from."""

SURPLUS_FACTOR = 0.5
"""Preservation is multiplied by this for each object that nobody asked for."""


class EditScore(NamedTuple):
    """`instruction`: how far the edit was carried out; `preservation`: how far the rest is as it was."""

    instruction: float
    preservation: float

    @property
    def score(self) -> float:
        return self.instruction * self.preservation


def verify(picture: Picture, edit: Edit, source: Scene) -> EditScore:
    """Judge the analysed result of an edit of a scene."""
    changed = None if edit.index is None else source.objects[edit.index]
    kept = [item for i, item in enumerate(source.objects) if i != edit.index]
    free = list(picture.components)
    matches = [_take(free, item) for item in kept]
    new = _take_new(free, changed, edit)
    taken = [component for component in (*matches, new) if component is not None]

    if edit.background is not None:
        instruction = background_score(picture, edit.background)
    elif changed is not None and edit.kind == "remove":
        instruction = _vacated(picture, changed, taken)
    else:
        instruction = _carried_out(new, changed, edit)
        if changed is not None and edit.kind == "move":
            # A copy at the new place is half a move.
            instruction *= 0.5 + 0.5 * _vacated(picture, changed, taken)

    likenesses = [_likeness(component, item) for component, item in zip(matches, kept, strict=True)]
    surplus = sum(changed is None or _distance(component, changed) > REACH for component in free)
    preservation = SURPLUS_FACTOR**surplus * (float(np.mean(likenesses)) if likenesses else 1.0)
    if edit.background is None:
        preservation *= background_score(picture, source.background)
    return EditScore(instruction, preservation)


def _carried_out(component: Component | None, before: Shape | None, edit: Edit) -> float:
    """How far a component is the object asked for.

    The mean over the attributes (shape, colour) that had to change, times those that had to stay, times its
    place. `before` is None for a new object, of which both attributes were asked for.
    """
    if component is None or edit.result is None:
        return 0.0
    after = edit.result
    shape, color = shape_scores(component)[after.shape], color_score(component, after.color)
    place = 1.0 if edit.anywhere else _place(component, after)
    new_shape, new_color = (
        before is None or before.shape != after.shape,
        before is None or before.color != after.color,
    )
    if new_shape and new_color:
        return place * (shape + color) / 2
    return place * shape * color


def _likeness(component: Component | None, item: Shape) -> float:
    """How much a component is an object in shape, colour and place."""
    if component is None:
        return 0.0
    shape, color = shape_scores(component)[item.shape], color_score(component, item.color)
    return shape * color * _place(component, item)


def _vacated(picture: Picture, item: Shape, taken: Iterable[Component]) -> float:
    """How empty the place of an object is, pixels of objects that belong elsewhere apart."""
    place = silhouette(item)
    others = np.zeros_like(place)
    for component in taken:
        others |= component.mask
    left = place & picture.foreground & ~ndimage.binary_dilation(others)
    return falling(np.count_nonzero(left) / np.count_nonzero(place), RESIDUE)


def _take(free: list[Component], item: Shape) -> Component | None:
    """Take the component nearest to an object's place out of the free ones; None when none is in reach."""
    nearest = min(free, key=lambda component: _distance(component, item), default=None)
    if nearest is None or _distance(nearest, item) > REACH:
        return None
    _drop(free, nearest)
    return nearest


def _take_new(free: list[Component], changed: Shape | None, edit: Edit) -> Component | None:
    """Take the component that stands for the object asked for out of the free ones, if there is one."""
    if edit.result is None:
        return None
    if not edit.anywhere:
        return _take(free, edit.result)
    best = max(free, key=lambda component: _carried_out(component, changed, edit), default=None)
    if best is not None:
        _drop(free, best)
    return best


def _drop(free: list[Component], component: Component) -> None:
    # By identity: components hold arrays, which have no single truth value when compared.
    free[:] = [other for other in free if other is not component]


def _distance(component: Component, item: Shape) -> float:
    x, y = centroid(item)
    return math.hypot(component.x - x, component.y - y)


def _place(component: Component, item: Shape) -> float:
    return falling(_distance(component, item), PLACE_DISTANCE)
