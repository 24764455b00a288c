"""Which edits there are, how each is sampled, and which are sampled together: pure functions of the recipe.

Nothing here depends on the number of workers or on what was done before, so a run that was killed and continued
makes the same edits, in the same batches, as one that was not.

    shard s = prompts [s P, (s + 1) P)     edit (prompt, k): settings and seed from (recipe seed, prompt, k)
    job     = up to `chunk_size` edits of one shard with equal settings, in order
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from core.prompts import Prompt
from core.seeds import derive_seed
from rewards.editreward.data.generate_config import GenerateSection
from rollout.sampler import SamplingSpec


@dataclass(frozen=True, order=True)
class EditSettings:
    """How one edit is sampled. adapter: its number in `generate.adapters`."""

    adapter: int
    num_steps: int
    guidance_scale: float
    noise_level: float

    def spec(self) -> SamplingSpec:
        """For the rollout workers: every step is stochastic, or none at noise 0."""
        variant = "sde" if self.noise_level > 0 else "ode"
        return SamplingSpec(self.num_steps, self.noise_level, self.guidance_scale, variant)  # type: ignore[arg-type]


@dataclass(frozen=True)
class PlannedEdit:
    """The k-th edit of a prompt; `seed` alone decides its noise."""

    prompt: Prompt
    k: int
    seed: int
    settings: EditSettings

    @property
    def key(self) -> str:
        """Name of the sample in its shard."""
        return f"{self.prompt.index:07d}-{self.k:03d}"


@dataclass(frozen=True)
class Job:
    """Edits of one shard that are sampled in one batch."""

    shard: int
    number: int
    edits: tuple[PlannedEdit, ...]

    @property
    def settings(self) -> EditSettings:
        return self.edits[0].settings


def draw_settings(section: GenerateSection, seed: int, prompt_index: int, k: int) -> EditSettings:
    """One value of each list, each equally likely."""
    draw = random.Random(derive_seed(seed, "edit-settings", prompt_index, k))
    return EditSettings(
        adapter=draw.randrange(len(section.adapters)),
        num_steps=draw.choice(section.num_steps),
        guidance_scale=float(draw.choice(section.guidance_scale)),
        noise_level=float(draw.choice(section.noise_level)),
    )


def count_shards(num_prompts: int, section: GenerateSection) -> int:
    """Shards that `num_prompts` prompts fill, the last one perhaps in part."""
    return -(-num_prompts // section.prompts_per_shard)


def shard_prompts(shard: int, prompts: Sequence[Prompt], section: GenerateSection) -> list[Prompt]:
    """The prompts of one shard."""
    first = shard * section.prompts_per_shard
    return list(prompts[first : first + section.prompts_per_shard])


def plan_edits(prompts: Sequence[Prompt], section: GenerateSection, seed: int) -> list[PlannedEdit]:
    """All edits of these prompts, in the order in which they lie in the shard."""
    return [
        PlannedEdit(
            prompt,
            k,
            derive_seed(seed, "edit-noise", prompt.index, k),
            draw_settings(section, seed, prompt.index, k),
        )
        for prompt in prompts
        for k in range(section.edits_per_prompt)
    ]


def plan_jobs(shard: int, edits: Sequence[PlannedEdit], chunk_size: int) -> list[Job]:
    """The shard's batches, by adapter first: a worker that changes its adapter loads it anew."""
    alike: dict[EditSettings, list[PlannedEdit]] = {}
    for edit in edits:
        alike.setdefault(edit.settings, []).append(edit)
    chunks = [
        tuple(alike[settings][first : first + chunk_size])
        for settings in sorted(alike)
        for first in range(0, len(alike[settings]), chunk_size)
    ]
    return [Job(shard, number, chunk) for number, chunk in enumerate(chunks)]
