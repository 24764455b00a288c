"""Exponential moving average of the trained weights, each rank keeping its own shard in float32.

ZeRO gives every rank a part of the float32 master weights; the average follows that part and costs 4 bytes a trained
parameter over all ranks together. To read it whole it takes the place of the master weights for a moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.flow.model import trained


class ShardedAverage:
    """The decay is min(decay, (1 + n) / (10 + n)) after n updates: an early average is not all initial weights."""

    def __init__(self, engine: Any, decay: float):
        self._optimizer = engine.optimizer
        self._decay = decay
        self.updates = 0
        self.shards: list[Tensor] = [master.detach().clone() for master in self._masters]

    @property
    def _masters(self) -> list[Tensor]:
        return master_weights(self._optimizer)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shards, self._masters, 1 - decay)
        self.updates += 1

    def whole(self, model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
        """The average of every trained parameter by name, float32 on the CPU; a collective.

        Ranks without `keep` take part and get nothing.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        found: dict[str, Tensor] = {}
        with self._in_place():
            for name, parameter in trained(model):
                full = safe_get_full_fp32_param(parameter)
                if keep:
                    found[name] = full.detach().to("cpu", torch.float32, copy=True)
        return found

    def state(self) -> dict[str, Tensor]:
        """This rank's shards, for its file in a checkpoint."""
        return {f"shard_{i}": shard.cpu() for i, shard in enumerate(self.shards)}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor], updates: int) -> None:
        """Restore what `state` gave. Raises ValueError where the shards are cut otherwise."""
        saved = [state[f"shard_{i}"] for i in range(len(state))]
        shapes = [tuple(shard.shape) for shard in saved], [tuple(shard.shape) for shard in self.shards]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the saved average has shards {shapes[0]}, this run {shapes[1]}: ranks, ZeRO stage and trained parts "
                "must be those of the checkpoint"
            )
        for shard, stored in zip(self.shards, saved, strict=True):
            shard.copy_(stored)
        self.updates = updates

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for master, shard in zip(self._masters, self.shards, strict=True):
            live = master.detach().clone()
            master.copy_(shard)
            shard.copy_(live)


def master_weights(optimizer: Any) -> list[Tensor]:
    """This rank's flat float32 parts of the trained weights, under ZeRO-1, 2 or 3."""
    names = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    for name in names:
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    raise TypeError(f"{type(optimizer).__name__} of DeepSpeed has none of {', '.join(names)}")
