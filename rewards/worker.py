"""The Ray actor that scores groups; all policy is in `rewards/scoring.py`.

An async actor: with `max_concurrency` above 1 it scores several groups at once. Async rewards then overlap,
and each blocking reward takes one group after the other.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from PIL import Image

from core.failures import DataFailure
from core.prompts import Prompt, load_references
from models.references import shown_references
from rewards.base import RewardLoadError, RewardSet, RewardSpec, reward_label
from rewards.calling import RewardBatch
from rewards.checks import try_reward
from rewards.inputs import check_inputs
from rewards.loading import LoadedReward, RewardSource, load_reward, set_problems
from rewards.scoring import GroupScore, score_group

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardWorkerInfo:
    """Who answers, and the source of every reward it loaded, by reward set and label."""

    worker: str
    sources: dict[str, dict[str, RewardSource]]


class RewardScorer:
    """The actor's methods as a plain class. `reward_sets` are all sets of the run, since a restarted actor is
    rebuilt from its constructor alone. Rewards of one name with equal params and service are one model, whatever
    their weights and labels.
    """

    def __init__(
        self,
        reward_sets: Sequence[RewardSet],
        *,
        threads: int = 1,
        workers: int = 1,
        held: Mapping[str, str] | None = None,
    ) -> None:
        """Load every reward. `workers`: how many of these actors share what a reward may ask of an endpoint; `held`:
        what the code and files of rewards must be, on every node and after each restart.

        Raises RewardLoadError for a bad set, the first bad reward, or code that is another.
        """
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for numeric libraries that load from here on
        self._sets = {reward_set.name: reward_set for reward_set in reward_sets}
        if held:
            check_inputs((spec for reward_set in reward_sets for spec in reward_set.rewards), held)
        loaded: list[LoadedReward] = []
        self._rewards: dict[str, list[LoadedReward]] = {}
        for reward_set in reward_sets:
            problems = set_problems(reward_set.rewards)
            if problems:
                raise RewardLoadError(f"reward set {reward_set.name!r}: " + "; ".join(problems))
            self._rewards[reward_set.name] = [_load_once(spec, loaded) for spec in reward_set.rewards]
        for reward in loaded:
            if hasattr(reward.owner, "share_rates"):
                reward.owner.share_rates(workers)
        self._ready: set[tuple[int, str]] = set()  # of owners, with the task: a probe may cost money
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)

    async def ping(self) -> RewardWorkerInfo:
        """Answers as soon as the rewards are loaded."""
        sources = {
            name: {loaded.label: getattr(loaded.owner, "served_source", loaded.source) for loaded in rewards}
            for name, rewards in self._rewards.items()
        }
        return RewardWorkerInfo(f"{os.uname().nodename}:{os.getpid()}", sources)

    async def ready(self) -> RewardWorkerInfo:
        """Answers once every reward has passed its dry call or, once for each task, its readiness probe here.

        Raises RewardLoadError with all problems.
        """
        problems: list[str] = []
        for name, rewards in self._rewards.items():
            for loaded in rewards:
                probe = id(loaded.owner), self._sets[name].task
                if probe in self._ready:
                    continue
                found = await try_reward(loaded, self._sets[name], probe=True, restarted=_restarted())
                problems += found
                if hasattr(loaded.owner, "readiness") and not found:
                    self._ready.add(probe)
        if problems:
            raise RewardLoadError("\n".join(problems))
        return await self.ping()

    async def score(
        self, group_id: Hashable, reward_set: str, prompts: Sequence[Prompt], *image_chunks: np.ndarray
    ) -> GroupScore:
        """Score one group of G samples.

        `prompts` has G entries. `image_chunks` are uint8 arrays [n, H, W, 3], in order the G images of the
        group; pass them as object references, which Ray resolves. Raises DataFailure for reference images that are
        unreadable or too many for their pixels, ValueError for arrays of another kind or number, and what `score_group`
        raises.
        """
        images = [image for chunk in image_chunks for image in _images(chunk)]
        if len(images) != len(prompts):
            raise ValueError(f"group {group_id}: {len(images)} images came for {len(prompts)} prompts")
        batch = RewardBatch(
            images=images,
            prompts=[prompt.prompt for prompt in prompts],
            references=_references(self._sets[reward_set], prompts, images),
            metadata=[prompt.metadata for prompt in prompts],
            sources=[prompt.references for prompt in prompts],
        )
        return await score_group(group_id, self._rewards[reward_set], batch)


def _restarted() -> bool:
    """Whether Ray has started this actor anew."""
    context = ray.get_runtime_context() if ray.is_initialized() else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own use of what it deprecates
        return context is not None and bool(
            context.get_actor_id() and context.was_current_actor_reconstructed
        )


def _load_once(spec: RewardSpec, loaded: list[LoadedReward]) -> LoadedReward:
    for reward in loaded:
        if reward.spec == spec:
            return reward
    same = next((reward for reward in loaded if _identity(reward.spec) == _identity(spec)), None)
    loaded.append(
        load_reward(spec) if same is None else dataclasses.replace(same, spec=spec, label=reward_label(spec))
    )
    return loaded[-1]


def _identity(spec: RewardSpec) -> tuple[Any, ...]:
    """What a reward is. A service is asked by the label, and told the time limit."""
    asked = None if spec.service is None else (spec.service, spec.timeout_s, reward_label(spec))
    return spec.name, spec.params, asked


def _images(chunk: np.ndarray) -> list[Image.Image]:
    if chunk.dtype != np.uint8 or chunk.ndim != 4 or chunk.shape[-1] != 3:
        raise ValueError(f"images must be a uint8 array [n, H, W, 3], got {chunk.dtype} {list(chunk.shape)}")
    return [Image.fromarray(image) for image in chunk]


def _references(
    rewards: RewardSet, prompts: Sequence[Prompt], images: Sequence[Image.Image]
) -> list[list[Image.Image]]:
    """The reference images of each sample as the model was shown them. A group shares one prompt and one size, so they
    are read once."""
    shown: dict[tuple[tuple[str, ...], tuple[int, int]], list[Image.Image]] = {}
    keys = [(prompt.references, image.size) for prompt, image in zip(prompts, images, strict=True)]
    for prompt, image, key in zip(prompts, images, keys, strict=True):
        if key in shown:
            continue
        try:
            shown[key] = load_references(prompt)
            if not rewards.references_as_given:
                drawn = image.height, image.width
                shown[key] = shown_references(
                    shown[key], drawn, rewards.reference_multiple, rewards.reference_pixels
                )
        except ValueError as error:
            raise DataFailure(str(error)) from error
    return [shown[key] for key in keys]


RewardWorker = ray.remote(RewardScorer)
