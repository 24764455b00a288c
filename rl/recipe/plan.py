"""The run in numbers before it starts: batch equations, LoRA size, memory per role, resources. No Ray, no GPU."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import recipes
from core.cluster.placement import describe_plan
from core.output import disk_line
from models.metaquery.config import MetaQueryConfig
from rl.recipe.placement import make_plan, plan_title
from rl.recipe.reward_sets import scored_parts
from rl.recipe.schema import RunConfig
from rl.recipe.shapes import count_shapes, part_shapes, shape_rule, trained_shapes
from rl.recipe.stage_parts import StagePart, rehearsed_parts, stage_tasks
from rollout.shapes import Shape

_GIB = 2**30
_SIZES_NAMED = 8
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class ModelSize:
    """Counts from the transformer's config: parameters, the (untrained) position table, adapted linears. `shape`: the
    largest that is trained on, which tokens and latents are of; `mixed`: whether a rollout may have several."""

    source: str
    parameters: int
    position_values: int
    lora_parameters: int
    lora_linears: int
    hidden_size: int
    num_layers: int
    shape: Shape
    mixed: bool
    image_tokens: int
    reference_tokens: int
    text_tokens: int
    latent_values: int


def describe_run(config: RunConfig) -> list[str]:
    """Lines for `--dry-run`: what a rollout and an update are, what each role holds in memory, the placement."""
    size = measure_model(config)
    return [
        f"run {config.name}: "
        + " -> ".join(f"{s.name} ({' + '.join(stage_tasks(s))}, {s.steps} steps)" for s in config.stages),
        *_shape_lines(config),
        *_batch_lines(config, size),
        *_rehearsal_lines(config),
        *_memory_lines(config, size),
        disk_line(Path(config.output_dir) / config.name, disk_needs(config, size)),
        *describe_plan(make_plan(config), plan_title(config.resources)),
    ]


def measure_model(config: RunConfig) -> ModelSize:
    """Build the transformer on the meta device; where the folder is absent, SD3.5-Medium's published shape."""
    import torch

    from models.kontext import KontextTransformer
    from models.lora.attach import attach_lora
    from models.sd35_medium import sd35_medium_config

    folder = recipes.resolve(config.model.path) / "transformer" / "config.json"
    if folder.is_file():
        source, shape = str(folder), json.loads(folder.read_text())
    else:
        source, shape = "SD3.5-Medium's shape, since the model folder is absent", sd35_medium_config()
    vae = recipes.resolve(config.model.path) / "vae" / "config.json"
    factor = 2 ** (len(json.loads(vae.read_text())["block_out_channels"]) - 1) if vae.is_file() else 8
    with torch.device("meta"):
        transformer = KontextTransformer.from_config(shape)
    parameters = sum(p.numel() for p in transformer.parameters())
    values = sum(b.numel() for b in transformer.buffers())
    lora = config.model.lora
    report = attach_lora(transformer, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
    trained = trained_shapes(config) or [[Shape((config.model.height, config.model.width))]]
    largest = max((shapes[-1] for shapes in trained), key=lambda shape: (shape.pixels, shape))
    token, (height, width) = factor * shape["patch_size"], largest.size
    image, *further = [
        rows // token * (columns // token) for rows, columns in (largest.size, *largest.references)
    ]
    return ModelSize(
        source,
        parameters,
        values,
        report.parameters,
        report.matched,
        shape["num_attention_heads"] * shape["attention_head_dim"],
        shape["num_layers"],
        largest,
        any(len(shapes) > 1 for shapes in trained),
        image,
        sum(further),
        _text_tokens(config),
        height // factor * (width // factor) * shape["in_channels"],
    )


def _shape_lines(config: RunConfig) -> list[str]:
    """The sizes of each part's prompts; nothing where all of the run have height x width."""
    rule, lines = shape_rule(config.model), []
    for part in scored_parts(config):
        shapes = part_shapes(part, rule)
        if set(shapes) <= {Shape(rule.fixed), Shape(rule.fixed, (rule.fixed,))}:
            continue
        where = f"stage {part.label}" if isinstance(part, StagePart) else f"evaluation of {part.task}"
        ranked = sorted(shapes.items(), key=lambda entry: (-entry[1], entry[0]))
        total = sum(shapes.values())
        named = [f"{_described(shape)} {100 * count / total:.3g}%" for shape, count in ranked[:_SIZES_NAMED]]
        more = len(ranked) - _SIZES_NAMED
        named += [f"{more} more"] * (more > 0)
        lines.append(f"sizes of {where}, {total:.0f} prompts (height x width): {', '.join(named)}")
    return lines + _compile_lines(config)


def _compile_lines(config: RunConfig) -> list[str]:
    if not config.model.compile:
        return []
    from models.compiling import most_graphs

    shapes = count_shapes(config)
    return [
        f"model.compile: the blocks are compiled for each of {shapes} shapes as it comes, into at most "
        f"{most_graphs(shapes)} graphs"
    ]


def _described(shape: Shape) -> str:
    """`512 x 384`, with the sizes of references where there are several."""
    size, *further = [f"{height} x {width}" for height, width in (shape.size, *shape.references[1:])]
    return f"{size} (further references {', '.join(further)})" if further else size


def _text_tokens(config: RunConfig) -> int:
    """CLIP's and T5's, or MetaQuery's queries."""
    if config.model.vlm is None:
        return 77 + config.model.max_sequence_length
    path = recipes.resolve(config.model.path) / "conditioner" / "config.json"
    return json.loads(path.read_text())["num_queries"] if path.is_file() else MetaQueryConfig().num_queries


def _batch_lines(config: RunConfig, size: ModelSize) -> list[str]:
    r, learner = config.rollout, config.learner
    samples = r.prompts_per_rollout * r.group_size
    per_update = samples // learner.updates_per_rollout
    per_rank = -(-per_update // learner.ranks)
    micro = -(-per_rank // learner.micro_batch_size)
    steps = learner.train_steps or r.window_size or r.num_steps - learner.drop_last_steps
    trajectory = (min(r.window_size or r.num_steps, r.num_steps) + 1) * size.latent_values * 4
    return [
        f"rollout: {r.prompts_per_rollout} prompts x G={r.group_size} = {samples} samples in chunks of {r.chunk_size}, "
        f"T={r.num_steps}, {trajectory / 1e6:.2f} MB of latents a sample"
        + (", one trajectory a group until its first stochastic step" if r.branch else ""),
        f"update: {samples} / {learner.updates_per_rollout} = {per_update} samples; per rank {per_rank} in "
        f"{'at least ' * size.mixed}{micro} "
        f"micro-batches of {learner.micro_batch_size} x {steps} trained steps",
        f"LoRA: {size.lora_linears} linears, {size.lora_parameters / 1e6:.2f} M parameters "
        f"({size.lora_parameters * _BYTES[config.model.dtype] / 1e6:.1f} MB a publish), "
        f"scaling {config.model.lora.alpha / config.model.lora.rank:g}",
    ]


def _rehearsal_lines(config: RunConfig) -> list[str]:
    found = []
    for index, stage in enumerate(config.stages):
        if stage.rehearsal is None:
            continue
        old = " + ".join(part.label for part in rehearsed_parts(config.stages, index))
        found.append(
            f"rehearsal in {stage.name}: {stage.rehearsal.num_prompts} pictures of {old} drawn at its start, "
            f"{stage.rehearsal.samples} noised ones of them in each update (beta {stage.rehearsal.beta:g})"
        )
    return found


def _memory_lines(config: RunConfig, size: ModelSize) -> list[str]:
    """Lower bounds by formula: weights and optimizer are exact, activations an estimate that is labelled so."""
    width = _BYTES[config.model.dtype]
    base = (size.parameters + size.position_values) * width
    adapters = size.lora_parameters * width
    zero, ranks = config.learner.zero_stage, config.learner.ranks
    weights = base / (ranks if zero == 3 else 1)
    gradients = size.lora_parameters * 4
    optimizer = (
        size.lora_parameters * 12 / ranks
    )  # float32 master copy and both Adam moments, sharded by ZeRO
    tokens = size.image_tokens + size.reference_tokens + size.text_tokens
    # Values kept for the backward per token, layer and unit of width, as measured on SD3.5-Medium (bench/RESULTS.md).
    per_layer = 2 if config.model.gradient_checkpointing else 18 if config.model.compile else 24
    rows = _rows(config)
    activations = rows * tokens * size.hidden_size * size.num_layers * per_layer * width
    learner = weights + 2 * adapters + gradients + optimizer
    return [
        f"transformer: {size.parameters / 1e6:.2f} M parameters, position table {size.position_values / 1e6:.1f} M "
        f"values ({size.source})",
        f"memory, rollout worker: {(base + adapters) / _GIB:.2f} GiB of transformer and adapter, plus the VAE",
        f"memory, learner rank: {learner / _GIB:.2f} GiB of weights, adapters, gradients and optimizer (ZeRO-{zero}), "
        f"plus about {activations / _GIB:.1f} GiB of activations (estimate, {rows} rows at once of "
        f"{_described(size.shape)} px{', editing' * bool(size.shape.references)})",
    ]


def disk_needs(config: RunConfig, size: ModelSize | None = None) -> dict[str, float]:
    """Bytes that a run keeps, by what they are: checkpoints by formula, pictures as if they did not compress."""
    size = size or measure_model(config)
    width, ranks = _BYTES[config.model.dtype], config.learner.ranks
    adapter = size.lora_parameters * width
    # PEFT's and diffusers' files, the reference, the average; every rank's trained weights, and the optimizer's shards.
    checkpoint = adapter * (2 + 1 + config.learner.ema.enabled + ranks) + size.lora_parameters * 12
    best = config.checkpoint.keep_best
    kept = config.checkpoint.keep_last + 1 + len(config.stages) + (best.count if best else 0)
    gallery, picture = config.gallery, math.prod(size.shape.size) * 3
    grids = sum(
        s.steps // gallery.every * (gallery.prompts + 2 * config.rollout.group_size) for s in config.stages
    )
    moments = (len(config.stages) + 1) * len(config.evaluation.tasks) * 2
    return {
        f"{kept} checkpoints": kept * checkpoint,
        "pictures": (grids + moments * gallery.prompts) * picture if gallery.prompts else 0.0,
        "adapter and merged transformer": 2 * adapter + size.parameters * width,
    }


def _rows(config: RunConfig) -> int:
    """Transformer rows of the learner's largest forward. A branching group is one row if no later step is trained."""
    r, micro = config.rollout, config.learner.micro_batch_size
    if not (r.branch and r.window_size == 1):
        return micro
    # The first group may have begun in the micro-batch before.
    groups = min(micro, 1 + -(-micro // r.group_size))
    rehearsed = [s.rehearsal.samples for s in config.stages if s.rehearsal is not None]
    return max(groups, min(micro, -(-max(rehearsed, default=0) // config.learner.ranks)))
