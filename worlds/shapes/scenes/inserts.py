"""Edits that need two pictures: the second shows the object to add, which the instruction calls "it".

The second picture holds that object alone, in the middle of any background. Split: by the source scene, as of all
edits; what the second picture shows is independent of it.
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
    place,
    sample_name,
    sample_scene,
)


@dataclass(frozen=True)
class InsertExample:
    """A source scene, one that shows the object to add, the instruction, a right target, the prompt's metadata."""

    source: Scene
    shown: Scene
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
        alone = place(rng, item.shape, item.color, PLACES.index("center"))
        shown = Scene(sample_name(rng, BACKGROUNDS), (alone,))
        metadata = {"edit": edit.to_json(source)}
        return InsertExample(source, shown, f"add it{where}", example.target, metadata)
