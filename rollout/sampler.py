"""Trajectories of a flow-matching transformer with classifier-free guidance, and their replay with gradient.

Usable without any actor: give a transformer, latents and conditioning. Conditional and unconditional rows
run as two forwards here and in the replay, so that a chunk and a micro-batch of the same size see the same
kernels: in bfloat16 a different batch shape alone moves the log-probability.

Shapes: B samples, T steps of the schedule, S stochastic steps, C H W latents, L text tokens, D width, P pooled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.seeds import derive_seed
from models.conditioning import Conditioning, ConditioningBatch
from models.sampling import CFGGradient, guided_velocity
from rollout.flow_sde import FlowSDEStep, Variant, flow_sde_step


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
