"""Bootstrap confidence intervals: of a mean, of a paired difference, over training seeds, and within strata.

The interval is the percentile bootstrap at 95 % (Efron and Tibshirani, An Introduction to the Bootstrap,
1993, chapter 13). It covers the choice of prompts only, not training seeds: give one value per prompt
(average several images of a prompt first), since the resampled units have to be independent.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
INDICES_PER_CHUNK = 2_000_000
"""Resampled indices held at once (16 MB of int64); the result does not depend on it."""

Values = Sequence[float | None] | NDArray[np.floating]


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval over `n` values; `missing` values were left out.

    `mean` is None when nothing was scored, `low` and `high` when fewer than two values were.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int
    missing: int = 0


@dataclass(frozen=True)
class Difference:
    """The mean of `after - before` with its 95 % interval, over the `n` pairs scored on both sides.

    `before` and `after` are means over the same pairs, so that `mean == after - before` up to rounding.
    `missing` counts the pairs left out. Fields are None as in `Estimate`.
    """

    before: float | None
    after: float | None
    mean: float | None
    low: float | None
    high: float | None
    n: int
    missing: int = 0


def bootstrap_mean(values: Values, *, resamples: int = 10_000, seed: int = 0) -> Estimate:
    """Mean of `values` [N] with its percentile bootstrap interval. None and NaN mean *not scored*.

    Raises ValueError for infinities, for values that are not one-dimensional, and for `resamples` < 1.
    """
    array = _as_array(values, "values")
    scored = array[~np.isnan(array)]
    missing = len(array) - len(scored)
    if len(scored) == 0:
        return Estimate(None, None, None, 0, missing)
    low, high = _interval(scored, resamples, seed)
    return Estimate(float(scored.mean()), low, high, len(scored), missing)


def paired_bootstrap(before: Values, after: Values, *, resamples: int = 10_000, seed: int = 0) -> Difference:
    """Mean of `after - before`, both [N] and in the same prompt order, with its percentile bootstrap
    interval.

    Whole pairs are resampled, so what a prompt contributes to both sides cancels. Raises ValueError when the
    lengths differ, and as `bootstrap_mean` does.
    """
    first, second = _as_array(before, "before"), _as_array(after, "after")
    if len(first) != len(second):
        raise ValueError(
            f"pairs need equal lengths, but before has {len(first)} values and after {len(second)}"
        )
    scored = ~(np.isnan(first) | np.isnan(second))
    first, second = first[scored], second[scored]
    change = bootstrap_mean(second - first, resamples=resamples, seed=seed)
    return Difference(
        before=float(first.mean()) if change.n else None,
        after=float(second.mean()) if change.n else None,
        mean=change.mean,
        low=change.low,
        high=change.high,
        n=change.n,
        missing=len(scored) - change.n,
    )


def strata_bootstrap(
    strata: Iterable[Sequence[tuple[float, float]]], *, resamples: int = 10_000, seed: int = 0
) -> tuple[float | None, float | None]:
    """Interval of the unweighted mean over strata of sum / weight, from each prompt's (sum, weight).

    How many prompts a stratum has is fixed, so those of every stratum are drawn anew from that stratum; a prompt
    carries all that was measured on it along, and counts not at all at weight 0. None for both ends where a stratum
    has fewer than two scored prompts.
    """
    scored = [np.array([row for row in rows if row[1] > 0], np.float64).reshape(-1, 2) for rows in strata]
    if not scored or any(len(rows) < 2 for rows in scored):
        return None, None
    rng = np.random.default_rng(seed)
    means = []
    for rows in scored:
        draws = _draws(len(rows), resamples, rng)
        means.append(np.concatenate([rows[d, 0].sum(axis=1) / rows[d, 1].sum(axis=1) for d in draws]))
    return _percentiles(np.mean(means, axis=0))


def seeds_bootstrap(values: NDArray[np.floating], *, resamples: int = 10_000, seed: int = 0) -> Estimate:
    """Mean of `values` [training seeds, prompts] with its interval over both.

    Training seeds are drawn with replacement and so are prompts, the same ones for every seed, since all runs are
    evaluated on the same prompts. With one seed the interval covers prompts alone. NaN means *not scored*; a prompt
    that is not scored in every run is left out, and `n` counts those that are not.
    """
    scored = values[:, ~np.isnan(values).any(axis=0)] if len(values) else values
    rows, count = scored.shape
    missing = values.shape[1] - count
    if scored.size == 0:
        return Estimate(None, None, None, 0, missing)
    low = high = None
    if count > 1:
        rng = np.random.default_rng(seed)
        prompts = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
        seeds = rng.multinomial(rows, np.full(rows, 1 / rows), size=resamples)
        low, high = _percentiles((seeds * (prompts @ scored.T)).sum(axis=1) / scored.size)
    return Estimate(float(scored.mean()), low, high, count, missing)


def cluster_bootstrap(
    figures: Callable[[NDArray[np.intp]], Mapping[str, float | None]],
    clusters: Sequence[str],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Estimate]:
    """`figures` of the rows 0 to N-1, each with its percentile interval where whole clusters of rows are drawn.

    Args:
        figures: by name, of the rows it is given; a figure that some draws leave undefined (None) has the interval of
            the others.
        clusters: the cluster of each of the N rows, such as the prompt of a sample.
    """
    rows: dict[str, list[int]] = {}
    for i, cluster in enumerate(clusters):
        rows.setdefault(cluster, []).append(i)
    members = [np.array(each) for each in rows.values()]
    point = figures(np.arange(len(clusters)))
    rng = np.random.default_rng(seed)
    draws: dict[str, list[float]] = {name: [] for name in point}
    for _ in range(resamples if len(members) > 1 else 0):
        chosen = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        for name, value in figures(chosen).items():
            if value is not None:
                draws[name].append(value)
    found = {}
    for name, value in point.items():
        low, high = _percentiles(np.array(draws[name])) if draws[name] else (None, None)
        found[name] = Estimate(value, low, high, len(clusters))
    return found


def _as_array(values: Values, name: str) -> NDArray[np.float64]:
    array = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} must hold one number per prompt, but has shape {array.shape}")
    if np.isinf(array).any():
        raise ValueError(f"{name} holds an infinite value at index {int(np.isinf(array).argmax())}")
    return array


def _interval(values: NDArray[np.float64], resamples: int, seed: int) -> tuple[float | None, float | None]:
    """Percentiles of the means of `resamples` draws with replacement from `values` [N], N >= 1."""
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, not {resamples}")
    if len(values) < 2:
        return None, None
    draws = _draws(len(values), resamples, np.random.default_rng(seed))
    return _percentiles(np.concatenate([values[drawn].mean(axis=1) for drawn in draws]))


def _draws(count: int, resamples: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Indices [up to INDICES_PER_CHUNK / count, count] of `resamples` draws with replacement in all."""
    rows = max(1, INDICES_PER_CHUNK // count)
    for done in range(0, resamples, rows):
        yield rng.integers(0, count, size=(min(rows, resamples - done), count))


def _percentiles(means: NDArray[np.float64]) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)
