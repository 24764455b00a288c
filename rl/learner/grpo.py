"""The clipped objective with a KL penalty: equation 2 of the paper, per sample and step.

Shapes: B (sample, step) pairs; C H W latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

KLForm = Literal["without_dt", "exact"]


@dataclass(frozen=True)
class GRPOLoss:
    """loss: the weighted sum to call backward on; statistics: detached per-pair values [B], for logging."""

    loss: Tensor
    ratio: Tensor
    policy_loss: Tensor
    kl: Tensor
    approx_kl: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def gaussian_kl(
    mean: Tensor, reference_mean: Tensor, diffusion: Tensor, step_std: Tensor, form: KLForm
) -> Tensor:
    """KL between two steps with the same noise, averaged over latent elements -> [B].

    `exact`: (mu - mu_ref)^2 / (2 g^2 (-dt)), the KL of the two Gaussians. `without_dt`: divided by 2 g^2 alone,
    which is the form that published beta = .04 values go with; it is smaller by the factor -dt.
    mean, reference_mean [B, C, H, W]; diffusion (g), step_std (g sqrt(-dt)) [B].
    """
    scale = diffusion if form == "without_dt" else step_std
    squared = (mean - reference_mean).square().flatten(1).mean(1)
    return squared / (2 * scale.square())


def grpo_loss(
    *,
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    clip_range: float,
    weights: Tensor,
    kl: Tensor | None = None,
    kl_beta: float = 0.0,
) -> GRPOLoss:
    """`sum_i w_i [ max(-A rho, -A clip(rho, 1-eps, 1+eps)) + beta KL ]` over B (sample, step) pairs.

    The paper writes a maximisation and a mean; this is its negative and the mean is in `weights` (1 / global count
    for a useful pair, 0 for padding), so that ranks with unequal numbers of useful samples add up to the
    global mean. log_prob, old_log_prob, advantages, weights, kl: [B] float32.
    """
    ratio = torch.exp(log_prob - old_log_prob)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    policy = torch.maximum(unclipped, clipped)
    penalty = torch.zeros_like(policy) if kl is None else kl
    loss = (weights * (policy + kl_beta * penalty)).sum()
    difference = (log_prob - old_log_prob).detach()
    return GRPOLoss(
        loss=loss,
        ratio=ratio.detach(),
        policy_loss=policy.detach(),
        kl=penalty.detach(),
        approx_kl=0.5 * difference.square(),
        clipped_low=ratio.detach() < 1 - clip_range,
        clipped_high=ratio.detach() > 1 + clip_range,
    )
