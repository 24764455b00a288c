"""How well predicted scores agree with labels: over all samples, and averaged within (source, instruction) groups.

Over all samples a regressor looks good by knowing which *sources* are easy; within a group every edit has the same
source and instruction, so only the result is left to judge. Intervals resample sources, since the edits of one
source are not independent.

The figures are those of `core/agreement.py`, in label units.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from core.agreement import Array, agreement, best_threshold, pair_gaps, pair_outcomes
from core.failures import DataError
from core.statistics import Difference, Estimate, bootstrap_mean, cluster_bootstrap, paired_bootstrap
from rewards.editreward.data.index import Entry

GROUP_METRICS = ("spearman", "kendall", "pearson", "pairwise", "pairwise_ties")


@dataclass(frozen=True)
class Scored:
    """N samples: labels and predictions in label units, and what each belongs to."""

    target: Array
    predicted: Array
    groups: NDArray[np.object_]
    sources: NDArray[np.object_]
    edit_types: NDArray[np.object_]

    def where(self, keep: Sequence[int] | NDArray[np.intp]) -> Scored:
        """The samples at these positions."""
        return Scored(*(getattr(self, column.name)[keep] for column in fields(self)))


def scored_entries(
    entries: Sequence[Entry], labels: Sequence[float], scores: Sequence[float | None]
) -> Scored:
    """What was scored, as arrays. Raises DataError for fewer than two."""
    kept = [i for i, score in enumerate(scores) if score is not None]
    if len(kept) < 2:
        raise DataError(f"the model scored {len(kept)} of {len(entries)} samples: nothing to measure")
    names = (
        np.array([getattr(e, n) for e in entries], dtype=object) for n in ("group", "source", "edit_type")
    )
    return Scored(np.array(labels), np.array(scores, dtype=np.float64), *names).where(kept)


def overall(scored: Scored, *, resamples: int, seed: int) -> dict[str, Estimate]:
    """`agreement` over all samples, with percentile intervals from resampled sources."""

    def figures(rows: NDArray[np.intp]) -> dict[str, float | None]:
        return agreement(scored.target[rows], scored.predicted[rows])

    return cluster_bootstrap(figures, scored.sources.tolist(), resamples=resamples, seed=seed)


def group_rows(groups: Iterable[str]) -> list[NDArray[np.intp]]:
    """Positions of each group with at least two members, in order of appearance."""
    rows: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        rows.setdefault(group, []).append(i)
    return [np.array(members) for members in rows.values() if len(members) > 1]


def within_groups(scored: Scored, *, tie_margin: float, threshold: float) -> dict[str, dict[str, float]]:
    """metric -> source -> mean over the groups of that source in which it is defined."""
    values: dict[str, dict[str, list[float]]] = {name: {} for name in GROUP_METRICS}
    for rows in group_rows(scored.groups):
        target, predicted = scored.target[rows], scored.predicted[rows]
        figures = agreement(target, predicted)
        gaps, differences = pair_gaps(target, predicted)
        figures["pairwise_ties"] = float(pair_outcomes(gaps, differences, tie_margin, threshold).mean())
        for name in GROUP_METRICS:
            value = figures[name]
            if value is not None:
                values[name].setdefault(scored.sources[int(rows[0])], []).append(value)
    return {name: {s: float(np.mean(v)) for s, v in found.items()} for name, found in values.items()}


def group_estimates(values: dict[str, dict[str, float]], *, resamples: int, seed: int) -> dict[str, Estimate]:
    """Means over sources, with intervals over sources."""
    return {
        name: bootstrap_mean(list(found.values()), resamples=resamples, seed=seed)
        for name, found in values.items()
    }


def group_differences(
    before: dict[str, dict[str, float]], after: dict[str, dict[str, float]], *, resamples: int, seed: int
) -> dict[str, Difference]:
    """`after - before` for two models on the same samples, paired by source."""
    differences = {}
    for name in GROUP_METRICS:
        sources = sorted(before[name].keys() & after[name].keys())
        pairs = ([side[name][s] for s in sources] for side in (before, after))
        differences[name] = paired_bootstrap(*pairs, resamples=resamples, seed=seed)
    return differences


def group_mean(scored: Scored, name: str) -> float | None:
    """The mean over groups of one figure of `agreement`, without interval; None where no group defines it."""
    found = [agreement(scored.target[r], scored.predicted[r])[name] for r in group_rows(scored.groups)]
    defined = [value for value in found if value is not None]
    return float(np.mean(defined)) if defined else None


def tie_threshold(scored: Scored, tie_margin: float) -> float:
    """The predicted difference up to which calling it a tie is right most often, over all pairs within groups."""
    parts = [pair_gaps(scored.target[r], scored.predicted[r]) for r in group_rows(scored.groups)]
    if not parts:
        return 0.0
    gaps, differences = (np.concatenate(side) for side in zip(*parts, strict=True))
    return best_threshold(gaps, differences, tie_margin)
