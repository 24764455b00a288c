"""Parameters and shapes of a recipe's models, counted on the meta device: no weights, no GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import recipes
from models.kontext import KontextTransformer
from models.metaquery.conditioner import MetaQueryConditioner
from models.metaquery.config import MetaQueryConfig
from models.qwen25_vl import qwen25_vl_7b
from models.sd35_medium import sd35_medium_config
from pretrain.flow.config import FlowRecipe
from pretrain.flow.model import conditioner_config


@dataclass(frozen=True)
class VlmSizes:
    """parameters: of the whole model; text, vision: of the blocks, which every token or patch passes."""

    parameters: int
    text: int
    vision: int
    layers: int
    width: int


@dataclass(frozen=True)
class ModelSizes:
    """transformer: its config; factor: pixels of a latent's side; parameters by part; text_tokens: what the
    transformer reads beside the pictures; position_values: of its table, which is no parameter. `notes` say which
    shapes are published ones, since a folder is absent."""

    transformer: Mapping[str, Any]
    factor: int
    parameters: Mapping[str, int]
    position_values: int
    text_tokens: int
    conditioner: MetaQueryConfig | None
    vlm: VlmSizes | None
    notes: tuple[str, ...]


def measure(recipe: FlowRecipe) -> ModelSizes:
    """Sizes from the folders' configs; published shapes (SD3.5-Medium, Qwen2.5-VL-7B) stand in for absent ones."""
    notes: list[str] = []
    folder = recipes.resolve(recipe.model.path)
    shape = _read(folder / "transformer" / "config.json") or _absent(
        notes, "model.path", "SD3.5-Medium", sd35_medium_config()
    )
    vae = _read(folder / "vae" / "config.json")
    with torch.device("meta"):
        transformer = KontextTransformer.from_config(shape)
    parameters = {"transformer": _count(transformer)}
    conditioner = vlm = None
    if recipe.uses_vlm:
        vlm = _measure_vlm(recipe, notes)
        conditioner = _conditioner(recipe, vlm.width, shape, notes)
        with torch.device("meta"):
            made = MetaQueryConditioner(conditioner)
        parameters["queries"] = made.meta_queries.numel()
        parameters["connector"] = _count(made) - parameters["queries"]
    clip = _read(folder / "text_encoder" / "config.json") or {}
    words = clip.get("max_position_embeddings", 77) + recipe.model.max_sequence_length
    return ModelSizes(
        transformer=shape,
        factor=2 ** (len(vae["block_out_channels"]) - 1) if vae else 8,
        parameters=parameters,
        position_values=sum(buffer.numel() for buffer in transformer.buffers()),
        text_tokens=words if conditioner is None else conditioner.num_queries,
        conditioner=conditioner,
        vlm=vlm,
        notes=tuple(notes),
    )


def _measure_vlm(recipe: FlowRecipe, notes: list[str]) -> VlmSizes:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    shape = _read(recipes.resolve(str(recipe.model.vlm)) / "config.json") or _absent(
        notes, "model.vlm", "Qwen2.5-VL-7B", qwen25_vl_7b()
    )
    config = Qwen2_5_VLConfig(**shape)
    with torch.device("meta"):
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
    text: Any = config.text_config
    return VlmSizes(
        _count(model),
        _count(model.model.language_model.layers),
        _count(model.model.visual.blocks),
        text.num_hidden_layers,
        text.hidden_size,
    )


def _conditioner(
    recipe: FlowRecipe, width: int, shape: Mapping[str, Any], notes: list[str]
) -> MetaQueryConfig:
    if recipe.model.conditioner is not None:
        saved = _read(recipes.resolve(recipe.model.conditioner) / "conditioner" / "config.json")
        if saved is not None:
            return MetaQueryConfig.from_dict(saved)
        notes.append("model.conditioner is absent, so its numbers are those of model.connector")
    return conditioner_config(recipe.model.connector, width, dict(shape))


def _absent(notes: list[str], key: str, name: str, shape: dict[str, Any]) -> dict[str, Any]:
    notes.append(f"{key} is absent, so these are the numbers of {name}'s published shape")
    return shape


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
