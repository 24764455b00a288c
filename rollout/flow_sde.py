"""One step of a flow-matching sampler, with the log-probability that a policy gradient needs.

Convention: `x_sigma = (1 - sigma) x0 + sigma eps`, the network predicts `v = eps - x0`, sigma falls
from 1 to 0, so `dt = sigma_next - sigma` is negative. All arithmetic is float32: latents rounded to
bfloat16 after the log-probability was taken bias it by -3.5e-2 at the end of a 10-step schedule.

Shapes: B samples, then any latent shape (C H W).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Variant = Literal["sde", "cps", "ode"]


@dataclass(frozen=True)
class FlowSDEStep:
    """What one step gives: everything the objective needs, nothing recomputed later.

    prev_sample [B, ...] float32, the next latents; log_prob [B] float32, or None where the step is
    deterministic; mean [B, ...] of the step's Gaussian; diffusion [B] = g; step_std [B] = g sqrt(-dt).
    """

    prev_sample: Tensor
    log_prob: Tensor | None
    mean: Tensor
    diffusion: Tensor
    step_std: Tensor


def flow_sde_step(
    velocity: Tensor,
    sample: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    sigma_clip: float,
    noise_level: float,
    variant: Variant = "sde",
    prev_sample: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> FlowSDEStep:
    """Advance `sample` from `sigma` to `sigma_next`, or score a given `prev_sample` (replay).

    Flow-GRPO's SDE (`variant="sde"`, `noise_level` = a), coefficient-preserving sampling (`"cps"`) or the
    Euler step (`"ode"`, also what `noise_level=0` means). `sigma` and `sigma_next` are floats or [B] tensors.
    `sigma_clip` (= sigmas[1]) replaces sigma in `1 - sigma` where sigma is 1, where g would be infinite.
    `generator` is one generator for the batch, or one per sample so that a sample's noise does not depend
    on its neighbours; noise is drawn on the generator's device.

    CPS drops 1 / (2 s^2) from its log-probability, as its authors do: its ratio and clip range live on another
    scale than the SDE's, and the Gaussian KL of the SDE does not apply to it.

    Raises ValueError for an unknown variant, a replay of a deterministic step, or a generator list whose
    length is not B.
    """
    sample, velocity = sample.float(), velocity.float()
    sigma, sigma_next = _per_sample(sigma, sample), _per_sample(sigma_next, sample)
    dt = sigma_next - sigma
    if variant not in ("sde", "cps", "ode"):
        raise ValueError(f"variant={variant!r}: choose 'sde', 'cps' or 'ode'")
    if variant == "ode" or noise_level == 0.0:
        if prev_sample is not None:
            raise ValueError("an ODE step is deterministic and has no log-probability to replay")
        mean = sample + velocity * dt
        zero = torch.zeros(len(sample), device=sample.device)
        return FlowSDEStep(mean, None, mean, zero, zero)

    if variant == "sde":
        mean, g = _sde_mean(velocity, sample, sigma, dt, sigma_clip, noise_level)
        std = g * torch.sqrt(-dt)
    else:
        mean, std = _cps_mean(velocity, sample, sigma, sigma_next, noise_level)
        g = std / torch.sqrt(-dt)
    if prev_sample is None:
        prev_sample = mean + std * _noise(sample, generator)
    prev_sample = prev_sample.float()
    residual = (prev_sample.detach() - mean).square()
    if variant == "sde":
        log_density = -residual / (2 * std.square()) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    else:
        log_density = -residual
    return FlowSDEStep(prev_sample, log_density.flatten(1).mean(1), mean, g.flatten(), std.flatten())


def _sde_mean(
    velocity: Tensor, sample: Tensor, sigma: Tensor, dt: Tensor, sigma_clip: float, noise_level: float
) -> tuple[Tensor, Tensor]:
    clipped = torch.where(sigma >= 1.0, torch.full_like(sigma, sigma_clip), sigma)
    g = noise_level * torch.sqrt(sigma / (1 - clipped))
    drift = g.square() / (2 * sigma)
    return sample * (1 + drift * dt) + velocity * (1 + drift * (1 - sigma)) * dt, g


def _cps_mean(
    velocity: Tensor, sample: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: float
) -> tuple[Tensor, Tensor]:
    std = sigma_next * math.sin(noise_level * math.pi / 2)
    clean = sample - sigma * velocity
    noise = sample + (1 - sigma) * velocity
    return (1 - sigma_next) * clean + torch.sqrt(sigma_next.square() - std.square()) * noise, std


def _per_sample(value: float | Tensor, sample: Tensor) -> Tensor:
    """A float or [B] tensor as float32 [B, 1, 1, ...], to broadcast against the latents."""
    value = torch.as_tensor(value, dtype=torch.float32, device=sample.device)
    return value.expand(len(sample)).reshape(-1, *[1] * (sample.dim() - 1))


def _noise(sample: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    if generator is None or isinstance(generator, torch.Generator):
        device = sample.device if generator is None else generator.device
        return torch.randn(sample.shape, generator=generator, device=device).to(sample.device)
    if len(generator) != len(sample):
        raise ValueError(f"{len(generator)} generators for {len(sample)} samples: give one per sample")
    rows = [torch.randn(sample.shape[1:], generator=g, device=g.device) for g in generator]
    return torch.stack(rows).to(sample.device)
