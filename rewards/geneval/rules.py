"""GenEval's rules (Ghosh et al. 2023, evaluation of djghosh13/geneval) on detections from any detector.

Where we differ from upstream: detections of equal score keep the detector's order (upstream's sort leaves it
open), and malformed metadata raises a ValueError that names the key. Pure Python: needs neither the image nor
any package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeAlias

from rewards.geneval.clauses import ClassifyColor, Found, check_clauses, look_up, pairs_in_relation
from rewards.geneval.detection import Detection
from rewards.geneval.flow_grpo import flow_grpo_score

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

SCORE_THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
"""Detections count only above this score; the second value holds for the tag `counting`."""
MAX_DETECTIONS = 16
"""At most this many detections of a class are kept, the most confident ones."""


_Clauses: TypeAlias = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class GenEvalResult:
    """The verdicts on one image.

    `correct`: the official figure. `reason`: why it is not, or "". `strict`: as `correct`, but with exactly
    the demanded number of objects, as Flow-GRPO's reward server has it. `dense`: our partial credit, from 0
    to 1. `flow_grpo_compat`: that server's own dense score, from -14 to 1. `prompt`: the record's prompt, or
    its clauses as JSON when it has none: equal for images of one prompt.
    """

    correct: bool
    reason: str
    strict: bool
    dense: float
    flow_grpo_compat: float
    tag: str
    prompt: str


@dataclass(frozen=True)
class _Verdict:
    """One include clause: its parts in [0, 1], and why it fails or ""."""

    parts: tuple[float, ...]
    reason: str


def evaluate(
    metadata: Mapping[str, Any],
    detections: Mapping[str, Sequence[Detection]],
    *,
    classify_color: ClassifyColor,
) -> GenEvalResult:
    """Judge one image by GenEval's rules.

    metadata: a GenEval record: `tag`, `include` (clauses of `class`, `count`, perhaps `color`, perhaps
    `position` [relation, index of an earlier clause]), perhaps `exclude`, `prompt`.
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
    tag, include, exclude = _read(metadata)
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
        prompt=str(metadata.get("prompt") or json.dumps([include, exclude], sort_keys=True)),
    )


def _read(metadata: Mapping[str, Any]) -> tuple[str, _Clauses, _Clauses]:
    """Tag, include and exclude clauses, checked."""
    tag = metadata.get("tag")
    if not isinstance(tag, str):
        raise ValueError(f"metadata.tag: {tag!r} is not a GenEval tag; expected one of {', '.join(TAGS)}")
    include, exclude = metadata.get("include") or (), metadata.get("exclude") or ()
    if not include and not exclude:
        raise ValueError(f"metadata: neither include nor exclude clauses in {dict(metadata)!r}")
    check_clauses(include, "metadata.include")
    check_clauses(exclude, "metadata.exclude", placed=False)
    return tag, include, exclude


def _keep(
    detections: Mapping[str, Sequence[Detection]], threshold: float
) -> dict[str, tuple[Detection, ...]]:
    """For each class the detections above the threshold, most confident first, at most MAX_DETECTIONS."""
    kept = {}
    for name, items in detections.items():
        ranked = sorted((d for d in items if d.score > threshold), key=lambda d: d.score, reverse=True)
        kept[name] = tuple(ranked[:MAX_DETECTIONS])
    return kept


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
