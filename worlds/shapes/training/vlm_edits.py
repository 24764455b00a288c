"""Questions on two pictures, source and result of an edit, as an edit reward sees them.

The result may be right, untouched, the result of another instruction, or right with something changed besides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from rewards.editreward.settings import PLACEHOLDER, RUBRIC
from worlds.shapes.scenes.edits import (
    KINDS,
    OBJECT_COUNTS,
    Edit,
    EditExample,
    distinct,
    edit_scene,
    in_split,
    instruction_of,
)
from worlds.shapes.scenes.world import MAX_OBJECTS, Scene, sample_name
from worlds.shapes.training.vlm_questions import SCENE_KINDS, Question, scene_of_split, scene_question

OUTCOMES = {"right": 0.35, "untouched": 0.1, "wrong": 0.15, "other": 0.1, "extra": 0.3}
"""How often the result is which: `wrong` is another edit of the same kind, `other` of any kind, `extra` the right
one and another one upon it."""

LEAD = RUBRIC.partition(" How well ")[0]
"""How an edit reward's user text begins: both pictures and the instruction."""


@dataclass(frozen=True)
class EditPair:
    """`instruction` is what `edit` was asked for on the source; `done` is the only edit that the result shows.

    `done` is None where the result shows none (`untouched`) or two (`extra`).
    """

    source: Scene
    result: Scene
    instruction: str
    edit: Edit
    done: Edit | None
    outcome: str


def sample_pair(rng: np.random.Generator, split: str) -> EditPair:
    """A pair of pictures that both belong to the split. The outcome is drawn first, so every split has its shares."""
    outcome = tuple(OUTCOMES)[int(rng.choice(len(OUTCOMES), p=list(OUTCOMES.values())))]
    while True:
        source = scene_of_split(rng, split)
        asked = _edit(rng, source, sample_name(rng, KINDS))
        if asked is None:
            continue
        edit = _edit_of(asked)
        result = asked.target
        done: Edit | None = edit
        if outcome == "untouched":
            result, done = source, None
        elif outcome != "right":
            kind = asked.kind if outcome == "wrong" else sample_name(rng, KINDS)
            second = _edit(rng, asked.target if outcome == "extra" else source, kind)
            if second is None or second.instruction == asked.instruction:
                continue
            result, done = second.target, None if outcome == "extra" else _edit_of(second)
        if in_split(result, split):
            return EditPair(source, result, asked.instruction, edit, done, outcome)


def _edit(rng: np.random.Generator, source: Scene, kind: str) -> EditExample | None:
    low, high = OBJECT_COUNTS.get(kind, (1, MAX_OBJECTS))
    possible = low <= len(source.objects) <= high and distinct(source)
    return edit_scene(rng, source, kind) if possible else None


def _edit_of(example: EditExample) -> Edit:
    return Edit.from_json(example.metadata["edit"])[0]


def _contents(scene: Scene) -> set[tuple[str, str, int]]:
    return {(item.shape, item.color, item.cell) for item in scene.objects}


def carried_out(edit: Edit, source: Scene, result: Scene) -> bool:
    """Whether the result shows what the instruction asked for, whatever else it shows."""
    if edit.background is not None:
        return result.background == edit.background
    changed = None if edit.index is None else source.objects[edit.index]
    found = _contents(result)
    cells = {item.cell for item in result.objects}
    if edit.result is None:
        return changed is not None and changed.cell not in cells
    wanted = edit.result
    if changed is not None and edit.kind == "move" and changed.cell in cells:
        return False
    if edit.anywhere:
        return any(
            (shape, color) == (wanted.shape, wanted.color) for shape, color, _ in found - _contents(source)
        )
    return (wanted.shape, wanted.color, wanted.cell) in found


def rest_kept(edit: Edit, source: Scene, result: Scene) -> bool:
    """Whether everything but what the instruction is about is as it was, and nothing came that nobody asked for.

    As for the verifier, one new object, right or wrong, stands for an object asked for at no stated place.
    """
    if edit.background is None and result.background != source.background:
        return False
    found = _contents(result)
    kept = {(item.shape, item.color, item.cell) for i, item in enumerate(source.objects) if i != edit.index}
    places = set() if edit.index is None else {source.objects[edit.index].cell}
    if edit.result is not None and not edit.anywhere:
        places.add(edit.result.cell)
    surplus = [item for item in found - kept if item[2] not in places]
    return kept <= found and len(surplus) <= int(edit.anywhere)


def _change(rng: np.random.Generator, pair: EditPair) -> tuple[str, str] | None:
    if pair.outcome == "untouched":
        return "What was changed?", "nothing"
    if pair.done is None:
        return None
    # The instruction that leaves nothing open.
    return "What was changed?", instruction_of(replace(pair.done, anywhere=False), pair.source)


_DEEDS = {
    "add": "added",
    "remove": "removed",
    "move": "moved",
    "recolour": "changed",
    "replace": "changed",
}


def _which(rng: np.random.Generator, pair: EditPair) -> tuple[str, str] | None:
    if pair.done is None or pair.done.kind not in _DEEDS:
        return None
    item = pair.done.result if pair.done.index is None else pair.source.objects[pair.done.index]
    assert item is not None
    return f"Which object was {_DEEDS[pair.done.kind]}?", f"{item.color} {item.shape}"


def _carried(rng: np.random.Generator, pair: EditPair) -> tuple[str, str]:
    right = carried_out(pair.edit, pair.source, pair.result)
    return _led(pair, "Was the instruction carried out?"), "yes" if right else "no"


def _kept(rng: np.random.Generator, pair: EditPair) -> tuple[str, str]:
    right = rest_kept(pair.edit, pair.source, pair.result)
    return _led(pair, "Was everything else left as it was?"), "yes" if right else "no"


def _rubric(rng: np.random.Generator, pair: EditPair) -> tuple[str, str]:
    """The edit reward's own text; the answer says whether the instruction was carried out and the rest kept."""
    asked = (pair.edit, pair.source, pair.result)
    right = carried_out(*asked) and rest_kept(*asked)
    return RUBRIC.replace(PLACEHOLDER, pair.instruction), "well" if right else "badly"


def _led(pair: EditPair, question: str) -> str:
    return f"{LEAD.replace(PLACEHOLDER, pair.instruction)} {question}"


def _either(rng: np.random.Generator, pair: EditPair) -> tuple[str, str] | None:
    """A question on one of the two pictures: what a comparison is made of."""
    number, kind = int(rng.integers(2)), sample_name(rng, _EITHER_KINDS)
    question = scene_question(rng, (pair.source, pair.result)[number], kind)
    if question is None:
        return None
    return f"In the {('first', 'second')[number]} picture: {question.text}", question.answer


_EITHER_KINDS = tuple(kind for kind in SCENE_KINDS if kind not in ("result", "relation"))
_MAKERS: dict[str, Callable[[np.random.Generator, EditPair], tuple[str, str] | None]] = {
    "either": _either,
    "change": _change,
    "which": _which,
    "carried_out": _carried,
    "kept": _kept,
    "rubric": _rubric,
}
PAIR_KINDS = tuple(_MAKERS)
JUDGEMENTS = ("carried_out", "kept", "rubric")
"""What an edit reward asks, under its long text."""


def pair_question(rng: np.random.Generator, pair: EditPair, kind: str) -> Question | None:
    """A question of a kind on a pair; None where the pair does not answer it."""
    made = _MAKERS[kind](rng, pair)
    return None if made is None else Question(kind, *made)
