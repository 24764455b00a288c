"""What is found for one include clause: the facts that every verdict is drawn from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from rewards.geneval.detection import RELATIONS, Detection, relations

ClassifyColor: TypeAlias = Callable[[str, Sequence[Detection]], list[str]]
"""(class name, detections) -> one colour name for each detection."""


@dataclass(frozen=True)
class Found:
    """An include clause and what the image holds for it.

    `n`: detections of the class. `group`: the `count` most confident ones, empty when there are fewer.
    `right_colors`: how many of the group have the colour asked for, None when none is asked or no group.
    """

    name: str
    count: int
    color: str | None
    position: tuple[str, int] | None
    n: int
    group: tuple[Detection, ...]
    right_colors: int | None

    @property
    def colors_right(self) -> bool:
        return self.right_colors in (None, self.count)


def look_up(
    clause: Mapping[str, Any], detections: Sequence[Detection], classify_color: ClassifyColor
) -> Found:
    """Find the clause's objects among its class's detections, most confident first.

    Raises ValueError when the colour classifier answers with a wrong count.
    """
    name, count, color = clause["class"], clause["count"], clause.get("color")
    group = tuple(detections[:count]) if len(detections) >= count else ()
    right = None
    if color is not None and group:
        answers = list(classify_color(name, group))
        if len(answers) != len(group):
            raise ValueError(f"classify_color: {len(answers)} colours for {len(group)} detections of {name}")
        right = answers.count(color)
    position = clause.get("position")
    asked = None if position is None else (position[0], position[1])
    return Found(name, count, color, asked, len(detections), group, right)


def pairs_in_relation(relation: str, group: Sequence[Detection], targets: Sequence[Detection]) -> list[bool]:
    """For every object-target pair, whether the object stands in the relation to the target."""
    return [relation in relations(item.box, target.box) for item in group for target in targets]


def check_clauses(clauses: Any, name: str, *, placed: bool = True) -> None:
    """Raises ValueError, naming the key, for include or exclude clauses that the rules cannot read.

    placed: whether a clause may have a position, whose target is then a clause before it.
    """
    if not isinstance(clauses, Sequence) or isinstance(clauses, str):
        raise ValueError(f"{name}: {clauses!r} is not a list of clauses")
    for index, clause in enumerate(clauses):
        _check_clause(clause, f"{name}[{index}]", index if placed else 0)


def _check_clause(clause: Any, name: str, earlier: int) -> None:
    """earlier: how many clauses precede this one, and so may be the target of its position."""
    if not isinstance(clause, Mapping):
        raise ValueError(f"{name}: {clause!r} is not a clause; it needs keys class and count")
    if not isinstance(clause.get("class"), str):
        raise ValueError(f"{name}.class: {clause.get('class')!r} is not a class name")
    count = clause.get("count")
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"{name}.count: {count!r} is not a whole number of at least 1")
    color = clause.get("color")
    if color is not None and not isinstance(color, str):
        raise ValueError(f"{name}.color: {color!r} is not a colour name")
    position = clause.get("position")
    if position is None:
        return
    if not isinstance(position, Sequence) or len(position) != 2 or position[0] not in RELATIONS:
        raise ValueError(f"{name}.position: {position!r} is not [relation, clause]; {', '.join(RELATIONS)}")
    if not isinstance(position[1], int) or not 0 <= position[1] < earlier:
        raise ValueError(f"{name}.position: {position[1]!r} is not the index of an earlier include clause")
