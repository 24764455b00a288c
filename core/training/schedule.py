"""How a supervised training moves its weights: the settings, and the learning rate at each step. Needs no torch."""

import math
from dataclasses import dataclass
from typing import Protocol


@dataclass
class Optimization:
    """How weights move. Warm-up is linear, then a cosine down to `final_lr_fraction` of the peak."""

    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    muon_lr: float = 0.0
    """Peak learning rate of Muon (RMS-matched to AdamW) for matrices inside blocks; 0 = AdamW for all."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    """On parameters of two or more dimensions only."""
    gradient_clip: float = 1.0
    warmup_fraction: float = 0.01
    final_lr_fraction: float = 0.0
    ema_decay: float = 0.999


class Schedule(Protocol):
    """What a recipe says of the course of the learning rate."""

    warmup_fraction: float
    final_lr_fraction: float


def lr_factor(step: int, steps: int, settings: Schedule) -> float:
    """Share of the peak learning rate at `step` (0-based) of `steps`: linear warm-up, then cosine."""
    warmup = max(1, round(settings.warmup_fraction * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    floor = settings.final_lr_fraction
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
