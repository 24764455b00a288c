"""Bootstrap intervals of a benchmark's figures, over prompts within their groups.

The percentile bootstrap at 95 %, as in `core/statistics.py`. A benchmark fixes how many prompts each group has, so
the prompts of every group are drawn anew from that group; a prompt carries all its pictures along. The interval
covers the choice of prompts, not the noise that pictures were drawn from, a judge's whims or training seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from core.statistics import CONFIDENCE, INDICES_PER_CHUNK
from rewards.benchmarks.figures import Contribution, Figure


def bootstrap_figure(
    figure: Figure, *, resamples: int = 10_000, seed: int = 0
) -> tuple[float | None, float | None]:
    """Low and high end of a figure's interval; None for both where a group has fewer than two scored prompts.

    What a public script rounds is not rounded here.
    """
    strata = [_scored(rows) for rows in figure.strata.values()]
    if not strata or any(len(rows) < 2 for rows in strata):
        return None, None
    rng = np.random.default_rng(seed)
    means = np.mean([_resampled(rows, resamples, rng) for rows in strata], axis=0)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def _scored(rows: Sequence[Contribution]) -> NDArray[np.float64]:
    """[N, 2]: sum and weight of the N prompts of which anything was scored."""
    return np.array([row for row in rows if row[1] > 0], dtype=np.float64).reshape(-1, 2)


def _resampled(rows: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Sum over weight of `resamples` draws of N prompts with replacement."""
    count, chunk = len(rows), max(1, INDICES_PER_CHUNK // len(rows))
    found = []
    for done in range(0, resamples, chunk):
        drawn = rng.integers(0, count, size=(min(chunk, resamples - done), count))
        found.append(rows[drawn, 0].sum(axis=1) / rows[drawn, 1].sum(axis=1))
    return np.concatenate(found)
