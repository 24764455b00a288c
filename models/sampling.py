"""Classifier-free guidance, and the Euler steps of an ODE sampler, for pictures, previews, rollouts and replays alike.

Shapes: B samples, C H W latents, T steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from models.conditioning import Conditioning, ConditioningBatch
from models.kontext import KontextTransformer

CFGGradient = Literal["conditional", "both"]


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
    joined: bool = False,
) -> Tensor:
    """Velocity [B, C, H, W] with classifier-free guidance `u + s (c - u)`; one forward, of
    the prompt alone, up to s = 1, below which guidance would lead towards the negative prompt.

    `cfg_gradient="conditional"` is a semi-gradient: d[u + s (c - u)] has a (1 - s) du part that is dropped, and
    the unconditional half runs without saving activations. `"both"` is the full gradient.

    `joined` runs both halves as one forward of 2B rows, unconditional first: faster where the batch is small, with
    other last bits than two forwards of B rows, which rollout and replay need to agree in.

    sample [B, C, H, W] float32; sigma [B]; negative: the run's, unless the samples bring their own. The result is
    float32 where it is guided, else of the transformer's dtype.
    """
    if guidance_scale <= 1.0:
        return _velocity(transformer, sample, sigma, positive)
    if negative is None and positive.negative_prompt_embeds is None:
        raise ValueError(f"guidance_scale={guidance_scale} needs the negative prompt's conditioning")
    negative_rows = positive.unconditional(negative)
    if joined:
        both = negative_rows.followed_by(positive)
        velocity = _velocity(transformer, sample.repeat(2, 1, 1, 1), sigma.repeat(2), both)
        unconditional, conditional = velocity.chunk(2)
    else:
        conditional = _velocity(transformer, sample, sigma, positive)
        with torch.no_grad() if cfg_gradient == "conditional" else nullcontext():
            unconditional = _velocity(transformer, sample, sigma, negative_rows)
    return unconditional.float() + guidance_scale * (conditional.float() - unconditional.float())


@torch.no_grad()
def sample_latents(
    transformer: KontextTransformer,
    sigmas: Tensor,
    noise: Tensor,
    prompts: ConditioningBatch,
    guidance_scale: float,
    *,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Tensor:
    """Euler steps along `sigmas` [T+1] from `noise` [B, C, H, W] to clean latents, in float32.

    With guidance the prompts bring negatives of their own. `progress` wraps the steps, for a bar.
    """
    prompts = prompts.to(noise.device, transformer.dtype)
    latents = noise
    for t in progress(range(len(sigmas) - 1)):
        sigma = sigmas[t].expand(len(noise)).to(noise.device)
        velocity = guided_velocity(transformer, latents, sigma, prompts, None, guidance_scale, joined=True)
        latents = latents + float(sigmas[t + 1] - sigmas[t]) * velocity.float()
    return latents


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
