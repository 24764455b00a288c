"""The loss: regression on z-scored labels, and if asked for a pairwise term within (source, instruction) groups.

`B` samples of a micro-batch, `K` dimensions, `g` samples a unit (see `order.py`).

    regression   mean over B and K of (p - y)²  or Huber(p - y)
    ranking      sum over pairs i, j of one group in one unit, and over K, of -log sigmoid(p_i - p_j) where
                 y_i - y_j > gap, divided by K and by the pairs that the units could hold, B (g - 1) / 2

Both are averages with a divisor fixed by the batch's shape, so the mean over micro-batches and ranks is the same
number however a batch is cut into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import huber_loss, logsigmoid

from rewards.editreward.config import TrainSection


@dataclass(frozen=True)
class Loss:
    """total: what is differentiated; the parts as numbers for the log (ranking before its weight)."""

    total: Tensor
    regression: Tensor
    ranking: Tensor


def edit_reward_loss(
    predicted: Tensor, target: Tensor, groups: Sequence[str], settings: TrainSection
) -> Loss:
    """The loss of one micro-batch. predicted, target [B, K] as z-scores; groups: the group of each sample."""
    if settings.loss == "huber":
        regression = huber_loss(predicted, target, delta=settings.huber_delta)
    else:
        regression = (predicted - target).square().mean()
    ranking = predicted.new_zeros(())
    if settings.ranking.weight > 0:
        ranking = ranking_loss(
            predicted, target, groups, unit=settings.ranking.group_size, gap=settings.ranking.min_gap
        )
    return Loss(regression + settings.ranking.weight * ranking, regression.detach(), ranking.detach())


def ranking_loss(
    predicted: Tensor, target: Tensor, groups: Sequence[str], *, unit: int, gap: float
) -> Tensor:
    """See the module's formula. Units are consecutive runs of `unit` samples; B must be a multiple of it."""
    number = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    group = torch.tensor([number[name] for name in groups], device=predicted.device)
    place = torch.arange(len(groups), device=predicted.device) // unit
    together = (group[:, None] == group[None]) & (place[:, None] == place[None])
    better = (target[:, None] - target[None] > gap) & together[..., None]
    pairs = len(groups) * (unit - 1) / 2
    terms = torch.where(better, -logsigmoid(predicted[:, None] - predicted[None]), 0.0)
    return terms.sum() / (pairs * predicted.shape[1])
