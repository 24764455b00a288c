"""Whose turn a step of a stage is, and which groups it samples: a pure function of (seed, stage, step)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import recipes
from core.prompts import Prompt, load_prompts
from rewards.monitor import RewardMonitor
from rewards.recipe import reward_specs
from rl.recipe.schema import RunConfig, StageConfig
from rl.recipe.stage_parts import StagePart, stage_parts
from rollout.prompts import GroupSampler, PromptGroup


@dataclass(frozen=True)
class Turn:
    """A part of a stage with its prompts, and the monitor that watches its rewards alone."""

    part: StagePart
    prompts: list[Prompt]
    sampler: GroupSampler
    monitor: RewardMonitor


class Turns:
    """The parts of a stage, one step each in their order."""

    def __init__(self, stage: StageConfig, config: RunConfig) -> None:
        self._turns = [_turn(part, config) for part in stage_parts(stage)]

    def of(self, step: int) -> Turn:
        """The part that step `step` of the stage (from 0) trains."""
        return self._turns[step % len(self._turns)]

    def groups(self, step: int) -> list[PromptGroup]:
        """Its groups: the next ones of its own prompts, numbered through the stage."""
        turn = self.of(step)
        own = turn.sampler.groups(turn.prompts, step // len(self._turns))
        first = step * turn.sampler.prompts_per_rollout
        return [replace(group, id=first + slot, step=step) for slot, group in enumerate(own)]


def _turn(part: StagePart, config: RunConfig) -> Turn:
    prompts = load_prompts(recipes.resolve(part.prompts), part.task)  # type: ignore[arg-type]
    rollout = config.rollout
    sampler = GroupSampler(
        len(prompts), rollout.prompts_per_rollout, rollout.group_size, config.seed, part.label
    )
    return Turn(part, prompts, sampler, RewardMonitor(reward_specs(part.rewards)))
