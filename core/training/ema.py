"""Moving average of the adapter: what Flow-GRPO evaluates and ships."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class AdapterEma:
    """`average <- decay * average + (1 - decay) * live`, every `every` optimizer updates, in float32.

    Starts as a copy of the adapter it is given (the stage's start).
    """

    def __init__(self, state: Mapping[str, Tensor], *, decay: float, every: int):
        self.decay, self.every = decay, every
        self.updates = 0
        self.average = {name: tensor.detach().float().clone() for name, tensor in state.items()}

    def due(self) -> bool:
        """Counts one optimizer update; True when the average must take in the live adapter now."""
        self.updates += 1
        return self.updates % self.every == 0

    def update(self, state: Mapping[str, Tensor]) -> None:
        """Take in the live adapter (same keys as at the start)."""
        for name, tensor in state.items():
            self.average[name].mul_(self.decay).add_(tensor.float(), alpha=1 - self.decay)

    def state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The average in the dtype that replicas hold."""
        return {name: tensor.to(dtype, copy=True) for name, tensor in self.average.items()}
