"""Which prompts a step samples, with which seeds: a pure function of (seed, stage, step)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from core.prompts import Prompt
from core.seeds import derive_seed


@dataclass(frozen=True)
class PromptGroup:
    """One prompt to be sampled G times; `seeds[k]` alone decides the noise of sample k.

    `id` is unique within a stage, so samples are matched by it and never by decoded text.
    """

    id: int
    step: int
    prompt: Prompt
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class GroupSampler:
    """Which groups a step samples. Stateless: resuming needs the step number alone.

    Prompts are visited in a fresh permutation each epoch, so that each is seen once before any is seen twice.
    """

    num_prompts: int
    prompts_per_rollout: int
    group_size: int
    seed: int
    stage: str

    def groups(self, prompts: list[Prompt], step: int) -> list[PromptGroup]:
        """The `prompts_per_rollout` groups of `step` (from 0), each with `group_size` sample seeds."""
        result = []
        for slot in range(self.prompts_per_rollout):
            position = step * self.prompts_per_rollout + slot
            epoch, offset = divmod(position, self.num_prompts)
            index = _permutation(self.num_prompts, derive_seed(self.seed, self.stage, "epoch", epoch))[offset]
            seeds = tuple(
                derive_seed(self.seed, self.stage, step, position, k) for k in range(self.group_size)
            )
            result.append(PromptGroup(position, step, prompts[index], seeds))
        return result


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(seed).shuffle(order)
    return tuple(order)
