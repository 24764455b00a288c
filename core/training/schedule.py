"""How a supervised training moves its weights: the settings, and the learning rate at each step. Needs no torch."""

import math
from dataclasses import dataclass

from core.keys import Decay, NonNegative, Positive


@dataclass
class AdamW:
    """AdamW; linear warm-up, then a cosine; no weight decay on parameters of one dimension."""

    lr: Positive = 1e-4
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of the mean gradient and of the mean squared one."""
    eps: Positive = 1e-8
    """Term against division by zero."""
    weight_decay: NonNegative = 0.05
    """Decoupled weight decay, on parameters of two or more dimensions only."""
    gradient_clip: Positive = 1.0
    """Norm that gradients are clipped to."""
    warmup_fraction: Decay = 0.01
    """Share of the steps in which the rate rises."""
    final_lr_fraction: Decay = 0.0
    """Share of the peak that the cosine ends at."""


@dataclass
class Optimization(AdamW):
    """AdamW, or Muon for the matrices, with averaged weights beside the live ones."""

    lr: Positive = 1e-3
    muon_lr: NonNegative = 0.0
    """Peak learning rate of Muon (RMS-matched to AdamW) for matrices inside blocks; 0 = AdamW for all."""
    ema_decay: Decay = 0.999
    """What remains of the averaged weights at each step."""


def lr_factor(step: int, steps: int, settings: AdamW) -> float:
    """Share of the peak learning rate at `step` (0-based) of `steps`: linear warm-up, then cosine."""
    warmup = max(1, round(settings.warmup_fraction * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    floor = settings.final_lr_fraction
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
