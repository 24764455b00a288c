"""Rehearsal: a stage that keeps what the stages before it trained. Not in the paper, and off unless a recipe asks.

A stage's KL looks at the states of its own task alone, so text-to-image updates can undo editing unseen. A stage with
`rehearsal` draws, at its start and with its first policy, pictures of the other tasks' prompts of earlier stages (no
rewards). Each optimizer update adds `beta |v - v_start|^2` at noised versions of a few of them: v is the velocity that
the sampler uses, v_start that of the adapter at the stage's start, the mean runs over states and latent elements.

The pictures follow from the stage's first adapter and the run's seed, so a resumed run draws them again instead of
reading them from a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.seeds import derive_seed
from models.conditioning import Conditioning, ConditioningBatch
from rl.recipe.schema import RehearsalConfig
from rollout.shapes import Shape


@dataclass(frozen=True)
class SampledPicture:
    """One picture as the rollout left it: row `row` of a trajectory, and its conditioning (both references); `shape` is
    that of its tensors, None where all have one."""

    trajectory: Any
    row: int
    conditioning: Any
    shape: Shape | None = None


@dataclass(frozen=True)
class RehearsalPicture:
    """One drawn picture with its tensors: latents [C, H, W] (CPU, float32); `shape` as in `SampledPicture`."""

    latents: Tensor
    conditioning: Conditioning
    shape: Shape | None = None


@dataclass(frozen=True)
class RehearsalBatch:
    """B states of one shape: x [B, C, H, W] float32 at noise level sigma [B], and what conditions them."""

    x: Tensor
    sigma: Tensor
    conditioning: ConditioningBatch


def rank_share(pictures: Sequence[SampledPicture], rank: int, ranks: int) -> list[SampledPicture]:
    """The pictures that one rank draws its states from; never none."""
    return list(pictures[rank::ranks]) or [pictures[rank % len(pictures)]]


class Rehearsal:
    """One rank's pictures, and the states that an update takes from them."""

    def __init__(
        self,
        config: RehearsalConfig,
        pictures: Sequence[RehearsalPicture],
        sigmas: Tensor,
        *,
        rank: int,
        ranks: int,
        micro_batch_size: int,
    ):
        self.beta, self.pictures, self.sigmas, self.rank = config.beta, list(pictures), sigmas, rank
        samples = -(-config.samples // ranks)
        self.micro_batches = -(-samples // micro_batch_size)
        self.size = -(-samples // self.micro_batches)

    def batches(self, seed: int, *, device: str, dtype: torch.dtype) -> Iterator[RehearsalBatch]:
        """The states of one update, a function of `seed` and the rank. Noise levels are spread as the sampler spreads
        its steps: uniform along the schedule, between its points too."""
        generator = torch.Generator().manual_seed(derive_seed("rehearsal", seed, self.rank))
        for _ in range(self.micro_batches):
            picked = self._alike(
                torch.randint(len(self.pictures), (self.size,), generator=generator).tolist()
            )
            sigma = _between(self.sigmas, torch.rand(self.size, generator=generator))
            clean = torch.stack([self.pictures[i].latents for i in picked])
            noise = torch.randn(clean.shape, generator=generator)
            level = sigma.reshape(-1, *[1] * (clean.dim() - 1))
            conditioning = [self.pictures[i].conditioning for i in picked]
            yield RehearsalBatch(
                ((1 - level) * clean + level * noise).to(device),
                sigma.to(device),
                ConditioningBatch.stack(conditioning, device=device, dtype=dtype),
            )

    def _alike(self, picked: list[int]) -> list[int]:
        """The same picks where all have the shape of the first; others give way to one that has."""
        shape = self.pictures[picked[0]].shape
        same = [place for place, picture in enumerate(self.pictures) if picture.shape == shape]
        return [p if self.pictures[p].shape == shape else same[p % len(same)] for p in picked]


def _between(sigmas: Tensor, position: Tensor) -> Tensor:
    """sigmas [T+1] read at `position` [B] in [0, 1), 0 being the first, linear between its points."""
    scaled = position * (len(sigmas) - 1)
    left = scaled.floor().long()
    return torch.lerp(sigmas[left], sigmas[left + 1], scaled - left)
