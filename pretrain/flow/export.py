"""The averaged weights as a model folder in the released layout, and as a model to draw with."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import recipes
from core.training.optimization import trained_parameters
from models.components import save_component
from models.folders import TEXT_PARTS
from pretrain.flow.config import FlowRecipe
from pretrain.flow.model import FlowModel, load_model, set_trained


def averaged_model(recipe: FlowRecipe, average: Mapping[str, Tensor]) -> FlowModel:
    """The recipe's start with the average in the place of what is trained; frozen, in eval mode, on the CPU.

    Raises ValueError where the average is not of exactly the trained parts.
    """
    model = load_model(recipe)
    set_trained(model, recipe)
    wanted = dict(trained_parameters(model))
    if wanted.keys() != average.keys():
        differing = sorted(wanted.keys() ^ average.keys())
        raise ValueError(
            f"the average and the trained parts differ in {len(differing)} names, first {differing[0]}"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(average[name].view_as(parameter))
    return model.requires_grad_(False).eval()


def export_model(recipe: FlowRecipe, average: Mapping[str, Tensor], folder: Path) -> None:
    """Write `transformer/ vae/ scheduler/` and the text encoders, or `conditioner/`; copies what is frozen as it is."""
    base, dtype = recipes.resolve(recipe.model.path), getattr(torch, recipe.export_dtype)
    model = averaged_model(recipe, average)
    copied = ["vae", "scheduler"]
    if recipe.trains("transformer"):
        # diffusers overrides `to` with a warning about nothing kept in float32.
        save_component(nn.Module.to(model.transformer, dtype), folder / "transformer")
    else:
        copied.append("transformer")
    if model.conditioner is None:
        copied += TEXT_PARTS
    else:
        save_component(model.conditioner.to(dtype), folder / "conditioner")
    for part in copied:
        shutil.copytree(base / part, folder / part, dirs_exist_ok=True)
