"""Which part of a stage a step trains, and which groups it samples: a pure function of (seed, stage, step)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import recipes
from core.prompts import Prompt, load_prompts
from rewards.monitor import RewardMonitor
from rewards.recipe import reward_specs
from rl.recipe.reward_sets import stage_set_name
from rl.recipe.schema import LearnerConfig, RunConfig, StageConfig
from rl.recipe.stage_parts import StagePart, stage_parts
from rl.record.state import StageProgress
from rollout.prompts import GroupSampler, PromptGroup


@dataclass(frozen=True)
class ScheduledPart:
    """A part of a stage with its prompts, and the monitor that watches its rewards alone."""

    part: StagePart
    prompts: list[Prompt]
    sampler: GroupSampler
    monitor: RewardMonitor

    @property
    def reward_set(self) -> str:
        return stage_set_name(self.part.label)


class StageSchedule:
    """The steps of a stage: its parts take one step each, in their order. `progress` keeps what their rewards' monitors
    see."""

    def __init__(self, stage: StageConfig, config: RunConfig, progress: StageProgress | None = None) -> None:
        self._steps = stage.steps
        seen = {} if progress is None else progress.rewards
        self._parts = [
            _scheduled(part, config, seen.setdefault(part.label, {})) for part in stage_parts(stage)
        ]

    def remaining_steps(self, progress: StageProgress) -> Iterator[int]:
        """Steps from 0 that are not done yet."""
        while progress.steps < self._steps:
            yield progress.steps

    def has(self, step: int) -> bool:
        """Whether the stage has step `step` (from 0)."""
        return step < self._steps

    def part(self, step: int) -> ScheduledPart:
        """The part that step `step` of the stage (from 0) trains."""
        return self._parts[step % len(self._parts)]

    def groups(self, step: int) -> list[PromptGroup]:
        """Its groups: the next ones of its own prompts, numbered through the stage."""
        part = self.part(step)
        own = part.sampler.groups(part.prompts, step // len(self._parts))
        first = step * part.sampler.prompts_per_rollout
        return [replace(group, id=first + slot, step=step) for slot, group in enumerate(own)]


def stage_learning_rate(config: LearnerConfig, done: int, steps: int) -> float:
    """The rate of a stage's step after `done` of its `steps`: a function of these alone, so resuming needs no more."""
    if config.final_learning_rate is None:
        return config.learning_rate
    return config.learning_rate + (config.final_learning_rate - config.learning_rate) * done / steps


def _scheduled(part: StagePart, config: RunConfig, seen: dict[str, Any]) -> ScheduledPart:
    prompts = load_prompts(recipes.resolve(part.prompts), part.task)  # type: ignore[arg-type]
    rollout = config.rollout
    sampler = GroupSampler(
        len(prompts), rollout.prompts_per_rollout, rollout.group_size, config.seed, part.label
    )
    return ScheduledPart(part, prompts, sampler, RewardMonitor(reward_specs(part.rewards), seen))
