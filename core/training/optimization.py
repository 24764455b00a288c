"""Optimizers, and the moving average of the weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.training.schedule import Optimization


def build_optimizers(modules: Sequence[nn.Module], settings: Optimization) -> list[torch.optim.Optimizer]:
    """AdamW, and where `muon_lr` is set Muon for the matrices inside blocks.

    Muon takes two-dimensional weights whose name holds `blocks.` or `layers.` and not `norm`: attention and
    MLP. Modulation layers (`norm1.linear`), embeddings and the first and last projections stay with AdamW.
    Weight decay leaves one-dimensional parameters alone.
    """
    matrices, decayed, plain = [], [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            inside = ("blocks." in name or "layers." in name) and "norm" not in name
            if settings.muon_lr > 0 and parameter.ndim == 2 and inside:
                matrices.append(parameter)
            elif parameter.ndim >= 2:
                decayed.append(parameter)
            else:
                plain.append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
    ]
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=settings.muon_lr,
                weight_decay=settings.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


class WeightAverage:
    """Exponential moving average of parameters, in float32, on their device.

    The decay is min(decay, (1 + n) / (10 + n)) after n updates, so that an early average is not all initial
    weights.
    """

    def __init__(self, modules: Sequence[nn.Module], decay: float) -> None:
        self._parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        self._decay = decay
        self.updates = 0
        self.tensors: list[Tensor] = [p.detach().clone().float() for p in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.tensors, [p.detach().float() for p in self._parameters], 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average with the live weights; a second call undoes the first."""
        for parameter, average in zip(self._parameters, self.tensors, strict=True):
            live = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(live)
