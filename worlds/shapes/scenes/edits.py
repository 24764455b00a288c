"""Edit instructions with exact ground truth: recolour, add, remove, replace, move, background.

No two objects of a source scene, nor of its target, are alike in shape and colour, so "the red circle"
always names one object. Split: a hash of the source scene's content (half-pixel offsets and order apart)
holds out one scene in four; held-out scenes are never the source of a training edit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from worlds.shapes.scenes.captions import HELDOUT_SHARE, SPLITS, noun
from worlds.shapes.scenes.world import (
    BACKGROUNDS,
    COLORS,
    GRID,
    MAX_OBJECTS,
    PLACES,
    SHAPES,
    Rng,
    Scene,
    Shape,
    free_of,
    place,
    sample_name,
    sample_scene,
)

KINDS = ("recolour", "add", "remove", "replace", "move", "background")
INSERT = "insert"
"""An `add` whose object a second picture shows (`inserts.py`): judged as one, and not among the kinds of editing."""


@dataclass(frozen=True)
class Edit:
    """What an instruction asks for.

    `index` is the object of the source that changes (None for add, insert and background), `result` the object that
    must be there afterwards (None for remove and background), `background` the new background. `anywhere`:
    the place of `result` was not stated, and any free place is right.
    """

    kind: str
    index: int | None = None
    result: Shape | None = None
    background: str | None = None
    anywhere: bool = False

    def apply(self, source: Scene) -> Scene:
        """The target: for `anywhere`, one of the right ones."""
        objects = list(source.objects)
        if self.index is None:
            objects += [self.result] if self.result else []
        else:
            objects[self.index : self.index + 1] = [self.result] if self.result else []
        return Scene(self.background or source.background, tuple(objects))

    def to_json(self, source: Scene) -> dict[str, Any]:
        """The `edit` entry of a prompt's metadata: the source scene and the keys that apply to this kind."""
        record: dict[str, Any] = {"kind": self.kind, "source": source.to_json()}
        if self.index is not None:
            record["index"] = self.index
        if self.result is not None:
            record["result"] = self.result.to_json()
        if self.background is not None:
            record["background"] = self.background
        if self.anywhere:
            record["anywhere"] = True
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> tuple[Edit, Scene]:
        """The edit and its source scene. Raises ValueError for an unknown kind, name or object."""
        kind, source = record.get("kind"), Scene.from_json(record.get("source", {}))
        if kind not in (*KINDS, INSERT):
            raise ValueError(f"edit.kind: {kind!r} is not one of {', '.join((*KINDS, INSERT))}")
        index, result = record.get("index"), record.get("result")
        if (index is None) != (kind in ("add", "background", INSERT)):
            raise ValueError(f"edit.index: {index!r} does not suit an edit of kind {kind}")
        if index is not None and not 0 <= index < len(source.objects):
            raise ValueError(f"edit.index: {index} is not one of the source's {len(source.objects)} objects")
        if (result is None) != (kind in ("remove", "background")):
            raise ValueError(f"edit.result: {result!r} does not suit an edit of kind {kind}")
        background = record.get("background")
        if (background in BACKGROUNDS) != (kind == "background"):
            raise ValueError(f"edit.background: {background!r} does not suit an edit of kind {kind}")
        shape = None if result is None else Shape.from_json(result)
        return cls(kind, index, shape, background, bool(record.get("anywhere", False))), source


@dataclass(frozen=True)
class EditExample:
    """A source scene, the instruction, a right target, and the prompt's metadata (`{"edit": ...}`)."""

    source: Scene
    instruction: str
    target: Scene
    metadata: dict[str, Any]
    kind: str


def in_split(source: Scene, split: str) -> bool:
    """Whether edits of this scene belong to the split. Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    digest = hashlib.sha256(source.content.encode()).digest()
    return (digest[0] % HELDOUT_SHARE == 0) == (split == "heldout")


def instruction_of(edit: Edit, source: Scene) -> str:
    """The edit in words; where `anywhere` is right, without a place."""
    if edit.background is not None:
        return f"make the background {edit.background}"
    new = edit.result
    if edit.index is None:
        assert new is not None
        where = "" if edit.anywhere else f" at the {PLACES[new.cell]}"
        return f"add {noun(new.shape, new.color)}{where}"
    item = source.objects[edit.index]
    name = f"the {item.color} {item.shape}"
    if new is None:
        return f"remove {name}"
    if edit.kind == "move":
        return f"move {name} to the {PLACES[new.cell]}"
    if edit.kind == "recolour":
        return f"make {name} {new.color}"
    return f"replace {name} with {noun(new.shape, new.color)}"


def moved(item: Shape, cell: int) -> Shape:
    """An object in another cell, as far from its centre: so the target of a move follows from its words."""
    x = GRID[cell % 3] + item.x - GRID[item.cell % 3]
    y = GRID[cell // 3] + item.y - GRID[item.cell // 3]
    return replace(item, x=x, y=y)


def _pick(rng: np.random.Generator, source: Scene) -> tuple[int, Shape]:
    index = int(rng.integers(len(source.objects)))
    return index, source.objects[index]


def _recolour(rng: np.random.Generator, source: Scene) -> Edit:
    index, item = _pick(rng, source)
    color = sample_name(rng, (c for c in COLORS if c != item.color))
    return Edit("recolour", index, replace(item, color=color))


def _replace(rng: np.random.Generator, source: Scene) -> Edit:
    index, item = _pick(rng, source)
    shape = sample_name(rng, (s for s in SHAPES if s != item.shape))
    return Edit("replace", index, replace(item, shape=shape, color=sample_name(rng, COLORS)))


def _remove(rng: np.random.Generator, source: Scene) -> Edit:
    return Edit("remove", _pick(rng, source)[0])


def _background(rng: np.random.Generator, source: Scene) -> Edit:
    background = sample_name(rng, (b for b in BACKGROUNDS if b != source.background))
    return Edit("background", background=background)


def _free_cells(source: Scene, but: int | None = None) -> list[int]:
    """Cells that keep their distance from every object, the one at index `but` apart."""
    others = [item.cell for i, item in enumerate(source.objects) if i != but]
    return [cell for cell in range(len(PLACES)) if free_of(cell, others)]


def _move(rng: np.random.Generator, source: Scene) -> Edit | None:
    index, item = _pick(rng, source)
    cells = [cell for cell in _free_cells(source, index) if cell != item.cell]
    if not cells:
        return None
    return Edit("move", index, moved(item, cells[int(rng.integers(len(cells)))]))


def _add(rng: np.random.Generator, source: Scene) -> Edit | None:
    cells = _free_cells(source)
    if not cells:
        return None
    cell = cells[int(rng.integers(len(cells)))]
    item = place(rng, sample_name(rng, SHAPES), sample_name(rng, COLORS), cell)
    return Edit("add", result=item, anywhere=bool(rng.integers(2)))


_MAKERS: dict[str, Callable[[np.random.Generator, Scene], Edit | None]] = {
    "recolour": _recolour,
    "add": _add,
    "remove": _remove,
    "replace": _replace,
    "move": _move,
    "background": _background,
}
OBJECT_COUNTS = {"add": (1, MAX_OBJECTS - 1), "remove": (2, MAX_OBJECTS)}
"""Least and most objects of the source, where not 1 to 3: a target has one to three objects as well."""


def distinct(scene: Scene) -> bool:
    """Whether no two objects are alike in shape and colour."""
    return len({(item.shape, item.color) for item in scene.objects}) == len(scene.objects)


def edit_scene(rng: Rng, source: Scene, kind: str) -> EditExample | None:
    """One try at a random edit of a kind on a scene; None where it is not possible or makes two objects alike."""
    rng = np.random.default_rng(rng)
    edit = _MAKERS[kind](rng, source)
    if edit is None:
        return None
    target = edit.apply(source)
    if not distinct(target):
        return None
    return EditExample(source, instruction_of(edit, source), target, {"edit": edit.to_json(source)}, kind)


def sample_edit(rng: Rng, split: str, kind: str | None = None) -> EditExample:
    """A random edit of a split: kind (when None) evenly, then a scene on which it is possible."""
    rng = np.random.default_rng(rng)
    kind = sample_name(rng, KINDS) if kind is None else kind
    low, high = OBJECT_COUNTS.get(kind, (1, MAX_OBJECTS))
    while True:
        source = sample_scene(rng, int(rng.integers(low, high + 1)))
        example = edit_scene(rng, source, kind) if in_split(source, split) else None
        if example is not None:
            return example
