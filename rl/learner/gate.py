"""The log-probability gate: are the rollout's log-probabilities those of the weights being trained?

A ratio of 1 at the first step proves nothing (LoRA's B is 0, so any copy of the policy agrees), and with
`old_log_prob: replay` the ratio is 1 whatever the replicas hold. Comparing the replicas' own log-probabilities with
the learner's replay, at the first update of every rollout and in both modes, catches a stale or broken copy. Where
arithmetic differs by more than a stale copy does (`LearnerConfig.log_prob_bound`), the hash of the live weights that
comes with every chunk still does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class LogProbMismatch(RuntimeError):
    """Rollout and learner disagree about the policy; training on these samples would be off-policy unawares."""


@dataclass(frozen=True)
class LogProbGaps:
    """Per trained timestep: mean absolute gap over the global batch; and the largest single gap."""

    mean_by_step: dict[int, float]
    largest: float


class LogProbGate:
    """Collects |rollout log-prob - replay log-prob| per timestep and stops above `tolerance` (per-step mean)."""

    def __init__(self, tolerance: float, num_steps: int):
        self.tolerance = tolerance
        self._sum = torch.zeros(num_steps, dtype=torch.float64)
        self._count = torch.zeros(num_steps, dtype=torch.float64)
        self._largest = torch.zeros(1, dtype=torch.float64)

    def add(self, step_index: Tensor, replayed: Tensor, rolled_out: Tensor, weights: Tensor) -> None:
        """One micro-batch [B]; samples of weight 0 are padding and do not count."""
        real = (weights > 0).cpu()
        gap = (replayed.double() - rolled_out.double()).abs().cpu()[real]
        gap = torch.nan_to_num(gap, nan=float("inf"))
        index = step_index.cpu()[real]
        self._sum.index_add_(0, index, gap)
        self._count.index_add_(0, index, torch.ones_like(gap))
        if len(gap):
            self._largest = torch.maximum(self._largest, gap.max().reshape(1))

    def check(self) -> LogProbGaps:
        """Reduce over ranks, then pass or raise LogProbMismatch on every rank alike."""
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        totals = torch.stack([self._sum, self._count]).to(device)
        largest = self._largest.to(device)
        torch.distributed.all_reduce(totals)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        seen = totals[1].nonzero().flatten().tolist()
        means = {t: float(totals[0, t] / totals[1, t]) for t in seen}
        worst = max(means, key=lambda t: means[t])
        if not means[worst] <= self.tolerance:
            raise LogProbMismatch(
                f"log-probabilities of the rollout and of the learner's replay differ by {means[worst]:.3g} on "
                f"average at step {worst} (bound learner.log_prob_tolerance={self.tolerance:g}): the replicas did "
                "not sample with the learner's adapter, or their arithmetic differs. Check the last publish in "
                "the log, and that rollout and learner use the same dtype, guidance and model folder."
            )
        return LogProbGaps(means, float(largest))
