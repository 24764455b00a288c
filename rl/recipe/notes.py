"""What a recipe may do and its owner should know: lines for `--dry-run` and for the log, none of which stops a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import recipes
from core.prompts import Prompt, Task, load_prompts
from rl.recipe.blind_spots import blind_spots
from rl.recipe.reward_sets import scored_parts
from rl.recipe.schema import RunConfig
from rl.recipe.stage_parts import stage_parts

T5_XXL_WIDTH = 4096
_SLOW = "resources.encode_gpus=0: {} reads every prompt on the CPU, in seconds each; give it a part of a GPU"


def notes(config: RunConfig) -> list[str]:
    """All of them, of a recipe in which `preflight` finds nothing wrong."""
    trained: dict[Task, list[Prompt]] = {"edit": [], "t2i": []}
    held_out: dict[Task, list[Prompt]] = {"edit": [], "t2i": []}
    for part in [part for stage in config.stages for part in stage_parts(stage)]:
        trained[part.task] += _read(part.prompts, part.task)  # type: ignore[index, arg-type]
    for task in config.evaluation.tasks:
        held_out[task.task] += _read(task.prompts, task.task)[: task.num_prompts]
    every = [prompt.prompt for side in (trained, held_out) for prompts in side.values() for prompt in prompts]
    return [
        *blind_spots(config),
        *_seen_prompts(trained, held_out),
        *_sampling(config),
        *_encoding(config, list(dict.fromkeys(every))),
        *_without_effect(config),
    ]


def _read(path: str, task: Task) -> list[Prompt]:
    return load_prompts(recipes.resolve(path), task)


def _seen_prompts(trained: dict[Task, list[Prompt]], held_out: dict[Task, list[Prompt]]) -> Iterator[str]:
    for task, prompts in held_out.items():
        known = {(prompt.prompt, prompt.references) for prompt in trained[task]}
        seen = sum((prompt.prompt, prompt.references) in known for prompt in prompts)
        if seen:
            yield (
                f"evaluation of {task}: {seen} of {len(prompts)} prompts are training prompts, so their scores say "
                "nothing of prompts that were not trained on"
            )


def _sampling(config: RunConfig) -> Iterator[str]:
    training, evaluation = config.rollout.guidance_scale, config.evaluation.guidance_scale
    if max(training, 1.0) != max(evaluation, 1.0):
        yield (
            f"rollout.guidance_scale={training:g} and evaluation.guidance_scale={evaluation:g} differ: the evaluation "
            "draws other pictures than those that are trained on"
        )
    if config.learner.updates_per_rollout == 1:
        yield (
            "learner.updates_per_rollout=1: at the only update of a rollout every ratio is 1, so learner.clip_range "
            "never acts"
        )


def _encoding(config: RunConfig, prompts: Sequence[str]) -> Iterator[str]:
    folder, resources = recipes.resolve(config.model.path), config.resources
    on_cpu = resources.device == "cuda" and not resources.encode_gpus
    if config.model.vlm is not None:
        if on_cpu:
            yield _SLOW.format("the VLM")
        return
    width = json.loads((folder / "text_encoder_3" / "config.json").read_text(encoding="utf-8")).get(
        "d_model", 0
    )
    if on_cpu and width >= T5_XXL_WIDTH:
        yield _SLOW.format("T5-XXL")
    from models.components import load_tokenizer

    length = config.model.max_sequence_length
    for name, part in (("CLIP", "tokenizer"), ("T5", "tokenizer_3")):
        tokenizer = load_tokenizer(folder, part)
        limit = length if name == "T5" else tokenizer.model_max_length
        # A token has a character at least, so short prompts need not be cut up.
        long = [prompt for prompt in prompts if len(prompt) + 2 > limit]
        cut = sum(len(ids) > limit for ids in tokenizer(long).input_ids) if long else 0
        if cut:
            yield f"{cut} of {len(prompts)} prompts are longer than the {limit} tokens that {name} reads, and cut there"


def _without_effect(config: RunConfig) -> Iterator[str]:
    model, rollout, resources = config.model, config.rollout, config.resources
    idle: list[tuple[Any, str, str, str]] = []
    if model.vlm is not None:
        idle.append((model, "max_sequence_length", "model", "MetaQuery reads prompts whole"))
    if not rollout.window_size:
        idle += [
            (rollout, key, "rollout", "rollout.window_size is 0") for key in ("window_first", "window_last")
        ]
    if resources.placement == "inprocess":
        why = "with resources.placement=inprocess the learner's ranks sample"
        idle.append((resources, "min_rollout_workers", "resources", why))
    tasks = {part.task for part in scored_parts(config)}
    if "edit" not in tasks:
        idle += [(model, key, "model", "nothing is edited") for key in ("longer_edge", "reference_pixels")]
    if "t2i" not in tasks and model.sizes:
        yield "model.sizes has no effect: no task is text-to-image"
    for section, key, name, why in idle:
        value = getattr(section, key)
        if value != getattr(type(section), key):  # its default
            yield f"{name}.{key}={value} has no effect: {why}"
