"""ODE sampling of latents with classifier-free guidance, for previews and evaluation."""

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from models.kontext import KontextTransformer


def guided_velocity(
    transformer: KontextTransformer,
    latents: Tensor,
    timestep: Tensor,
    prompt: tuple[Tensor, Tensor],
    negative: tuple[Tensor, Tensor],
    references: Tensor | None,
    guidance: float,
) -> Tensor:
    """u + s (c - u), float32; at guidance 1 the unconditional half is not run.

    latents B C H W; timestep B; prompt and negative (B L D, B P); the reference stays in both halves. All but the
    timestep are cast to the transformer's dtype.
    """
    dtype = transformer.dtype
    latents = latents.to(dtype)
    references = None if references is None else references.to(dtype)
    prompt, negative = ((embeds.to(dtype), pooled.to(dtype)) for embeds, pooled in (prompt, negative))
    if guidance == 1:
        return transformer(latents, *prompt, timestep, reference_hidden_states=references, return_dict=False)[
            0
        ].float()
    both = [torch.cat(pair) for pair in zip(negative, prompt, strict=True)]
    twice = None if references is None else torch.cat([references, references])
    output = transformer(
        torch.cat([latents, latents]),
        *both,
        torch.cat([timestep, timestep]),
        reference_hidden_states=twice,
        return_dict=False,
    )[0].float()
    unconditional, conditional = output.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


@torch.no_grad()
def sample_latents(
    transformer: KontextTransformer,
    scheduler: FlowMatchEulerDiscreteScheduler,
    noise: Tensor,
    prompt: tuple[Tensor, Tensor],
    negative: tuple[Tensor, Tensor],
    references: Tensor | None = None,
    *,
    guidance: float = 1.0,
    steps: int = 10,
) -> Tensor:
    """Euler steps along the scheduler's sigma table from `noise` (B C H W) to clean latents, in float32."""
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.tolist()
    latents = noise
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        timestep = torch.full((len(noise),), 1000 * sigma, device=noise.device)
        velocity = guided_velocity(transformer, latents, timestep, prompt, negative, references, guidance)
        latents = latents + (following - sigma) * velocity
    return latents
