"""Group-relative advantages: equation 1 of the paper, over the samples that really have a reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rewards.scoring import LARGEST_SCORE

NO_SPREAD = 1e-12
"""Rewards of a group that differ by no more are equal."""


@dataclass(frozen=True)
class Advantages:
    """values [B] float64 (0 where not used); used [B] bool: has a reward and lies in a group with spread;
    zero_spread_share: groups whose scored rewards are all equal, over groups with a scored sample."""

    values: np.ndarray
    used: np.ndarray
    zero_spread_share: float


def group_advantages(
    rewards: Sequence[float | None] | np.ndarray,
    group_ids: Sequence[int] | np.ndarray,
    *,
    std: Literal["group", "batch"] = "group",
    eps: float = 1e-4,
    clip: float = 5.0,
    mask: Sequence[bool] | np.ndarray | None = None,
) -> Advantages:
    """`A = (r - mean_group) / (std + eps)`, clamped to +-clip (paper eq. 1; eps and the clamp are Flow-GRPO's).

    `std` is the population standard deviation of the sample's group (paper) or of the whole batch. A sample
    that is masked or has no reward (None, NaN, or beyond `LARGEST_SCORE`) takes no part in its group's mean or
    spread. Samples of a group without spread carry no signal: they are marked unused and leave the policy term
    and the KL term alike.

    Raises ValueError for unequal lengths or an unknown `std`.
    """
    values = np.array([np.nan if r is None else float(r) for r in rewards], dtype=np.float64)
    groups = np.asarray(group_ids)
    keep = np.abs(values) <= LARGEST_SCORE
    if mask is not None:
        if len(mask) != len(values):
            raise ValueError(f"mask has {len(mask)} entries for {len(values)} rewards")
        keep &= np.asarray(mask, dtype=bool)
    if len(groups) != len(values):
        raise ValueError(f"{len(groups)} group ids for {len(values)} rewards")
    if std not in ("group", "batch"):
        raise ValueError(f"std={std!r}: choose 'group' or 'batch'")

    advantages = np.zeros(len(values))
    used = np.zeros(len(values), dtype=bool)
    batch_std = values[keep].std() if keep.any() else 0.0
    scored_groups = flat_groups = 0
    for group in np.unique(groups):
        rows = np.flatnonzero((groups == group) & keep)
        if len(rows) == 0:
            continue
        scored_groups += 1
        centred = values[rows] - values[rows].mean()
        if np.ptp(values[rows]) <= NO_SPREAD:
            flat_groups += 1
            continue
        spread = values[rows].std() if std == "group" else batch_std
        advantages[rows] = np.clip(centred / (spread + eps), -clip, clip)
        used[rows] = True
    return Advantages(advantages, used, flat_groups / scored_groups if scored_groups else 0.0)
