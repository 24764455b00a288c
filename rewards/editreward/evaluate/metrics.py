"""How well predicted scores agree with labels: over all samples, and averaged within (source, instruction) groups.

Over all samples a regressor looks good by knowing which *sources* are easy; within a group every edit has the same
source and instruction, so only the result is left to judge. Intervals resample sources, since the edits of one
source are not independent.

    pairwise        share of pairs with unequal labels that are ordered as the labels are; equal predictions count half
    pairwise_ties   share of all pairs whose outcome (one, other, tie) is right, where a predicted difference of at
                    most `tie_threshold` is a tie; the threshold is the one that serves the evaluated pairs best
                    (Deutsch et al., Ties Matter, 2023)
    spearman, kendall (tau-b), pearson     undefined (None) over equal labels; 0 over equal predictions
    mae, rmse       in label units
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from core.failures import DataError
from core.statistics import CONFIDENCE, Difference, Estimate, bootstrap_mean, paired_bootstrap
from rewards.editreward.data.index import Entry

Array = NDArray[np.float64]
GROUP_METRICS = ("spearman", "kendall", "pearson", "pairwise", "pairwise_ties")


@dataclass(frozen=True)
class Scored:
    """N samples: labels and predictions in label units, and what each belongs to."""

    target: Array
    predicted: Array
    groups: Sequence[str]
    sources: Sequence[str]
    edit_types: Sequence[str]

    def where(self, keep: Sequence[int]) -> Scored:
        """The samples at these positions."""
        rows = list(keep)
        return Scored(
            self.target[rows],
            self.predicted[rows],
            [self.groups[i] for i in rows],
            [self.sources[i] for i in rows],
            [self.edit_types[i] for i in rows],
        )


def scored_entries(
    entries: Sequence[Entry], labels: Sequence[float], scores: Sequence[float | None]
) -> Scored:
    """What was scored, as arrays. Raises DataError for fewer than two."""
    kept = [i for i, score in enumerate(scores) if score is not None]
    if len(kept) < 2:
        raise DataError(f"the model scored {len(kept)} of {len(entries)} samples: nothing to measure")
    return Scored(
        np.array([labels[i] for i in kept]),
        np.array([scores[i] for i in kept], dtype=np.float64),
        [entries[i].group for i in kept],
        [entries[i].source for i in kept],
        [entries[i].edit_type for i in kept],
    )


def agreement(target: Array, predicted: Array) -> dict[str, float | None]:
    """All figures over one set of samples, without intervals. Keys as in the module's list, less pairwise_ties."""
    figures: dict[str, float | None] = {
        "mae": float(np.abs(predicted - target).mean()),
        "rmse": float(np.sqrt(np.square(predicted - target).mean())),
    }
    if len(target) < 2 or np.ptp(target) == 0:
        return figures | dict.fromkeys(("spearman", "kendall", "pearson", "pairwise"))
    if np.ptp(predicted) == 0:
        return figures | {"spearman": 0.0, "kendall": 0.0, "pearson": 0.0, "pairwise": 0.5}
    kendall = float(stats.kendalltau(target, predicted).statistic)
    return figures | {
        "spearman": float(stats.spearmanr(target, predicted).statistic),
        "kendall": kendall,
        "pearson": float(stats.pearsonr(target, predicted).statistic),
        # tau-b = (C - D) / sqrt(P Q): pairs concordant C, discordant D, of unequal labels P, unequal predictions Q
        "pairwise": (1 + kendall * float(np.sqrt(_unequal(predicted) / _unequal(target)))) / 2,
    }


def _unequal(values: Array) -> float:
    """Pairs of unequal values."""
    counts = np.unique(values, return_counts=True)[1].astype(float)
    return float(len(values) ** 2 - (counts**2).sum()) / 2


def overall(scored: Scored, *, resamples: int, seed: int) -> dict[str, Estimate]:
    """`agreement` over all samples, with percentile intervals from resampled sources."""
    point = agreement(scored.target, scored.predicted)
    rows: dict[str, list[int]] = {}
    for i, source in enumerate(scored.sources):
        rows.setdefault(source, []).append(i)
    clusters = [np.array(r) for r in rows.values()]
    rng = np.random.default_rng(seed)
    draws: dict[str, list[float]] = {name: [] for name in point}
    for _ in range(resamples if len(clusters) > 1 else 0):
        chosen = np.concatenate([clusters[i] for i in rng.integers(0, len(clusters), len(clusters))])
        for name, value in agreement(scored.target[chosen], scored.predicted[chosen]).items():
            if value is not None:
                draws[name].append(value)
    return {name: _estimate(value, draws[name], len(scored.target)) for name, value in point.items()}


def _estimate(value: float | None, draws: list[float], n: int) -> Estimate:
    if not draws:
        return Estimate(value, None, None, n)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Estimate(value, float(low), float(high), n)


def group_rows(groups: Sequence[str]) -> list[NDArray[np.intp]]:
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
        gaps, differences = _gaps(target, predicted)
        figures["pairwise_ties"] = float(_outcomes(gaps, differences, tie_margin, threshold).mean())
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


def group_mean(
    scored: Scored, metric: Callable[[Array, Array], dict[str, float | None]], name: str
) -> float | None:
    """The mean over groups of one figure, without interval; None where no group defines it."""
    found = [metric(scored.target[r], scored.predicted[r])[name] for r in group_rows(scored.groups)]
    defined = [value for value in found if value is not None]
    return float(np.mean(defined)) if defined else None


def tie_threshold(scored: Scored, tie_margin: float) -> float:
    """The predicted difference up to which calling it a tie is right most often, over all pairs within groups."""
    parts = [_gaps(scored.target[r], scored.predicted[r]) for r in group_rows(scored.groups)]
    if not parts:
        return 0.0
    gaps, differences = (np.concatenate(side) for side in zip(*parts, strict=True))
    return best_threshold(gaps, differences, tie_margin)


def best_threshold(gaps: Array, differences: Array, tie_margin: float) -> float:
    """gaps: label differences; differences: predicted ones. 0 where no tie is worth predicting."""
    size = np.abs(differences)
    order = np.argsort(size, kind="stable")
    tie = np.abs(gaps) <= tie_margin
    right = ~tie & (np.sign(gaps) == np.sign(differences))
    gain = np.cumsum(np.where(tie, 1, 0)[order] - np.where(right, 1, 0)[order])
    # A threshold takes in every pair of the same size, so only the last of equals is a choice.
    last = np.append(np.diff(size[order]) > 0, True)
    gain = np.where(last, gain, np.iinfo(gain.dtype).min)
    best = int(gain.argmax())
    return float(size[order][best]) if gain[best] > 0 else 0.0


def _gaps(target: Array, predicted: Array) -> tuple[Array, Array]:
    first, second = np.triu_indices(len(target), 1)
    return target[first] - target[second], predicted[first] - predicted[second]


def _outcomes(gaps: Array, differences: Array, tie_margin: float, threshold: float) -> Array:
    """1 where the outcome of a pair is right, else 0."""
    label = np.where(np.abs(gaps) <= tie_margin, 0, np.sign(gaps))
    answer = np.where(np.abs(differences) <= threshold, 0, np.sign(differences))
    return (label == answer).astype(np.float64)


def pair_accuracy(gaps: Array, differences: Array, threshold: float) -> tuple[Array, Array]:
    """For labelled preferences (gap 1, -1, or 0 for a tie): right or not, over decided pairs, and over all pairs."""
    decided = gaps != 0
    halves = np.where(differences == 0, 0.5, np.sign(gaps) == np.sign(differences))
    return halves[decided].astype(np.float64), _outcomes(gaps, differences, 0.0, threshold)
