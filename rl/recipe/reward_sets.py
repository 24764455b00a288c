"""What a run scores: the parts of a recipe that have rewards, and the names that reward workers know them by."""

from __future__ import annotations

from dataclasses import replace

from core.prompts import Prompt
from models.sizes import geometry
from rewards.base import RewardSet
from rewards.recipe import reward_set
from rl.recipe.schema import EvaluationTaskConfig, RunConfig
from rl.recipe.shapes import shape_rule
from rl.recipe.stage_parts import StagePart, stage_parts


def scored_parts(config: RunConfig) -> list[StagePart | EvaluationTaskConfig]:
    """Everything in the recipe that has prompts and rewards."""
    stages = [part for stage in config.stages for part in stage_parts(stage)]
    return [*stages, *config.evaluation.tasks]


def stage_set_name(label: str) -> str:
    """The name of the rewards of a part of a stage."""
    return f"stage:{label}"


def evaluation_set_name(task: str) -> str:
    """The name of the rewards of an evaluation task."""
    return f"evaluation:{task}"


def part_reward_set(
    part: StagePart | EvaluationTaskConfig, prompts: list[Prompt], config: RunConfig
) -> RewardSet:
    """The part's rewards, to be tried on its first prompt, at a size that it may have."""
    name = stage_set_name(part.label) if isinstance(part, StagePart) else evaluation_set_name(part.task)
    rule = replace(shape_rule(config.model), weights=())  # which may be wrong still
    height, width = rule.of(prompts[0]).size if prompts else rule.fixed
    found = reward_set(name, part.task, part.rewards, prompts, height, width)
    try:
        multiple = geometry(rule.folder).multiple
    except (OSError, ValueError, KeyError):  # told of the model
        return found
    return replace(found, reference_multiple=multiple, reference_pixels=rule.reference_pixels)
