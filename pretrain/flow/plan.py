"""The run in numbers before it starts: parts, batches, memory of each ZeRO stage, images a second. No weights, no GPU.

Memory follows `core/training/estimates.py`, with a moving average (k = 16) and V parameters of the frozen VLM whole on
every rank. The position table (a buffer) counts with the weights and is never cut. With `deepspeed.offload: optimizer`
the optimizer's term is in host memory, with `parameters` w P / R too. VAE and text encoders come on top.
"""

from __future__ import annotations

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
from pretrain.data.buckets import areas, bucket_size
from pretrain.flow.config import FlowRecipe
from pretrain.flow.costs import TEXT_TOKENS, sample_flops
from pretrain.flow.sizes import ModelSizes, measure


def describe(recipe: FlowRecipe) -> list[str]:
    """Lines for `--dry-run`."""
    sizes = measure(recipe)
    per_rank = recipe.batch_size // recipe.resources.ranks
    return [
        f"run {recipe.name}: stage {recipe.stage}, {recipe.steps} steps x {recipe.batch_size} = "
        f"{recipe.steps * recipe.batch_size} samples; {recipe.batch_size} / {recipe.resources.ranks} ranks = "
        f"{per_rank} a rank, in {per_rank // recipe.micro_batch_size} micro-batches of {recipe.micro_batch_size}",
        *(f"note: {note}" for note in sizes.notes),
        *part_lines(recipe, sizes),
        *batch_lines(recipe),
        *memory_lines(recipe, sizes),
        disk_line(recipe.run_dir, disk_needs(recipe, sizes)),
        *speed_lines(recipe, sizes),
    ]


def part_lines(recipe: FlowRecipe, sizes: ModelSizes) -> list[str]:
    """Parameters of each part, and the total that is trained."""
    lines = []
    for part in ("queries", "connector", "transformer"):
        if part in sizes.parameters:
            state = "trained" if recipe.trains(part) else "frozen"
            lines.append(f"{part}: {sizes.parameters[part] / 1e6:.2f} M parameters, {state}")
    if sizes.vlm is not None:
        state = "frozen" if recipe.loads_vlm else "not loaded: data.cache.queries has what it reads"
        lines.append(f"VLM: {sizes.vlm.parameters / 1e6:.2f} M parameters, {state}")
    return [*lines, f"trained in all: {trained_count(recipe, sizes) / 1e6:.2f} M parameters"]


def batch_lines(recipe: FlowRecipe) -> list[str]:
    """Tasks, and the sizes of the schedule's areas, square and widest."""
    data = recipe.data
    lines = [f"batches: {data.edit_share:.0%} editing, {1 - data.edit_share:.0%} text-to-image, in turn"]
    if data.edit_share > 0:
        sees = {
            "transformer": recipe.references.transformer,
            "VLM": recipe.uses_vlm and recipe.references.vlm,
        }
        lines[0] += "; the reference goes to " + " and ".join(name for name, on in sees.items() if on)
    ratios = {"1:1": 0, "16:9": 5} if data.aspect_buckets else {"1:1": 0}
    for area in areas(data.resolution):
        shapes = (
            f"{name} {'x'.join(map(str, bucket_size(k, area, data.multiple)))}" for name, k in ratios.items()
        )
        lines.append(f"size about {area} px (height x width): {', '.join(shapes)}")
    return lines


def trained_count(recipe: FlowRecipe, sizes: ModelSizes) -> int:
    """Parameters that are trained."""
    return sum(count for part, count in sizes.parameters.items() if recipe.trains(part))


def vlm_count(recipe: FlowRecipe, sizes: ModelSizes) -> int:
    """Parameters of the VLM that a rank holds."""
    return sizes.vlm.parameters if sizes.vlm is not None and recipe.loads_vlm else 0


def state_bytes(recipe: FlowRecipe, sizes: ModelSizes, stage: int) -> tuple[float, float]:
    """(device, host) bytes of one rank's weights, gradients, optimizer and average."""
    width = WIDTHS[recipe.model.dtype]
    weights, gradients, optimizer = zero_bytes(
        sum(sizes.parameters.values()), trained_count(recipe, sizes),
        width=width, ranks=recipe.resources.ranks, stage=stage, average=True,
    )  # fmt: skip
    fixed = width * (vlm_count(recipe, sizes) + sizes.position_values)
    if recipe.deepspeed.offload == "none":
        return weights + fixed + gradients + optimizer, 0.0
    if recipe.deepspeed.offload == "parameters" and stage == 3:
        return fixed + gradients, optimizer + weights
    return weights + fixed + gradients, optimizer


def activation_bytes(recipe: FlowRecipe, sizes: ModelSizes) -> float:
    """Estimate for one micro-batch at the largest area of the schedule."""
    shape = sizes.transformer
    side = sizes.factor * shape["patch_size"]
    image = max(areas(recipe.data.resolution)) // side**2
    tokens = image * (2 if recipe.references.transformer and recipe.data.edit_share > 0 else 1)
    width = shape["num_attention_heads"] * shape["attention_head_dim"]
    streams = [((tokens + sizes.text_tokens), width, shape["num_layers"])]
    if sizes.conditioner is not None and (recipe.trains("connector") or recipe.trains("queries")):
        connector = sizes.conditioner.connector_config
        streams.append((sizes.conditioner.num_queries, connector.hidden_size, connector.num_hidden_layers))
    if sizes.vlm is not None and sizes.conditioner is not None and recipe.trains("queries"):
        length = sizes.conditioner.num_queries + TEXT_TOKENS
        streams.append((length, sizes.vlm.width, sizes.vlm.layers))
    numbers = activation_numbers(streams, checkpointing=recipe.model.gradient_checkpointing)
    return recipe.micro_batch_size * WIDTHS[recipe.model.dtype] * numbers


def memory_lines(recipe: FlowRecipe, sizes: ModelSizes) -> list[str]:
    """One line a ZeRO stage; the recipe's own is marked."""
    lines, activations = [], activation_bytes(recipe, sizes)
    for stage in (1, 2, 3):
        device, host = state_bytes(recipe, sizes, stage)
        chosen = "deepspeed.zero_stage" if stage == recipe.deepspeed.zero_stage else ""
        what = "weights, gradients, optimizer and average"
        lines.append(memory_line(stage, device, activations, what=what, chosen=chosen, host=host))
    count = sum(sizes.parameters.values()) + vlm_count(recipe, sizes)
    loading = WIDTHS[recipe.model.dtype] * count / GIB
    lines.append(
        f"host memory while loading: {loading:.1f} GiB a rank, also with ZeRO-3; VAE and text encoders on top"
    )
    return lines


def disk_needs(recipe: FlowRecipe, sizes: ModelSizes) -> dict[str, float]:
    """Bytes that a run keeps: in a checkpoint trained weights, fp32 copy, both moments and the average (16 bytes)."""
    trained, width = trained_count(recipe, sizes), WIDTHS[recipe.model.dtype]
    kept = recipe.keep_checkpoints + 1
    model = sum(sizes.parameters.values()) * WIDTHS[recipe.export_dtype]
    return {f"{kept} checkpoints": kept * trained * (width + 16.0), "model": float(model)}


def speed_lines(recipe: FlowRecipe, sizes: ModelSizes) -> list[str]:
    """The estimate with everything that went into it; none without a card, since no peak is known."""
    area = max(areas(recipe.data.resolution))
    height, width = bucket_size(0, area, recipe.data.multiple)
    lines, mean = [], 0.0
    for task, share in (("t2i", 1 - recipe.data.edit_share), ("edit", recipe.data.edit_share)):
        if share > 0:
            operations = sample_flops(recipe, sizes, height=height, width=width, edit=task == "edit")
            lines.append(
                f"one {task} sample of {height} x {width} px: {operations / 1e12:.4g} TFLOP, forward and backward"
            )
            mean += share * operations
    card, ranks = recipe.resources.card, recipe.resources.ranks
    if card is not None:
        rate = ranks * PEAK_TFLOPS[card] * 1e12 * MFU / mean
        hours = recipe.steps * recipe.batch_size / rate / 3600
        lines.append(
            f"images/s = ranks x peak x MFU / operations = {ranks} x {PEAK_TFLOPS[card]:g} TFLOP/s ({card}) x "
            f"{MFU:g} / {mean / 1e12:.4g} TFLOP = {rate:.1f}; {recipe.steps} steps take about {hours:.0f} h at the "
            "last resolution (an estimate, not a measurement; encoding by VAE and text encoders comes on top)"
        )
    return lines
