"""The tasks of a stage. A staged recipe has one a stage; a joint stage has several, which take turns by rollout step.

Samples of two tasks share no batch, so step i (from 0) trains part i % n alone; adapter, optimizer, KL reference and
moving average run through. Each part visits its own prompts, in its own count of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rewards.recipe import RewardConfig
from rl.recipe.schema import StageConfig

JOINT = "joint"
"""The task of a stage whose `parts` have the tasks."""


@dataclass(frozen=True)
class StagePart:
    """What one task of a stage trains on. `label`: the stage's name, in a joint stage with the task after it."""

    label: str
    task: str
    prompts: str
    rewards: list[RewardConfig]


def stage_parts(stage: StageConfig) -> list[StagePart]:
    """The parts in their order; the stage itself where it is not joint."""
    if stage.task != JOINT:
        return [StagePart(stage.name, stage.task, stage.prompts or "", stage.rewards)]
    return [
        StagePart(f"{stage.name}.{part.task}", part.task, part.prompts, part.rewards) for part in stage.parts
    ]


def stage_tasks(stage: StageConfig) -> list[str]:
    """The tasks that a stage trains."""
    return [part.task for part in stage_parts(stage)]


def rehearsed_parts(stages: Sequence[StageConfig], index: int) -> list[StagePart]:
    """What stage `index` rehearses: the parts of the stages before it whose task it does not train itself."""
    own = stage_tasks(stages[index])
    return [part for stage in stages[:index] for part in stage_parts(stage) if part.task not in own]


def steps_of(stage: StageConfig, part: int) -> int:
    """How many of the stage's rollout steps are this part's."""
    parts = len(stage_parts(stage))
    return (stage.steps - part + parts - 1) // parts
