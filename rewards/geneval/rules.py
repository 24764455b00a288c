"""GenEval's rules (Ghosh et al. 2023, evaluation of djghosh13/geneval) on detections from any detector.

Where we differ from upstream: detections of equal score keep the detector's order (upstream's sort leaves it
open), and malformed metadata raises a ValueError that names the key. Pure Python: needs neither the image nor
any package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeAlias

from rewards.geneval.detection import RELATIONS, SCORE_THRESHOLD, Detection, relations

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

COUNTING_THRESHOLD = 0.9
"""Takes the place of `SCORE_THRESHOLD` for the tag `counting`."""
MAX_DETECTIONS = 16
"""At most this many detections of a class are kept, the most confident ones."""

ClassifyColor: TypeAlias = Callable[[str, Sequence[Detection]], list[str]]
"""(class name, detections) -> one colour name for each detection."""

_Clauses: TypeAlias = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class GenEvalResult:
    """The verdicts on one image.

    `correct`: the official figure. `reason`: why it is not, or "". `strict`: as `correct`, but with exactly
    the demanded number of objects, as Flow-GRPO's reward server has it. `dense`: our partial credit, from 0
    to 1. `flow_grpo_compat`: that server's own dense score, from -14 to 1.
    """

    correct: bool
    reason: str
    strict: bool
    dense: float
    flow_grpo_compat: float
    tag: str


def evaluate(
    metadata: Mapping[str, Any],
    detections: Mapping[str, Sequence[Detection]],
    *,
    classify_color: ClassifyColor,
) -> GenEvalResult:
    """Judge one image by GenEval's rules.

    metadata: a GenEval record: `tag`, `include` (clauses of `class`, `count`, perhaps `color`, perhaps
    `position` [relation, index of an earlier clause]), perhaps `exclude`.
    detections: class name -> detections, unfiltered and in any order.
    classify_color: asked at most once for each clause, about its `count` most confident objects.

    `dense` is the mean over all parts: for each include clause max(0, 1 - |n - count| / count), and where
    asked the share of right colours and the share of object-target pairs in the right relation, 0 if what the
    part rests on failed (too few objects, a wrong colour, a failed target); for each violated exclude clause
    a 0.
    `strict`: every part is 1. A violated exclude clause breaks it, which upstream's server does not look at;
    in GenEval's own prompts the two cannot differ.

    Raises ValueError for malformed metadata or a colour classifier that answers with a wrong count.
    """
    tag, include, exclude = check_record(metadata)
    kept = _keep(detections, COUNTING_THRESHOLD if tag == "counting" else SCORE_THRESHOLD)
    found = [look_up(clause, kept.get(clause["class"], ()), classify_color) for clause in include]
    verdicts: list[_Verdict] = []
    for item in found:
        verdicts.append(_judge(item, found, verdicts))
    violated = [
        f"expected fewer than {clause['count']} {clause['class']}, found {n}"
        for clause in exclude
        if (n := len(kept.get(clause["class"], ()))) >= clause["count"]
    ]
    parts = [part for verdict in verdicts for part in verdict.parts] + [0.0] * len(violated)
    reasons = [verdict.reason for verdict in verdicts if verdict.reason] + violated
    return GenEvalResult(
        correct=not reasons,
        reason="; ".join(reasons),
        strict=all(part == 1.0 for part in parts),
        dense=fmean(parts) if parts else 1.0,
        flow_grpo_compat=flow_grpo_score(found),
        tag=tag,
    )


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


@dataclass(frozen=True)
class _Verdict:
    """One include clause: its parts in [0, 1], and why it fails or ""."""

    parts: tuple[float, ...]
    reason: str


def _judge(item: Found, found: Sequence[Found], verdicts: Sequence[_Verdict]) -> _Verdict:
    """Judge one clause, given the verdicts on the clauses before it."""
    parts = [max(0.0, 1 - abs(item.n - item.count) / item.count)]
    reason = "" if item.group else f"expected {item.count} {item.name}, found {item.n}"
    if item.color is not None:
        right = item.right_colors or 0
        parts.append(right / item.count)
        if not reason and right < item.count:
            reason = f"expected {item.count} {item.color} {item.name}, found {right} in that colour"
    if item.position is not None:
        relation, target = item.position
        if reason:
            parts.append(0.0)
        elif verdicts[target].reason:
            parts.append(0.0)
            reason = f"no target for {item.name} to be {relation}"
        else:
            holds = pairs_in_relation(relation, item.group, found[target].group)
            parts.append(fmean(holds))
            if not all(holds):
                reason = f"expected {item.name} {relation} {found[target].name}, found another relation"
    return _Verdict(tuple(parts), reason)


def _keep(
    detections: Mapping[str, Sequence[Detection]], threshold: float
) -> dict[str, tuple[Detection, ...]]:
    """For each class the detections above the threshold, most confident first, at most MAX_DETECTIONS."""
    kept = {}
    for name, items in detections.items():
        ranked = sorted((d for d in items if d.score > threshold), key=lambda d: d.score, reverse=True)
        kept[name] = tuple(ranked[:MAX_DETECTIONS])
    return kept


def check_record(metadata: Mapping[str, Any]) -> tuple[str, _Clauses, _Clauses]:
    """Tag, include and exclude clauses. Raises ValueError naming the key that is malformed."""
    tag = metadata.get("tag")
    if not isinstance(tag, str):
        raise ValueError(f"metadata.tag: {tag!r} is not a GenEval tag; expected one of {', '.join(TAGS)}")
    include, exclude = metadata.get("include") or (), metadata.get("exclude") or ()
    if not include and not exclude:
        raise ValueError(f"metadata: neither include nor exclude clauses in {dict(metadata)!r}")
    check_clauses(include, "metadata.include")
    check_clauses(exclude, "metadata.exclude", placed=False)
    return tag, include, exclude


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


def flow_grpo_score(found: Sequence[Found]) -> float:
    """The dense score of Flow-GRPO's reward server (Liu et al. 2025), faults and all, for comparison.

    The mean over its parts, from -14 to 1; 0 without include clauses. Its faults: the count part falls to -14 when
    16 objects are found where one is asked; a wrong relation adds a 0 and then a 1 all the same, so it still earns
    .75; exclude clauses are not looked at.
    """
    parts: list[float] = []
    matched: list[bool] = []
    for item in found:
        parts.append(1 - abs(item.n - item.count) / item.count)
        good = item.n == item.count
        if not good:
            # One zero stands for colour and position together.
            parts += [0.0] if item.color or item.position else []
        elif item.right_colors is not None:
            parts.append(item.right_colors / item.count)
            good = item.colors_right
        if good and item.position:
            relation, target = item.position
            if not matched[target]:
                good = False
                parts.append(0.0)
            else:
                good = all(pairs_in_relation(relation, item.group, found[target].group))
                parts += [1.0] if good else [0.0, 1.0]
        matched.append(good)
    return sum(parts) / len(parts) if parts else 0.0
