"""From scored groups to equal shares: which samples train, in which update, on which rank. Pure functions.

Invariants (per rollout): every used sample is trained exactly once; updates get whole groups; every rank runs
the same number of micro-batches of the same size, short ones filled with weight-0 copies (unequal counts would
deadlock the ranks' collectives); a micro-batch holds samples of one shape; the order is (group, k), where an update
has several shapes within each of them, whatever order the samples came in.

Worked example: 5 used groups of 4 samples, 2 updates, 2 ranks, micro-batch 4. Update 0 takes groups 0-2 (12
samples), update 1 takes 3-4 (8). Update 0 gives each rank 6 real samples and 2 of weight 0; its mean runs over 12.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from core.seeds import derive_seed
from models.conditioning import Conditioning
from rollout.sampler import Trajectory
from rollout.shapes import Shape


@dataclass(frozen=True)
class SampleRef:
    """One sample as the controller knows it: where its tensors are, and what it is worth.

    `trajectory` and `conditioning` are object references (or the objects themselves, without Ray);
    `row` is the sample's place in its trajectory; `positions` index the trajectory's stochastic steps; `shape` is
    that of its pictures, None where all have one.
    """

    group: int
    k: int
    trajectory: Any
    row: int
    conditioning: Any
    positions: tuple[int, ...]
    advantage: float
    weight: float = 1.0
    shape: Shape | None = None


@dataclass(frozen=True)
class TrainSample:
    """One sample with its tensors: latents [S+1, C, H, W], rollout log_probs [S], S stochastic step indices."""

    group: int
    k: int
    latents: torch.Tensor
    log_probs: torch.Tensor
    steps: tuple[int, ...]
    sigmas: torch.Tensor
    positions: tuple[int, ...]
    conditioning: Conditioning
    advantage: float
    weight: float

    @staticmethod
    def of(ref: SampleRef, trajectory: Trajectory, conditioning: Conditioning) -> TrainSample:
        return TrainSample(
            ref.group,
            ref.k,
            trajectory.latents[ref.row],
            trajectory.log_probs[ref.row],
            trajectory.steps,
            trajectory.sigmas,
            ref.positions,
            conditioning,
            ref.advantage,
            ref.weight,
        )


@dataclass(frozen=True)
class RankShare:
    """What one rank trains in one update; `count` is the number of real samples of all ranks together."""

    samples: tuple[SampleRef, ...]
    count: int


@dataclass(frozen=True)
class TrainBatch:
    """updates[u][r]: the share of rank r in optimizer update u. Updates without a useful sample are left out."""

    updates: tuple[tuple[RankShare, ...], ...]

    @property
    def num_samples(self) -> int:
        return sum(shares[0].count for shares in self.updates)


def trained_positions(
    steps: Sequence[int], num_steps: int, drop_last_steps: int, train_steps: int, seed: int
) -> tuple[int, ...]:
    """Which of a group's stochastic steps are trained: all but those among the schedule's last
    `drop_last_steps`, or `train_steps` of them drawn by `seed`; as ascending positions within `steps`."""
    eligible = [i for i, step in enumerate(steps) if step < num_steps - drop_last_steps]
    if train_steps and train_steps < len(eligible):
        eligible = sorted(random.Random(derive_seed("train-steps", seed)).sample(eligible, train_steps))
    return tuple(eligible)


def make_train_batch(
    samples: Sequence[SampleRef], num_updates: int, ranks: int, micro_batch_size: int
) -> TrainBatch:
    """Split used samples into `num_updates` updates of whole groups, and each update into equal rank shares.

    Raises ValueError when samples train unequal numbers of steps: their mean would not be over pairs.
    """
    if len({len(s.positions) for s in samples}) > 1:
        raise ValueError("all samples of a batch must train the same number of steps")
    ordered = sorted(samples, key=lambda s: (s.group, s.k))
    groups = sorted({s.group for s in ordered})
    updates = []
    for u in range(num_updates):
        chosen = set(
            groups[_ceil_div(len(groups) * u, num_updates) : _ceil_div(len(groups) * (u + 1), num_updates)]
        )
        part = [s for s in ordered if s.group in chosen]
        if part:
            updates.append(_shares(part, ranks, micro_batch_size))
    return TrainBatch(tuple(updates))


def _shares(samples: list[SampleRef], ranks: int, micro_batch_size: int) -> tuple[RankShare, ...]:
    if len({s.shape for s in samples}) > 1:
        return _shares_by_shape(samples, ranks, micro_batch_size)
    per_rank = _ceil_div(_ceil_div(len(samples), ranks), micro_batch_size) * micro_batch_size
    even = _ceil_div(len(samples), ranks)
    shares = []
    for rank in range(ranks):
        own = samples[rank * even : (rank + 1) * even]
        padding = replace((own or samples)[-1], weight=0.0)
        shares.append(RankShare(tuple(own + [padding] * (per_rank - len(own))), len(samples)))
    return tuple(shares)


def _shares_by_shape(
    samples: Sequence[SampleRef], ranks: int, micro_batch_size: int
) -> tuple[RankShare, ...]:
    """The micro-batches of each shape, dealt to the ranks in turn: neighbours, which run at once, are mostly alike."""
    micro_batches: list[list[SampleRef]] = []
    for shape in sorted({s.shape for s in samples if s.shape is not None}):
        alike = [s for s in samples if s.shape == shape]
        for start in range(0, len(alike), micro_batch_size):
            part = alike[start : start + micro_batch_size]
            micro_batches.append(part + _idle(part[-1:] * (micro_batch_size - len(part))))
    shares = []
    for rank in range(ranks):
        own = micro_batches[rank::ranks]
        own += [_idle((own or micro_batches)[-1])] * (_ceil_div(len(micro_batches), ranks) - len(own))
        shares.append(RankShare(tuple(s for micro_batch in own for s in micro_batch), len(samples)))
    return tuple(shares)


def _idle(samples: Sequence[SampleRef]) -> list[SampleRef]:
    return [replace(sample, weight=0.0) for sample in samples]


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
