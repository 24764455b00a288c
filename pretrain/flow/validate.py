"""Rules that a recipe's values have to keep, alone and together. Looks at no file."""

from __future__ import annotations

from typing import Any

from core.recipe import range_problems, value_of
from core.training.estimates import PEAK_TFLOPS
from pretrain.data.config import data_problems
from pretrain.flow.config import STAGES, FlowRecipe

_CHOICES: dict[str, tuple[Any, ...]] = {
    "stage": STAGES,
    "model.dtype": ("float32", "bfloat16"),
    "model.position_mode": ("flat", "mrope"),
    "deepspeed.zero_stage": (1, 2, 3),
    "deepspeed.offload": ("none", "optimizer", "parameters"),
    "export_dtype": ("float32", "bfloat16"),
    "resources.device": ("cpu", "cuda"),
    "resources.card": (None, *PEAK_TFLOPS),
}
_AT_LEAST = {
    "model.connector.num_queries": 1,
    "model.connector.hidden_size": 1,
    "model.connector.intermediate_size": 1,
    "model.connector.num_hidden_layers": 1,
    "model.connector.num_attention_heads": 1,
    "model.max_sequence_length": 1,
    "steps": 1,
    "stop_step": 0,
    "batch_size": 1,
    "micro_batch_size": 1,
    "log_every": 1,
    "save_every": 1,
    "keep_checkpoints": 1,
    "samples.every": 0,
    "samples.count": 1,
    "samples.steps": 1,
    "samples.guidance_scale": 1,
    "optimization.weight_decay": 0,
    "resources.ranks": 1,
    "resources.threads": 1,
}
_ABOVE_ZERO = (
    "timestep_shift",
    "optimization.lr",
    "optimization.eps",
    "optimization.gradient_clip",
    "resources.rank_cpus",
    "resources.placement_timeout_s",
    "resources.start_timeout_s",
    "resources.collective_timeout_s",
    "resources.call_timeout_s",
)
_SHARES = (
    "optimization.warmup_fraction",
    "optimization.final_lr_fraction",
    "optimization.ema_decay",
)


def recipe_problems(recipe: FlowRecipe) -> list[str]:
    """Every value that is out of range or does not go with another, one sentence each."""
    problems = range_problems(recipe, choices=_CHOICES, at_least=_AT_LEAST, above_zero=_ABOVE_ZERO)
    problems += [
        f"{key}={value} must be in [0, 1)" for key in _SHARES if not 0 <= (value := value_of(recipe, key)) < 1
    ]
    if recipe.stage in STAGES:
        problems += _part_problems(recipe) + _reference_problems(recipe)
    return problems + _step_problems(recipe) + data_problems(recipe.data)


def _part_problems(recipe: FlowRecipe) -> list[str]:
    trained = [part for part in ("queries", "connector", "transformer") if recipe.trains(part)]
    model, connector = recipe.model, recipe.model.connector
    fresh = recipe.uses_vlm and model.conditioner is None
    checks = [
        (
            bool(trained),
            "train: nothing is trained; set one of train.queries, connector, transformer to true",
        ),
        (
            recipe.uses_vlm or not {"queries", "connector"} & {*trained},
            "train.queries and train.connector need stage align or unified: kontext has neither",
        ),
        (
            recipe.uses_vlm or (model.vlm is None and model.conditioner is None),
            "model.vlm and model.conditioner have no meaning for stage kontext: remove them",
        ),
        (
            not recipe.uses_vlm or model.vlm is not None,
            f"model.vlm has no value, and stage {recipe.stage} reads prompts with it: give a Qwen2.5-VL folder",
        ),
        (
            not fresh or recipe.trains("connector"),
            "train.connector=false would keep a random connector: set model.conditioner to one that is aligned",
        ),
        (
            connector.num_attention_heads < 1 or connector.hidden_size % connector.num_attention_heads == 0,
            f"model.connector.hidden_size={connector.hidden_size} is no multiple of num_attention_heads="
            f"{connector.num_attention_heads}",
        ),
        (
            recipe.deepspeed.offload != "parameters" or recipe.deepspeed.zero_stage == 3,
            f"deepspeed.offload=parameters needs deepspeed.zero_stage=3, not {recipe.deepspeed.zero_stage}",
        ),
        (
            not model.compile or recipe.deepspeed.zero_stage < 3,
            "model.compile does not go with deepspeed.zero_stage=3, whose weights come and go inside the graph; "
            "use stage 1 or 2",
        ),
    ]
    return [message for fine, message in checks if not fine]


def _reference_problems(recipe: FlowRecipe) -> list[str]:
    data, references = recipe.data, recipe.references
    checks = [
        (
            data.edit_share == 0 or references.transformer or (recipe.uses_vlm and references.vlm),
            f"data.edit_share={data.edit_share}, but nothing is shown the picture to edit: set references.transformer "
            "(or, with a VLM, references.vlm) to true",
        ),
        (
            not data.reference_images,
            "data.reference_images follows from stage and references.vlm: leave it out",
        ),
        (
            not (recipe.uses_vlm and data.cache.text),
            f"data.cache.text holds SD3's text embeddings, which stage {recipe.stage} does not read: set it to false",
        ),
    ]
    return [message for fine, message in checks if not fine] + _query_cache_problems(recipe)


def _query_cache_problems(recipe: FlowRecipe) -> list[str]:
    """Cached states stand in for the VLM only where it would read the same."""
    cache, model = recipe.data.cache, recipe.model
    if not cache.queries:
        return []
    if not recipe.uses_vlm:
        return [
            f"data.cache.queries holds a VLM's states, which stage {recipe.stage} does not read: set it to false"
        ]
    problems = []
    if recipe.trains("queries"):
        problems.append(
            "data.cache.queries holds the VLM's states at queries that stay as they are: set train.queries=false, or "
            "leave it out"
        )
    pairs = {
        "vlm": ("model.vlm", model.vlm), "conditioner": ("model.conditioner", model.conditioner),
        "position_mode": ("model.position_mode", model.position_mode), "text_dtype": ("model.dtype", model.dtype),
        "show_references": ("references.vlm", recipe.references.vlm),
    }  # fmt: skip
    problems += [
        f"data.cache.{name}={getattr(cache, name)} and {key}={value} must be the same: training would read otherwise "
        "than the cache was made"
        for name, (key, value) in pairs.items()
        if getattr(cache, name) != value
    ]
    return problems


def _step_problems(recipe: FlowRecipe) -> list[str]:
    step = recipe.micro_batch_size * recipe.resources.ranks
    checks = [
        (
            step < 1 or recipe.batch_size % step == 0,
            f"batch_size={recipe.batch_size} is no multiple of micro_batch_size x resources.ranks = "
            f"{recipe.micro_batch_size} x {recipe.resources.ranks} = {step}",
        ),
        (
            recipe.stop_step <= recipe.steps,
            f"stop_step={recipe.stop_step} lies behind steps={recipe.steps}",
        ),
        *(
            (
                recipe.log_every < 1 or value % recipe.log_every == 0,
                f"{key}={value} is no multiple of log_every={recipe.log_every}: a resumed run could not repeat the "
                "means in metrics.jsonl",
            )
            for key, value in (("save_every", recipe.save_every), ("stop_step", recipe.stop_step))
        ),
    ]
    return [message for fine, message in checks if not fine]
