"""Questions on one picture of the shapes world, with answers that follow from the scene.

Every question has exactly one right answer: what two objects would answer is not asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from worlds.shapes.scenes.captions import (
    DIRECTIONS,
    OPPOSITE,
    Caption,
    noun,
    plural,
    sample_caption,
    sample_t2i,
)
from worlds.shapes.scenes.edits import KINDS, Edit, edit_scene, in_split
from worlds.shapes.scenes.world import (
    COLORS,
    PLACES,
    SHAPES,
    Scene,
    Shape,
    cell_offset,
    sample_name,
    sample_scene,
)

T2I_PROMPT = "Generate an image: {}"
"""The user text under which MetaQuery shows a caption (DESIGN section 4); an instruction it shows bare."""

_PRESENT_SHARE = 0.7
"""How often a counting question is about something that is there."""


@dataclass(frozen=True)
class Question:
    """One user text after the pictures, and its one right answer."""

    kind: str
    text: str
    answer: str


def scene_of_split(rng: np.random.Generator, split: str) -> Scene:
    """A scene whose content belongs to the split: half are drawn freely, half after a caption of the split."""
    while True:
        scene = sample_scene(rng) if rng.integers(2) else sample_t2i(rng, split)[1]
        if in_split(scene, split):
            return scene


def describe(background: str, objects: Sequence[Shape], unplaced: Shape | None = None) -> str:
    """All there is to say: objects in the order of the cells, then one of which the place is not known."""
    placed = sorted(objects, key=lambda item: item.cell)
    words = [f"{noun(item.shape, item.color)} at the {PLACES[item.cell]}" for item in placed]
    if unplaced is not None:
        words.append(noun(unplaced.shape, unplaced.color))
    return f"{' and '.join(words)} on {background}"


def describe_result(edit: Edit, source: Scene) -> str:
    """What an edit of a scene leads to, as far as its instruction says."""
    if edit.anywhere and edit.result is not None:
        return describe(source.background, source.objects, edit.result)
    target = edit.apply(source)
    return describe(target.background, target.objects)


def paraphrase(caption: Caption) -> str:
    """The same in other words: two objects change their order, and their relation turns round."""
    if len(caption.items) < 2:
        return caption.text
    relation = OPPOSITE[caption.relation] if caption.relation else None
    return Caption(caption.tag, caption.items[::-1], caption.count, relation, caption.background).text


def _once(values: Sequence[str]) -> list[str]:
    """The values that occur exactly once, in order."""
    counts = Counter(values)
    return [value for value in values if counts[value] == 1]


def _name(item: Shape) -> str:
    return f"{item.color} {item.shape}"


def _named_once(scene: Scene) -> list[Shape]:
    names = _once([_name(item) for item in scene.objects])
    return [item for item in scene.objects if _name(item) in names]


def _object(rng: np.random.Generator, objects: Sequence[Shape]) -> Shape:
    return objects[int(rng.integers(len(objects)))]


def _describe(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    return "Describe the picture.", describe(scene.background, scene.objects)


def _color(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    item = _object(rng, scene.objects)
    if rng.integers(2) and item.shape in _once([other.shape for other in scene.objects]):
        return f"What colour is the {item.shape}?", item.color
    return f"What colour is the object at the {PLACES[item.cell]}?", item.color


def _shape(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    item = _object(rng, scene.objects)
    if rng.integers(2) and item.color in _once([other.color for other in scene.objects]):
        return f"What shape is the {item.color} object?", item.shape
    return f"What shape is the object at the {PLACES[item.cell]}?", item.shape


def _count(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    item, present = _object(rng, scene.objects), rng.random() < _PRESENT_SHARE
    what = int(rng.integers(3))
    if what == 0:
        return "How many objects are there?", str(len(scene.objects))
    if what == 1:
        shape = item.shape if present else sample_name(rng, SHAPES)
        count = sum(other.shape == shape for other in scene.objects)
        return f"How many {plural(shape)} are there?", str(count)
    color = item.color if present else sample_name(rng, COLORS)
    count = sum(other.color == color for other in scene.objects)
    return f"How many {color} objects are there?", str(count)


def _where(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    named = _named_once(scene)
    if not named:
        return None
    item = _object(rng, named)
    return f"Where is the {_name(item)}?", PLACES[item.cell]


def _background(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    return "What colour is the background?", scene.background


def _exists(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    """Yes and no evenly; what is not there differs from something that is in shape or in colour alone."""
    item, there = _object(rng, scene.objects), bool(rng.integers(2))
    shape, color = item.shape, item.color
    names = {_name(other) for other in scene.objects}
    while not there and f"{color} {shape}" in names:
        if rng.integers(2):
            shape, color = sample_name(rng, SHAPES), item.color
        else:
            shape, color = item.shape, sample_name(rng, COLORS)
    return f"Is there {noun(shape, color)}?", _yes(there)


def _attribute(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    shapes = _once([item.shape for item in scene.objects])
    items = [item for item in scene.objects if item.shape in shapes]
    if not items:
        return None
    item, right = _object(rng, items), bool(rng.integers(2))
    color = item.color if right else sample_name(rng, (c for c in COLORS if c != item.color))
    return f"Is the {item.shape} {color}?", _yes(right)


def _relation(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    """Yes and no evenly. An offset of one cell is neither left nor not left by GenEval's rule: not asked."""
    named = _named_once(scene)
    if len(named) < 2:
        return None
    first, second = (named[i] for i in rng.permutation(len(named))[:2])
    offset, holds = cell_offset(first.cell, second.cell), bool(rng.integers(2))
    axes = {relation: (0 if wanted[0] else 1) for relation, wanted in DIRECTIONS.items()}
    options = [
        relation
        for relation, axis in axes.items()
        if abs(offset[axis]) != 1 and (offset[axis] == DIRECTIONS[relation][axis]) == holds
    ]
    return f"Is the {_name(first)} {sample_name(rng, options)} the {_name(second)}?", _yes(holds)


def _result(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    """MetaQuery's editing turn: picture and bare instruction. The answer describes the edited picture."""
    if len({_name(item) for item in scene.objects}) < len(scene.objects):
        return None
    example = edit_scene(rng, scene, sample_name(rng, KINDS))
    if example is None or not 1 <= len(example.target.objects) <= 3:
        return None
    edit, _ = Edit.from_json(example.metadata["edit"])
    return example.instruction, describe_result(edit, scene)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


_MAKERS: dict[str, Callable[[np.random.Generator, Scene], tuple[str, str] | None]] = {
    "describe": _describe,
    "colour": _color,
    "shape": _shape,
    "count": _count,
    "where": _where,
    "background": _background,
    "exists": _exists,
    "attribute": _attribute,
    "relation": _relation,
    "result": _result,
}
SCENE_KINDS = tuple(_MAKERS)


def scene_question(rng: np.random.Generator, scene: Scene, kind: str) -> Question | None:
    """A question of a kind on a scene; None where the scene allows none (or this try found none)."""
    made = _MAKERS[kind](rng, scene)
    return None if made is None else Question(kind, *made)


def caption_question(rng: np.random.Generator, split: str) -> Question:
    """MetaQuery's text-to-image turn, without a picture. The answer says the caption in other words."""
    caption = sample_caption(rng, split)
    return Question("caption", T2I_PROMPT.format(caption.text), paraphrase(caption))
