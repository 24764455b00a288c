"""What of a model is trained, and the optimizers that move it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from core.training.schedule import Optimization


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that are trained, in a fixed order."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


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
