"""Who scored: the detector behind GenEval's verdicts, the snapshot behind a judge's answers.

Both are read from the names of what was stored with each picture, so that they are those that really answered,
also when an evaluation was continued on another day.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rewards.benchmarks.items import ScoredItem

ANSWERED_BY = "answered_by."
"""A judge's component `answered_by.SNAPSHOT` is 1 where that snapshot answered."""


def detectors(scored: Iterable[ScoredItem]) -> list[str]:
    """The prefix of every `PREFIX.correct`: detector and colour rule."""
    names = {name for name in _names(scored) if name.endswith(".correct")}
    return sorted(name.rpartition(".")[0] for name in names)


def snapshots(scored: Iterable[ScoredItem]) -> list[str]:
    """The judge's snapshots."""
    return sorted(name.removeprefix(ANSWERED_BY) for name in _names(scored) if name.startswith(ANSWERED_BY))


def _names(scored: Iterable[ScoredItem]) -> set[str]:
    images: Iterable[Mapping[str, float] | None] = (image for item in scored for image in item.images)
    return {name for image in images for name in image or ()}
