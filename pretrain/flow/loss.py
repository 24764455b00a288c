"""Flow-matching loss: pure functions of latents, noise and timesteps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from core.training.randomness import torch_generator

_STREAM = 21  # apart from what else draws from the same seed


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Static timestep shift of SD3: more of the budget at high noise for shift > 1."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def draw_sigmas(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """`count` noise levels in (0, 1): logit-normal(0, 1), then shifted. The density is our choice: UniPic 2.0
    does not publish its own; this is SD3's."""
    return shift_sigma(torch.sigmoid(torch.randn(count, generator=generator)), shift)


def draw_noise(
    seed: int, step: int, places: Sequence[int], shape: Sequence[int], shift: float
) -> tuple[Tensor, Tensor]:
    """Noise levels [B] in (0, 1), see `draw_sigmas`, and standard normal noise [B, *shape].

    Those of a sample follow from (seed, step, its place in the global batch), whatever the ranks.
    """
    sigmas, noises = [], []
    for place in places:
        generator = torch_generator(seed, step, _STREAM, place)
        sigmas.append(draw_sigmas(1, shift, generator))
        noises.append(torch.randn(tuple(shape), generator=generator))
    return torch.cat(sigmas), torch.stack(noises)


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma eps; clean and noise B C H W, sigma B."""
    sigma = sigma.view(-1, *[1] * (clean.ndim - 1))
    return (1 - sigma) * clean + sigma * noise


def velocity_error(prediction: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error per sample, B, of the predicted velocity against eps - x0 (all B C H W)."""
    return (prediction.float() - (noise - clean)).square().flatten(1).mean(dim=1)


def prompt_dropout_mask(count: int, rate: float, generator: torch.Generator) -> Tensor:
    """Bool B: which samples are trained on the empty prompt, so that guidance has an unconditional half."""
    return torch.rand(count, generator=generator) < rate
