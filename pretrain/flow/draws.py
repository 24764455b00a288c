"""Noise level and noise of each sample: functions of (seed, step, place in the global batch), whatever the ranks."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pretrain.flow.loss import draw_sigmas

_STREAM = 21  # apart from what else draws from the same seed


def draw_noise(
    seed: int, step: int, places: Sequence[int], shape: Sequence[int], shift: float
) -> tuple[Tensor, Tensor]:
    """Noise levels [B] in (0, 1), logit-normal(0, 1) and then shifted, and standard normal noise [B, *shape]."""
    sigmas, noises = [], []
    for place in places:
        state = np.random.SeedSequence([seed, step, _STREAM, place]).generate_state(2, np.uint32)
        generator = torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))
        sigmas.append(draw_sigmas(1, shift, generator))
        noises.append(torch.randn(tuple(shape), generator=generator))
    return torch.cat(sigmas), torch.stack(noises)
