"""How many images each reward will score, and what a paid one says that costs, before the run starts."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rewards.base import RewardLoadError, RewardSpec, reward_label
from rewards.loading import load_reward
from rewards.recipe import reward_specs
from rl.recipe.schema import EvaluationTaskConfig, RunConfig
from rl.recipe.shapes import part_shapes, shape_rule
from rl.recipe.stage_parts import StagePart, stage_parts, stage_tasks, steps_of


def reward_lines(config: RunConfig) -> list[str]:
    """Lines for `--dry-run` and the log: images scored by each reward, and its own estimate where it gives one.

    A reward gives one by a method `estimate(*, images, task, height, width) -> list[str]`, for pictures of the largest
    size. Images that are scored
    twice (retries, a repeated step after a resume) are not foreseen. A reward that cannot be loaded is left to the
    preflight's problems.
    """
    lines, rule = [], shape_rule(config.model)
    for where, part, images in _parts(config):
        size = max((shape.size for shape in part_shapes(part, rule)), key=math.prod)
        for spec in reward_specs(part.rewards):
            lines.append(f"reward {reward_label(spec)}, {where}: {images} images")
            lines += [f"  {line}" for line in _estimate(spec, images, part.task, size)]
    return lines


def _parts(config: RunConfig) -> Iterator[tuple[str, StagePart | EvaluationTaskConfig, int]]:
    per_step = config.rollout.prompts_per_rollout * config.rollout.group_size
    for stage in config.stages:
        for number, part in enumerate(stage_parts(stage)):
            yield f"stage {part.label}", part, steps_of(stage, number) * per_step
    for task in config.evaluation.tasks:
        yield f"evaluation of {task.task}", task, _evaluated(config, task)


def _evaluated(config: RunConfig, task: EvaluationTaskConfig) -> int:
    """Before, after each stage and with each baseline guidance; within the task's own stages; the gallery's draws."""
    times = 1 + len(config.evaluation.baseline_guidance) + len(config.stages)
    images = 0
    for stage in config.stages:
        if task.task in stage_tasks(stage):
            every = config.evaluation.every
            times += (stage.steps - 1) // every if every else 0
            images += config.gallery.prompts * ((stage.steps - 1) // config.gallery.every)
    return images + times * task.num_prompts


def _estimate(spec: RewardSpec, images: int, task: str, size: tuple[int, int]) -> list[str]:
    try:
        owner = load_reward(spec).owner
    except RewardLoadError:
        return []
    if not hasattr(owner, "estimate"):
        return []
    return list(owner.estimate(images=images, task=task, height=size[0], width=size[1]))
