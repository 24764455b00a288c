"""A tiny exported EditReward with a random head, as `python -m rewards.editreward export` writes it."""

from __future__ import annotations

from pathlib import Path

import torch

from rewards.editreward.model import build_model
from rewards.editreward.settings import RUBRIC, EditRewardSettings
from rewards.editreward.train.export import write_export
from tests.fakes.tiny_vlm import make_tiny_vlm
from worlds.shapes.training.tokenizers import CHAT_TEMPLATE

DIMENSIONS = ("instruction", "preservation", "quality")


def tiny_settings(dimensions: tuple[str, ...] = DIMENSIONS, **changes: object) -> EditRewardSettings:
    """Labels from 0 to 10; another mean and deviation for each dimension."""
    values: dict[str, object] = {
        "dimensions": dimensions,
        "means": tuple(5.0 + 0.5 * k for k in range(len(dimensions))),
        "stds": tuple(2.0 + 0.25 * k for k in range(len(dimensions))),
        "score_low": 0.0,
        "score_high": 10.0,
        "combine": "geometric_mean",
        "view": "full",
        "rubric": RUBRIC,
        "chat_template": CHAT_TEMPLATE,
        "add_generation_prompt": True,
        "min_pixels": 4 * 28 * 28,
        "max_pixels": 16 * 28 * 28,
        "token_pixels": 28,
    }
    return EditRewardSettings(**(values | changes))  # type: ignore[arg-type]


def make_tiny_editreward(path: Path, settings: EditRewardSettings | None = None, *, seed: int = 0) -> Path:
    """Write the base to `path`.base and the export to `path`; returns `path`. Raw scores spread by about .15."""
    settings = settings or tiny_settings()
    base = make_tiny_vlm(path.with_name(f"{path.name}.base"), seed=seed)
    model = build_model(base, len(settings.dimensions), bias=True, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # The base answers with digits whatever it sees; here what it sees has to matter.
        model.backbone.language_model.embed_tokens.weight[:, 0] = 0.0
        for name, parameter in model.backbone.named_parameters():
            if name.endswith(("_proj.weight", "qkv.weight", "proj.weight")):
                parameter.mul_(4.0)
        model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=generator) * 0.15)
        model.score.bias.copy_(torch.randn(model.score.bias.shape, generator=generator) * 0.1)
    write_export(model, base, settings, path)
    return path
