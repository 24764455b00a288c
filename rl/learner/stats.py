"""Statistics of one optimizer update, weighted like the loss and reduced over ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rl.learner.gate import LogProbGaps
from rl.learner.grpo import GRPOLoss

_MEANS = ("ratio", "policy_loss", "kl", "approx_kl", "clipped_low", "clipped_high")


@dataclass(frozen=True)
class UpdateStats:
    """Global means over useful (sample, step) pairs; `gaps` only at the first update of a rollout; `rehearsal` is the
    mean squared change of velocity, None in a stage without rehearsal; `skipped`: the gradient was not finite and
    changed nothing."""

    loss: float
    policy_loss: float
    kl: float
    approx_kl: float
    ratio_mean: float
    ratio_min: float
    ratio_max: float
    clip_fraction_low: float
    clip_fraction_high: float
    grad_norm: float | None
    gaps: LogProbGaps | None
    rehearsal: float | None = None
    skipped: bool = False


class StatsAccumulator:
    """Sums per-pair values of one rank; `result` reduces over all ranks (a collective)."""

    def __init__(self, device: str):
        self._sums = torch.zeros(len(_MEANS) + 3, dtype=torch.float64, device=device)
        self._extremes = torch.tensor([-torch.inf, -torch.inf], dtype=torch.float64, device=device)
        self._kl_beta = self._rehearsal_beta = 0.0

    def add(self, loss: GRPOLoss, weights: Tensor, kl_beta: float) -> None:
        """One micro-batch of pairs; weight-0 pairs are padding."""
        w = weights.double()
        values = [(w * getattr(loss, name).double()).sum() for name in _MEANS]
        self._sums[: len(_MEANS) + 1] += torch.stack([*values, w.sum()])
        ratio = loss.ratio.double()[weights > 0]
        if len(ratio):
            self._extremes = torch.maximum(self._extremes, torch.stack([ratio.max(), -ratio.min()]))
        self._kl_beta = kl_beta

    def add_rehearsal(self, distance: Tensor, beta: float) -> None:
        """One micro-batch of rehearsal; they are of one size on all ranks."""
        self._sums[-2:] += torch.stack([distance.double(), torch.ones_like(distance, dtype=torch.float64)])
        self._rehearsal_beta = beta

    def result(
        self, grad_norm: float | Tensor | None, gaps: LogProbGaps | None, *, skipped: bool = False
    ) -> UpdateStats:
        torch.distributed.all_reduce(self._sums)
        torch.distributed.all_reduce(self._extremes, op=torch.distributed.ReduceOp.MAX)
        *sums, count, distances, rehearsed = self._sums.tolist()
        rehearsal = distances / rehearsed if rehearsed else None
        mean = {name: value / count for name, value in zip(_MEANS, sums, strict=True)}
        high, negative_low = self._extremes.tolist()
        return UpdateStats(
            loss=mean["policy_loss"] + self._kl_beta * mean["kl"] + self._rehearsal_beta * (rehearsal or 0.0),
            policy_loss=mean["policy_loss"],
            kl=mean["kl"],
            approx_kl=mean["approx_kl"],
            ratio_mean=mean["ratio"],
            ratio_min=-negative_low,
            ratio_max=high,
            clip_fraction_low=mean["clipped_low"],
            clip_fraction_high=mean["clipped_high"],
            grad_norm=None if grad_norm is None else float(grad_norm),
            gaps=gaps,
            rehearsal=rehearsal,
            skipped=skipped,
        )
