"""The DeepSpeed engine of a rank: its configuration, and AdamW's parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pretrain.flow.config import FlowRecipe
from pretrain.flow.model import trained


def make_engine(model: nn.Module, recipe: FlowRecipe) -> Any:
    """DeepSpeed around the model, which it moves to its device; the process group must be there."""
    import deepspeed

    settings = recipe.optimization
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay), lr=settings.lr, betas=settings.betas, eps=settings.eps
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=engine_config(recipe))
    return engine


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters: those of two and more dimensions decay, biases and norms do not."""
    groups: dict[bool, list[nn.Parameter]] = {}
    for _, parameter in trained(model):
        groups.setdefault(parameter.ndim >= 2, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        for decays, parameters in groups.items()
    ]


def engine_config(recipe: FlowRecipe) -> dict[str, Any]:
    """Gradients accumulate until `engine.step()`; the loss is scaled by the caller and by nothing else."""
    zero: dict[str, Any] = {"stage": recipe.deepspeed.zero_stage, "overlap_comm": False}
    if recipe.deepspeed.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": recipe.resources.device == "cuda"}
    if recipe.deepspeed.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": recipe.resources.device == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": recipe.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": recipe.optimization.gradient_clip,
        "bf16": {"enabled": recipe.model.dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # With offload DeepSpeed would insist on an Adam of its own, which it compiles at the first start.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }
