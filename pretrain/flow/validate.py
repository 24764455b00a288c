"""Reads a flow-matching recipe, and the rules that its keys have to keep together. Looks at no file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from core.recipe import read_recipe
from pretrain.data.config import broken_data_rules
from pretrain.flow.config import FlowRecipe


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> FlowRecipe:
    """Read a recipe and `key.sub=value` overrides. Raises ConfigError listing every problem of its keys and values."""
    return read_recipe(path, overrides, FlowRecipe, rules=broken_rules)


def broken_rules(recipe: FlowRecipe) -> list[str]:
    """What keys break together. Bears values that are out of range."""
    problems = _step_problems(recipe) + broken_data_rules(recipe.data)
    if recipe.stage in ("kontext", "align", "unified"):
        problems += _part_problems(recipe) + _reference_problems(recipe)
    return problems


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
