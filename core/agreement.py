"""How well predicted numbers agree with true ones, over one set of samples.

pairwise        share of pairs with unequal labels that are ordered as the labels are; equal predictions count half
pairwise_ties   share of all pairs whose outcome (one, other, tie) is right, where a predicted difference of at
                most `tie_threshold` is a tie; the threshold is the one that serves the evaluated pairs best
                (Deutsch et al., Ties Matter, 2023)
spearman, kendall (tau-b), pearson     undefined (None) over equal labels; 0 over equal predictions
mae, rmse       in label units
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]


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


def best_threshold(gaps: Array, differences: Array, tie_margin: float) -> float:
    """The predicted difference up to which calling it a tie is right most often; 0 where no tie is worth predicting.

    gaps, differences: see `pair_gaps`; labels within `tie_margin` of each other are a tie.
    """
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


def pair_gaps(target: Array, predicted: Array) -> tuple[Array, Array]:
    """Differences of the labels and of the predictions, over all pairs."""
    first, second = np.triu_indices(len(target), 1)
    return target[first] - target[second], predicted[first] - predicted[second]


def pair_outcomes(gaps: Array, differences: Array, tie_margin: float, threshold: float) -> Array:
    """1 where the outcome of a pair is right, else 0."""
    label = np.where(np.abs(gaps) <= tie_margin, 0, np.sign(gaps))
    answer = np.where(np.abs(differences) <= threshold, 0, np.sign(differences))
    return (label == answer).astype(np.float64)


def pair_accuracy(gaps: Array, differences: Array, threshold: float) -> tuple[Array, Array]:
    """For labelled preferences (gap 1, -1, or 0 for a tie): right or not, over decided pairs, and over all pairs."""
    decided = gaps != 0
    halves = np.where(differences == 0, 0.5, np.sign(gaps) == np.sign(differences))
    return halves[decided].astype(np.float64), pair_outcomes(gaps, differences, 0.0, threshold)
