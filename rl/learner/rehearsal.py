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
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import recipes
from core.prompts import Prompt, load_prompts
from core.seeds import derive_seed
from rl.recipe.schema import RehearsalConfig, RunConfig
from rl.recipe.stage_parts import rehearsed_parts
from rollout.sampler import Conditioning, ConditioningBatch, SamplingSpec

if TYPE_CHECKING:  # the learner runs without Ray too
    from rl.loop.collect import Collector, SampledPrompt
    from rollout.worker import Policy


@dataclass(frozen=True)
class RehearsalPicture:
    """One drawn picture with its tensors: latents [C, H, W] (CPU, float32)."""

    latents: Tensor
    conditioning: Conditioning


@dataclass(frozen=True)
class RehearsalBatch:
    """B states: x [B, C, H, W] float32 at noise level sigma [B], and what conditions them."""

    x: Tensor
    sigma: Tensor
    conditioning: ConditioningBatch


def rehearsal_prompts(sets: Sequence[Sequence[Prompt]], count: int, seed: int) -> list[Prompt]:
    """`count` prompts, in equal numbers from each set as far as it reaches, drawn without repetition."""
    chosen: list[Prompt] = []
    for i, prompts in enumerate(sets):
        generator = torch.Generator().manual_seed(derive_seed(seed, "rehearsal", i))
        wanted = (count - len(chosen)) // (len(sets) - i)
        chosen += [prompts[k] for k in torch.randperm(len(prompts), generator=generator)[:wanted].tolist()]
    return chosen


def draw_pictures(
    collector: Collector, config: RunConfig, index: int, policy: Policy, step: int
) -> list[SampledPrompt]:
    """Sample what stage `index` rehearses, with its first policy, on the rollout workers.

    Raises RuntimeError when no prompt could be sampled.
    """
    stage, rollout = config.stages[index], config.rollout
    assert stage.rehearsal is not None
    parts = rehearsed_parts(config.stages, index)
    sets = [load_prompts(recipes.resolve(part.prompts), part.task) for part in parts]  # type: ignore[arg-type]
    prompts = rehearsal_prompts(sets, stage.rehearsal.num_prompts, config.seed)
    seeds = [derive_seed(config.seed, stage.name, "rehearsal", i) for i in range(len(prompts))]
    spec = SamplingSpec(rollout.num_steps, 0.0, rollout.guidance_scale, variant="ode")
    pictures = collector.sample_prompts(
        prompts, seeds, spec, policy, rollout.chunk_size, step, f"rehearsal of {stage.name}"
    )
    if not pictures:
        raise RuntimeError(
            f"stage {stage.name!r}: none of its {len(prompts)} rehearsal prompts could be sampled; the log says why"
        )
    return pictures


def rank_share(pictures: Sequence[SampledPrompt], rank: int, ranks: int) -> list[SampledPrompt]:
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
            picked = torch.randint(len(self.pictures), (self.size,), generator=generator).tolist()
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


def _between(sigmas: Tensor, position: Tensor) -> Tensor:
    """sigmas [T+1] read at `position` [B] in [0, 1), 0 being the first, linear between its points."""
    scaled = position * (len(sigmas) - 1)
    left = scaled.floor().long()
    return torch.lerp(sigmas[left], sigmas[left + 1], scaled - left)
