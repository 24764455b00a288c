"""Exponential moving averages of weights: an RL adapter, whole modules, or this rank's shards under ZeRO."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from core.training.optimization import trained_parameters


class MovingAverage:
    """`average <- decay * average + (1 - decay) * live`, every `every` optimizer updates, in float32.

    Starts as a copy of the weights it is given, which every later call gives under the same names. With `ramp` the
    decay is min(decay, (1 + n) / (10 + n)) after n updates: an early average is not all initial weights.
    """

    def __init__(self, state: Mapping[str, Tensor], *, decay: float, every: int = 1, ramp: bool = False):
        self.decay, self.every, self.ramp = decay, every, ramp
        self.updates = 0
        self.average = {name: tensor.detach().float().clone() for name, tensor in state.items()}

    def due(self) -> bool:
        """Counts one optimizer update; True when the average must take in the live weights now."""
        self.updates += 1
        return self.updates % self.every == 0

    @torch.no_grad()
    def update(self, state: Mapping[str, Tensor]) -> None:
        """Take in the live weights; `due` has counted the optimizer update before."""
        averages = list(self.average.values())
        live = [state[name].detach().float() for name in self.average]
        if self.ramp:
            decay = min(self.decay, self.updates / (9 + self.updates))
            torch._foreach_lerp_(averages, live, 1 - decay)
        else:  # not as a lerp: it rounds otherwise, and runs of before continue to the bit
            torch._foreach_mul_(averages, self.decay)
            torch._foreach_add_(averages, live, alpha=1 - self.decay)

    def step(self, state: Mapping[str, Tensor]) -> None:
        """Count one optimizer update, and take in the live weights where it is due."""
        if self.due():
            self.update(state)

    def state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """A copy of the average in the dtype that replicas hold."""
        return {name: tensor.to(dtype, copy=True) for name, tensor in self.average.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Restore a saved `average`. Raises ValueError where its tensors are named or cut otherwise."""
        saved = {name: tuple(tensor.shape) for name, tensor in state.items()}
        mine = {name: tuple(tensor.shape) for name, tensor in self.average.items()}
        if saved != mine:
            raise ValueError(
                f"the saved average has shards {list(saved.values())}, this run {list(mine.values())}: ranks, ZeRO "
                "stage and trained parts must be those of the checkpoint"
            )
        for name, tensor in self.average.items():
            tensor.copy_(state[name])
        self.updates = updates

    @contextmanager
    def in_place_of(self, state: Mapping[str, Tensor]) -> Iterator[None]:
        """The live weights hold the average inside this context, and their own values again behind it."""
        self._swap(state)
        try:
            yield
        finally:
            self._swap(state)

    @torch.no_grad()
    def _swap(self, state: Mapping[str, Tensor]) -> None:
        for name, average in self.average.items():
            live = state[name].detach().clone()
            state[name].copy_(average)
            average.copy_(live)


class ShardedAverage(MovingAverage):
    """The average of what a DeepSpeed engine trains, each rank keeping that of its own part.

    ZeRO gives every rank a part of the float32 master weights; the average follows that part and costs 4 bytes a
    trained parameter over all ranks together. To be read whole it takes the place of the master weights for a while.
    """

    def __init__(self, engine: Any, decay: float):
        self._optimizer = engine.optimizer
        super().__init__(self.live(), decay=decay, ramp=True)

    def whole(self, model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
        """The average of every trained parameter by name, float32 on the CPU; a collective.

        Ranks without `keep` take part and get nothing.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        found: dict[str, Tensor] = {}
        with self.in_place_of(self.live()):
            for name, parameter in trained_parameters(model):
                full = safe_get_full_fp32_param(parameter)
                if keep:
                    found[name] = full.detach().to("cpu", torch.float32, copy=True)
        return found

    def live(self) -> dict[str, Tensor]:
        """This rank's flat float32 parts of the trained weights, under ZeRO-1, 2 or 3."""
        # ZeRO-1 and 2; ZeRO-3; ZeRO-1 of bfloat16 weights, whose gradients are summed in float32.
        names = (
            "single_partition_of_fp32_groups",
            "fp32_partitioned_groups_flat",
            "fp32_groups_flat_partition",
        )
        for name in names:
            if hasattr(self._optimizer, name):
                return {f"shard_{i}": part for i, part in enumerate(getattr(self._optimizer, name))}
        raise TypeError(f"{type(self._optimizer).__name__} of DeepSpeed has none of {', '.join(names)}")
