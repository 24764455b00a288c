"""The parts of a recipe that concern rewards: one reward's keys, and what `rewards.serve` reads of a whole recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from omegaconf import MISSING

from core.keys import AtLeast0, Count, Finite, Positive, Share, Task
from core.prompts import Prompt
from rewards.base import RewardSet, RewardSpec, ServiceSpec
from rewards.loading import default_timeout_s


@dataclass
class ServiceConfig:
    """Where a reward is served over HTTP; see rewards/service/README.md."""

    urls: list[str] = field(default_factory=list)
    """`http://host:port` of equal services; calls are spread over them."""
    token_env: str | None = None
    """Name of the environment variable with the bearer token; null sends none."""
    codec: Literal["png", "raw"] = "png"
    """How pictures travel; both are lossless."""
    unavailable_s: Positive = 120.0
    """Seconds to wait for a service to come (back) before the run is stopped."""


@dataclass
class RewardConfig:
    """One reward of a stage or an evaluation; see rewards/README.md for the protocol and the failure policy."""

    name: str = MISSING
    """A built-in reward, `package.module:attribute` or `path/to/file.py:attribute`."""
    label: str | None = None
    """Name in logs and metrics; null: the tail of `name`."""
    weight: Finite = 1.0
    """Factor in the weighted sum; 0 logs the reward without training on it."""
    params: dict[str, Any] = field(default_factory=dict)
    """Arguments of the reward itself."""
    timeout_s: Positive | None = None
    """Time limit of one attempt, in seconds; null: what the reward itself states, else 60."""
    attempts: Count = 3
    """Calls before the samples of a failing one count as missing."""
    on_missing: Literal["mask", "drop_group", "stop"] = "mask"
    """What a missing score does: leave the sample out, leave its group out, end the run."""
    max_missing_share: Share = 0.2
    """The run stops when a larger share of recent samples is missing."""
    constant_steps: AtLeast0 = 10
    """The run stops when all scores of this many steps in a row are equal; 0: never."""
    service: ServiceConfig | None = None


@dataclass
class StagePartConfig:
    """One task of a joint stage."""

    task: Task = MISSING
    """What is trained: image editing or text-to-image."""
    prompts: str = MISSING
    """JSONL file of prompts."""
    rewards: list[RewardConfig] = field(default_factory=list)


@dataclass
class ServedModel:
    """What serving reads of `model:`."""

    open_ended: ClassVar[bool] = True

    height: Count = 512
    """Height of the scored pictures, in pixels."""
    width: Count = 512
    """Width of the scored pictures, in pixels."""


@dataclass
class ServedStage:
    """A stage as far as serving goes; `task`, `prompts` and `rewards`, or `parts` that have them."""

    name: Any = None
    """Name of the stage."""
    task: Literal["edit", "t2i", "joint"] = MISSING
    """What the stage trains."""
    prompts: str | None = None
    """JSONL file of prompts, on the first of which a reward is tried."""
    rewards: list[RewardConfig] = field(default_factory=list)
    parts: list[StagePartConfig] = field(default_factory=list)
    steps: Any = None
    """Read by `rl.train`."""
    rehearsal: Any = None
    """Read by `rl.train`."""


@dataclass
class ServedEvaluationTask(StagePartConfig):
    """A held-out task as far as serving goes."""

    num_prompts: Any = None
    """Read by `rl.train`."""


@dataclass
class ServedEvaluation:
    """What serving reads of `evaluation:`."""

    open_ended: ClassVar[bool] = True

    tasks: list[ServedEvaluationTask] = field(default_factory=list)


REST = ("name", "output_dir", "seed", "rollout", "learner", "alarms", "resources", "checkpoint", "gallery")
"""What else a run's recipe holds."""


@dataclass
class ServedRecipe:
    """What `rewards.serve` reads of a run's recipe."""

    model: ServedModel = field(default_factory=ServedModel)
    stages: list[ServedStage] = field(default_factory=list)
    evaluation: ServedEvaluation = field(default_factory=ServedEvaluation)
    """Held-out evaluation of the run."""


def reward_specs(rewards: Sequence[RewardConfig]) -> list[RewardSpec]:
    """A recipe's rewards as the rest of this package knows them."""
    return [
        RewardSpec(
            r.name, r.weight, dict(r.params), timeout_s(r), r.attempts, r.on_missing, r.max_missing_share,
            r.constant_steps, r.label, _service_spec(r.service),
        )
        for r in rewards
    ]  # fmt: skip


def timeout_s(reward: RewardConfig) -> float:
    """The time limit of one attempt in seconds: the recipe's, else the reward's own."""
    return default_timeout_s(reward.name, reward.params) if reward.timeout_s is None else reward.timeout_s


def reward_set(
    name: str, task: str, rewards: Sequence[RewardConfig], prompts: Sequence[Prompt], height: int, width: int
) -> RewardSet:
    """Rewards with their first real prompt, since a reward may read its metadata in the dry call."""
    example = (
        {"example_prompt": prompts[0].prompt, "example_metadata": prompts[0].metadata} if prompts else {}
    )
    return RewardSet(name, task, reward_specs(rewards), height=height, width=width, **example)  # type: ignore[arg-type]


def served_sets(recipe: ServedRecipe, read_prompts: Callable[[str, str], list[Prompt]]) -> list[RewardSet]:
    """What the recipe's stages and evaluation score with, with prompts of `read_prompts(path, task)`."""
    parts: list[StagePartConfig | ServedStage] = []
    for stage in recipe.stages:
        parts += [stage] if not stage.parts else stage.parts
    return [
        reward_set(
            part.task, part.task, part.rewards, read_prompts(part.prompts or "", part.task),
            recipe.model.height, recipe.model.width,
        )
        for part in [*parts, *recipe.evaluation.tasks]
    ]  # fmt: skip


def _service_spec(service: ServiceConfig | None) -> ServiceSpec | None:
    if service is None:
        return None
    return ServiceSpec(tuple(service.urls), service.token_env, service.codec, service.unavailable_s)
