"""Trajectories of a flow-matching transformer with classifier-free guidance, and their replay with gradient.

Usable without any actor: give a transformer, latents and conditioning. Conditional and unconditional rows
run as two forwards here and in the replay, so that a chunk and a micro-batch of the same size see the same
kernels: in bfloat16 a different batch shape alone moves the log-probability.

Shapes: B samples, T steps of the schedule, S stochastic steps, C H W latents, L text tokens, D width, P pooled.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from core.seeds import derive_seed
from rollout.flow_sde import FlowSDEStep, Variant, flow_sde_step

CFGGradient = Literal["conditional", "both"]


@dataclass(frozen=True)
class Conditioning:
    """What one prompt tells the transformer: prompt_embeds [L, D], pooled [P], reference latents [C, h, w].

    The negative_* are the negative prompt's, where it is read beside this prompt's picture (MetaQuery, editing);
    elsewhere the run has one for all.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    reference_latents: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None


@dataclass(frozen=True)
class ConditioningBatch:
    """The same for B samples, on the transformer's device and in its dtype."""

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    reference_latents: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None

    @staticmethod
    def stack(items: Sequence[Conditioning], *, device: Any, dtype: torch.dtype) -> ConditioningBatch:
        """Raises ValueError where some samples have a reference, or a negative of their own, and others have none."""

        def gather(name: str) -> Tensor | None:
            tensors = [getattr(item, name) for item in items]
            if all(tensor is None for tensor in tensors):
                return None
            if any(tensor is None for tensor in tensors):
                what = (
                    "a reference image" if name == "reference_latents" else "a negative prompt of their own"
                )
                raise ValueError(f"samples with and without {what} cannot share a batch")
            return torch.stack(tensors).to(device=device, dtype=dtype)

        return ConditioningBatch(**{field.name: gather(field.name) for field in fields(ConditioningBatch)})  # type: ignore[arg-type]

    def rows(self, index: Tensor) -> ConditioningBatch:
        """The samples that `index` [n] int64 names."""

        def pick(name: str) -> Tensor | None:
            tensor = getattr(self, name)
            return None if tensor is None else tensor[index]

        return ConditioningBatch(**{field.name: pick(field.name) for field in fields(ConditioningBatch)})  # type: ignore[arg-type]

    def unconditional(self, shared: Conditioning | None) -> ConditioningBatch:
        """The unconditional rows, with the same reference images: the samples' own negatives, else the `shared` one."""
        if self.negative_prompt_embeds is not None and self.negative_pooled_prompt_embeds is not None:
            return ConditioningBatch(
                self.negative_prompt_embeds, self.negative_pooled_prompt_embeds, self.reference_latents
            )
        assert shared is not None
        size, like = len(self.prompt_embeds), self.prompt_embeds
        embeds = shared.prompt_embeds.to(device=like.device, dtype=like.dtype)
        pooled = shared.pooled_prompt_embeds.to(device=like.device, dtype=like.dtype)
        return ConditioningBatch(
            embeds.expand(size, *embeds.shape), pooled.expand(size, *pooled.shape), self.reference_latents
        )


@dataclass(frozen=True)
class SamplingSpec:
    """How trajectories are drawn; the learner replays them under the same values.

    `window_size` consecutive steps, starting somewhere in [window_first, window_last - window_size], are
    stochastic and the rest are ODE steps; 0 means all T steps.

    `branch`: the samples of a group share their initial noise, so that they are one trajectory up to the first
    stochastic step and its velocity is one forward for all of them, in the rollout and in the replay.
    """

    num_steps: int
    noise_level: float
    guidance_scale: float
    variant: Variant = "sde"
    window_size: int = 0
    window_first: int = 0
    window_last: int = 0
    branch: bool = False

    def stochastic_steps(self, seed: int) -> tuple[int, ...]:
        """Which steps are stochastic for a group with this seed (never a matter of the request or worker)."""
        if self.variant == "ode" or self.noise_level == 0:
            return ()
        if self.window_size == 0:
            return tuple(range(self.num_steps))
        choices = self.window_last - self.window_size - self.window_first + 1
        start = self.window_first + derive_seed("window", seed) % choices
        return tuple(range(start, start + self.window_size))


@dataclass(frozen=True)
class Trajectory:
    """The stochastic stretch of n sampled trajectories, as the learner replays it (CPU, float32).

    latents [n, S+1, C, H, W]: the latents before each stochastic step and after the last; log_probs [n, S];
    steps: the S step indices into `sigmas` [T+1]; final_latents [n, C, H, W].
    """

    latents: Tensor
    log_probs: Tensor
    steps: tuple[int, ...]
    sigmas: Tensor
    final_latents: Tensor


def sigma_table(scheduler: Any, num_steps: int) -> Tensor:
    """The scheduler's own sigmas [T+1], float32 from 1 to 0. Taken from the library because its static shift
    is applied twice at the low end; recomputing it gives another schedule."""
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(num_steps)
    return scheduler.sigmas.to(torch.float32).cpu()


def guided_velocity(
    transformer: torch.nn.Module,
    sample: Tensor,
    sigma: Tensor,
    positive: ConditioningBatch,
    negative: Conditioning | None,
    guidance_scale: float,
    *,
    cfg_gradient: CFGGradient = "conditional",
) -> Tensor:
    """Velocity [B, C, H, W] with classifier-free guidance `u + s (c - u)`; one forward when s is 1.

    `cfg_gradient="conditional"` is a semi-gradient: d[u + s (c - u)] has a (1 - s) du part that is dropped, and
    the unconditional half runs without saving activations. `"both"` is the full gradient.

    sample [B, C, H, W] float32; sigma [B]; negative: the run's, unless the samples bring their own.
    """
    conditional = _velocity(transformer, sample, sigma, positive)
    if guidance_scale == 1.0:
        return conditional
    if negative is None and positive.negative_prompt_embeds is None:
        raise ValueError(f"guidance_scale={guidance_scale} needs the negative prompt's conditioning")
    negative_rows = positive.unconditional(negative)
    with torch.no_grad() if cfg_gradient == "conditional" else nullcontext():
        unconditional = _velocity(transformer, sample, sigma, negative_rows)
    return unconditional.float() + guidance_scale * (conditional.float() - unconditional.float())


def _velocity(
    transformer: torch.nn.Module, sample: Tensor, sigma: Tensor, batch: ConditioningBatch
) -> Tensor:
    return transformer(
        hidden_states=sample.to(batch.prompt_embeds.dtype),
        encoder_hidden_states=batch.prompt_embeds,
        pooled_projections=batch.pooled_prompt_embeds,
        timestep=sigma * 1000.0,
        reference_hidden_states=batch.reference_latents,
        return_dict=False,
    )[0]


@torch.no_grad()
def sample_trajectories(
    transformer: torch.nn.Module,
    positive: ConditioningBatch,
    negative: Conditioning | None,
    spec: SamplingSpec,
    sigmas: Tensor,
    latent_shape: tuple[int, int, int],
    generators: Sequence[torch.Generator],
    steps: tuple[int, ...],
    trunk: torch.Generator | None = None,
) -> Trajectory:
    """Sample B = len(generators) trajectories; sample k's initial and step noise come from generators[k] alone.

    `steps` (from `SamplingSpec.stochastic_steps`) are the stochastic ones, consecutive; () is pure ODE sampling.
    With `trunk` the initial noise is one draw from it for all B, which then must be samples of one prompt, and a
    single row runs until the first stochastic step. Raises ValueError where there is none to branch at.
    """
    if trunk is not None and not steps:
        raise ValueError("a trunk without a stochastic step would give the same sample B times")
    device = positive.prompt_embeds.device
    noise = [torch.randn(latent_shape, generator=g) for g in (generators if trunk is None else [trunk])]
    x = torch.stack(noise).to(device)
    kept, log_probs, every = [], [], positive
    positive = every if trunk is None else every.rows(torch.zeros(1, dtype=torch.long, device=device))
    for t in range(spec.num_steps):
        stochastic = t in steps
        sigma = sigmas[t].expand(len(x)).to(device)
        velocity = guided_velocity(transformer, x, sigma, positive, negative, spec.guidance_scale)
        if stochastic and len(x) < len(generators):
            size, positive = len(generators), every
            x, velocity = x.expand(size, *x.shape[1:]), velocity.expand(size, *velocity.shape[1:])
        if stochastic:
            kept.append(x.cpu())
        step = flow_sde_step(
            velocity,
            x,
            float(sigmas[t]),
            float(sigmas[t + 1]),
            sigma_clip=float(sigmas[1]),
            noise_level=spec.noise_level,
            variant=spec.variant if stochastic else "ode",
            generator=generators,
        )
        x = step.prev_sample
        if stochastic:
            assert step.log_prob is not None
            log_probs.append(step.log_prob.cpu())
            if t == steps[-1]:
                kept.append(x.cpu())
    empty = torch.empty(len(x), 0)
    return Trajectory(
        latents=torch.stack(kept, 1) if kept else empty,
        log_probs=torch.stack(log_probs, 1) if log_probs else empty,
        steps=steps,
        sigmas=sigmas,
        final_latents=x.cpu(),
    )


def replay_step(
    transformer: torch.nn.Module,
    sample: Tensor,
    prev_sample: Tensor,
    step_index: Tensor,
    sigmas: Tensor,
    positive: ConditioningBatch,
    negative: Conditioning | None,
    spec: SamplingSpec,
    *,
    cfg_gradient: CFGGradient = "conditional",
    trunks: Tensor | None = None,
) -> FlowSDEStep:
    """The step that a stored trajectory took, under the transformer's present weights, with gradient.

    sample, prev_sample [B, C, H, W] float32; step_index [B] int64, which may differ between samples. `trunks` [B]
    int64: rows with the same number have the same sample, step and conditioning, and share one forward.
    Raises ValueError where the step was an ODE step (it has no log-probability).
    """
    if spec.variant == "ode" or spec.noise_level == 0:
        raise ValueError(
            "ODE steps have no log-probability and cannot be trained on; use variant 'sde' or 'cps'"
        )
    device = sample.device
    table = sigmas.to(device)
    sigma, sigma_next = table[step_index], table[step_index + 1]
    if trunks is None:
        velocity = guided_velocity(
            transformer, sample, sigma, positive, negative, spec.guidance_scale, cfg_gradient=cfg_gradient
        )
    else:
        first, owner = _first_rows(trunks)
        first, owner = first.to(device), owner.to(device)
        velocity = guided_velocity(
            transformer, sample[first], sigma[first], positive.rows(first), negative, spec.guidance_scale,
            cfg_gradient=cfg_gradient,
        )[owner]  # fmt: skip
    return flow_sde_step(
        velocity,
        sample,
        sigma,
        sigma_next,
        sigma_clip=float(sigmas[1]),
        noise_level=spec.noise_level,
        variant=spec.variant,
        prev_sample=prev_sample,
    )


def _first_rows(trunks: Tensor) -> tuple[Tensor, Tensor]:
    """The first row of every trunk [U], and for each row [B] which of these it belongs to."""
    numbers, owner = torch.unique(trunks.cpu(), return_inverse=True)
    first = torch.full((len(numbers),), len(trunks)).scatter_reduce(
        0, owner, torch.arange(len(trunks)), reduce="amin"
    )
    return first, owner
