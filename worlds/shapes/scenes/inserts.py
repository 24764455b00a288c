"""Edits that need two pictures: the second shows the object to add, which the instruction calls "it".

The second picture is a strip, wider and lower than the world's pictures. The transformer has one table of positions
for all references and nothing that says which is which, so two of one size would be the same to it in either order; the
ends of a strip lie where no picture of the world has a place, and the object stands at one of them.

Split: by the source scene, as of all edits. What the second picture shows is independent of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from worlds.shapes.scenes.edits import INSERT, Edit, edit_scene, in_split
from worlds.shapes.scenes.world import (
    BACKGROUNDS,
    MAX_OBJECTS,
    PLACES,
    Rng,
    Scene,
    Shape,
    place,
    sample_name,
    sample_scene,
)

STRIP = (16, 64)
"""Height and width of the second picture, px: as many pixels as the first has."""

END = 48.0
"""From an object at the left end of the strip to one at its right end, px."""


@dataclass(frozen=True)
class InsertExample:
    """A source scene, a strip with the object to add, the instruction, a right target and the prompt's metadata."""

    source: Scene
    strip: Scene
    instruction: str
    target: Scene
    metadata: dict[str, Any]


def sample_insert(rng: Rng, split: str) -> InsertExample:
    """A random insertion of a split, into one or two objects: at a stated place, or (half of them) at any."""
    rng = np.random.default_rng(rng)
    while True:
        source = sample_scene(rng, int(rng.integers(1, MAX_OBJECTS)))
        example = edit_scene(rng, source, "add") if in_split(source, split) else None
        if example is None:
            continue
        edit = replace(Edit.from_json(example.metadata["edit"])[0], kind=INSERT)
        item = edit.result
        assert item is not None
        where = "" if edit.anywhere else f" at the {PLACES[item.cell]}"
        metadata = {"edit": edit.to_json(source)}
        return InsertExample(source, _strip(rng, item), f"add it{where}", example.target, metadata)


def _strip(rng: np.random.Generator, item: Shape) -> Scene:
    """An object like `item` at one end of a strip of any background."""
    shown = place(rng, item.shape, item.color, 0)
    shown = replace(shown, x=shown.x + END * int(rng.integers(2)))
    return Scene(sample_name(rng, BACKGROUNDS), (shown,))
