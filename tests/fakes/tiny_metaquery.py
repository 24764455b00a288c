"""A complete tiny MetaQuery model of the real classes with random weights, in the released folder layout."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from models.metaquery.conditioner import MetaQueryConditioner
from models.metaquery.config import ConnectorConfig, MetaQueryConfig
from tests.fakes.tiny_models import TRANSFORMER_CONFIG, make_tiny_folder
from tests.fakes.tiny_vlm import HIDDEN_SIZE, make_tiny_vlm

TINY_CONFIG = MetaQueryConfig(
    connector_config=ConnectorConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    ),
    num_queries=6,
    llm_hidden_size=HIDDEN_SIZE,
    pooled_projection_dim=int(TRANSFORMER_CONFIG["pooled_projection_dim"]),
    joint_attention_dim=int(TRANSFORMER_CONFIG["joint_attention_dim"]),
)


def make_tiny_conditioner(*, seed: int = 0, **changes: int) -> MetaQueryConditioner:
    """Random weights, ten times the usual linears, so that what the VLM reads shows in the images; `changes`
    override the config."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        conditioner = MetaQueryConditioner(replace(TINY_CONFIG, **changes)).eval()
    with torch.no_grad():
        for name, parameter in conditioner.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                parameter *= 10
    return conditioner


def make_tiny_metaquery(path: str | Path, *, seed: int = 0) -> tuple[Path, Path]:
    """Write `path/model` (transformer, vae, scheduler, conditioner) and `path/vlm`; returns both folders."""
    path = Path(path)
    folder = make_tiny_folder(path / "model", seed=seed)
    for part in folder.iterdir():
        if part.name.startswith(("text_encoder", "tokenizer")):
            shutil.rmtree(part)
    make_tiny_conditioner(seed=seed).save_pretrained(folder / "conditioner")
    return folder, make_tiny_vlm(path / "vlm", seed=seed)
