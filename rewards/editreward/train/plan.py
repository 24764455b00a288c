"""The run in numbers before it starts: parameters, memory for each ZeRO stage, samples a second. No weights, no GPU.

Memory follows `core/training/estimates.py`, without a moving average (k = 12).

Operations of one forward (a multiply-add is 2), for T tokens and V patches:

    text     2 P_text T + 4 T² D L / 2 (causal)        vision   2 P_vision V + 4 V v D' L'

where v is the patches one patch attends to: its window, or its whole picture in the full-attention blocks. A sample
costs F forwards of each: `full` 3 (a backward is 2), `lora` 2 of text (no gradients of frozen weights) and 1 of
vision, `head` 1; gradient checkpointing adds one where there is a backward.

    samples/s = R x peak x MFU / operations of a sample
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import recipes
from core.output import disk_line
from core.training.estimates import (
    GIB,
    MFU,
    PEAK_TFLOPS,
    WIDTHS,
    activation_numbers,
    memory_line,
    zero_bytes,
)
from models.qwen25_vl import qwen25_vl_7b
from rewards.editreward.config import Recipe

CARD = "h100"
"""Whose peak an estimate of speed assumes (an H200 has the same)."""
TEXT_TOKENS = 128
"""Assumed length of template, rubric and instruction."""


@dataclass(frozen=True)
class ModelSize:
    """Counts on the meta device. text, vision: parameters of the blocks, which every token or patch passes.

    language_shape, vision_shape: the two halves of the config.
    """

    source: str
    parameters: int
    trained: int
    text: int
    vision: int
    language_shape: Any
    vision_shape: Any


def measure(recipe: Recipe) -> ModelSize:
    """Build the model without memory; where its folder is absent, in the published 7B shape.

    Raises ValueError for LoRA targets that match nothing.
    """
    from transformers import Qwen2_5_VLConfig

    from core.training.optimization import trained_parameters
    from rewards.editreward.model import meta_model
    from rewards.editreward.train.rank import choose_trainable

    file = recipes.resolve(recipe.model.path) / "config.json"
    if file.is_file():
        source, shape = str(file), json.loads(file.read_text(encoding="utf-8"))
    else:
        source, shape = "Qwen2.5-VL-7B's published shape, since the model folder is absent", qwen25_vl_7b()
    config = Qwen2_5_VLConfig(**shape)
    model = meta_model(config, len(recipe.data.dimensions), bias=recipe.model.score_bias)
    counts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "text": sum(p.numel() for p in model.backbone.language_model.layers.parameters()),
        "vision": sum(p.numel() for p in model.backbone.visual.blocks.parameters()),
    }
    choose_trainable(model, recipe)
    return ModelSize(
        source,
        trained=sum(p.numel() for _, p in trained_parameters(model)),
        language_shape=config.text_config,
        vision_shape=config.vision_config,
        **counts,
    )


def describe(recipe: Recipe) -> list[str]:
    """Lines for `--dry-run`."""
    size, train = measure(recipe), recipe.train
    per_rank = train.batch_size // train.ranks
    return [
        f"run {recipe.name}: {train.steps} steps x {train.batch_size} = {train.steps * train.batch_size} samples; "
        f"a rank takes {per_rank} in {per_rank // train.micro_batch_size} micro-batches of {train.micro_batch_size}",
        f"model: {size.parameters / 1e6:.1f} M parameters, {size.trained / 1e6:.1f} M trained "
        f"({recipe.model.trainable}; {size.source})",
        *memory_lines(recipe, size),
        disk_line(recipe.run_dir, disk_needs(recipe, size)),
        *speed_lines(recipe, size),
    ]


def disk_needs(recipe: Recipe, size: ModelSize) -> dict[str, float]:
    """Bytes that a run keeps: in a checkpoint trained weights, fp32 copy and both moments (12 bytes)."""
    kept, width = recipe.train.keep_checkpoints + 1, WIDTHS[recipe.model.dtype]
    return {
        f"{kept} checkpoints": kept * size.trained * (width + 12.0),
        "best weights": 2.0 * size.trained * width,
    }


def memory_lines(recipe: Recipe, size: ModelSize) -> list[str]:
    """One line a ZeRO stage; the recipe's own is marked."""
    lines, activations = [], activation_bytes(recipe, size)
    for stage in (1, 2, 3):
        chosen = "train.zero_stage" if stage == recipe.train.zero_stage else ""
        held = state_bytes(recipe, size, stage)
        what = "weights, gradients and optimizer"
        lines.append(memory_line(stage, held, activations, what=what, chosen=chosen))
    host = size.parameters * WIDTHS[recipe.model.dtype] / GIB
    return [*lines, f"host memory while loading: {host:.1f} GiB a rank, also with ZeRO-3"]


def state_bytes(recipe: Recipe, size: ModelSize, stage: int) -> float:
    """Weights, gradients and optimizer of one rank."""
    width, ranks = WIDTHS[recipe.model.dtype], recipe.train.ranks
    return sum(
        zero_bytes(size.parameters, size.trained, width=width, ranks=ranks, stage=stage, average=False)
    )


def sample_tokens(recipe: Recipe, size: ModelSize) -> tuple[int, int]:
    """(text-model tokens, vision patches) of one sample whose pictures fill `input.max_pixels`."""
    pictures = 2 if recipe.input.view == "full" else 1
    merge = size.vision_shape.spatial_merge_size
    merged = pictures * (recipe.input.max_pixels // (size.vision_shape.patch_size * merge) ** 2)
    return merged + TEXT_TOKENS, merge**2 * merged


def activation_bytes(recipe: Recipe, size: ModelSize) -> float:
    """Estimate for one micro-batch. Frozen parts keep nothing; a head alone needs one block at a time."""
    tokens, patches = sample_tokens(recipe, size)
    text, vision = size.language_shape, size.vision_shape
    language = (tokens, text.hidden_size, text.num_hidden_layers)
    tower = (patches, vision.hidden_size, vision.depth)
    streams = {
        "full": [language, tower],
        "language": [language],
        "lora": [language],
        "head": [(n, d, 0) for n, d, _ in (language, tower)],
    }[recipe.model.trainable]
    checkpointing = recipe.model.gradient_checkpointing or recipe.model.trainable == "head"
    numbers = activation_numbers(streams, checkpointing=checkpointing)
    return recipe.train.micro_batch_size * WIDTHS[recipe.model.dtype] * numbers


def sample_flops(recipe: Recipe, size: ModelSize) -> float:
    """Operations of training on one sample; see the module's formula."""
    tokens, patches = sample_tokens(recipe, size)
    text, vision = size.language_shape, size.vision_shape
    attention = 2 * tokens**2 * text.hidden_size * text.num_hidden_layers
    pictures = 2 if recipe.input.view == "full" else 1
    window = (vision.window_size // vision.patch_size) ** 2
    whole = len(vision.fullatt_block_indexes)
    seen = whole * patches / pictures + (vision.depth - whole) * min(window, patches / pictures)
    forward_text = 2 * size.text * tokens + attention
    forward_vision = 2 * size.vision * patches + 4 * patches * seen * vision.hidden_size
    again = int(recipe.model.gradient_checkpointing)
    factors = {
        "full": (3 + again, 3 + again),
        "language": (3 + again, 1),
        "lora": (2 + again, 1),
        "head": (1, 1),
    }
    text_passes, vision_passes = factors[recipe.model.trainable]
    return text_passes * forward_text + vision_passes * forward_vision


def speed_lines(recipe: Recipe, size: ModelSize) -> list[str]:
    """The estimate with everything that went into it; CPU runs get none, since no peak is known for them."""
    if recipe.resources.device == "cpu":
        return []
    operations, train = sample_flops(recipe, size), recipe.train
    tokens, patches = sample_tokens(recipe, size)
    rate = train.ranks * PEAK_TFLOPS[CARD] * 1e12 * MFU / operations
    hours = train.steps * train.batch_size / rate / 3600
    return [
        f"a sample: {tokens} tokens ({TEXT_TOKENS} of text assumed, pictures at input.max_pixels), {patches} patches, "
        f"{operations / 1e12:.1f} TFLOP ({recipe.model.trainable}, gradient checkpointing "
        f"{'on' if recipe.model.gradient_checkpointing else 'off'})",
        f"samples/s = ranks x peak x MFU / operations = {train.ranks} x {PEAK_TFLOPS[CARD]:g} TFLOP/s x {MFU:g} / "
        f"{operations / 1e12:.1f} TFLOP = {rate:.1f}; {train.steps} steps take about {hours:.1f} h (an estimate, not "
        "a measurement; validation and loading come on top)",
    ]
