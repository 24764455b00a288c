"""Generates what is absent and scores what has no score, until both are done.

    batches that lack pictures ──► encode worker ──► rollout worker ──► ImageStore (on disk) ──┐
    batches with pictures but no scores ──────────────────────────────────────────────────────┴──► reward worker
                                                                               ──► ScoreStore (on disk)

Pictures that were just generated and pictures found on disk go to the rewards alike: as the files hold them.
"""

from __future__ import annotations

import logging
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from core.cluster.dispatch import Call, Done
from core.progress import Bar, Progress
from rewards.benchmarks.items import Item, ScoredItem
from rewards.benchmarks.layouts import Picture
from rl.evaluate.cluster import BenchmarkCluster
from rl.evaluate.images import ImageStore
from rl.evaluate.plan import Batch, Plan, reward_set_name
from rl.evaluate.scores import ImageScore, ScoreStore
from rollout.engine import SampleRequest
from rollout.sampler import SamplingSpec
from rollout.worker import Policy

log = logging.getLogger(__name__)

QUEUED_PER_WORKER = 3
"""Batches handed out beforehand to each worker: prompt embeddings are megabytes, so not all at once."""
HOPELESS_BATCHES = 4


class NothingScored(RuntimeError):
    """The reward has scored nothing at all in the first batches: it would go on like that."""


@dataclass(frozen=True)
class Asked:
    """A picture to be handed to a reward worker."""

    item: Item
    k: int
    picture: Picture


class EvaluationRun:
    """One pass over a plan. policy: None when nothing is generated. scores: None when nothing is scored."""

    def __init__(
        self,
        plan: Plan,
        images: ImageStore,
        scores: ScoreStore | None,
        cluster: BenchmarkCluster,
        policy: Policy | None,
        progress: Progress,
    ):
        self.plan, self.images, self.scores = plan, images, scores
        self.cluster, self.policy, self.progress = cluster, policy, progress
        self.failures: dict[str, int] = {}
        self._negative: Any = None
        self._asked: dict[int, list[Asked]] = {}
        self._answered_batches = 0
        self._lost: set[int] = set()

    @staticmethod
    def work_left(plan: Plan, images: ImageStore, scores: ScoreStore | None) -> bool:
        """Whether anything could be generated or scored."""
        return any(
            (plan.model is not None and images.lacks(batch)) or unscored(batch, images, scores)
            for batch in plan.batches
        )

    def run(self) -> None:
        """Raises NothingScored, and what a reward or a worker raises that no other worker can mend."""
        lacking = [batch for batch in self.plan.batches if self.policy and self.images.lacks(batch)]
        generating = deque(lacking)
        waiting = {batch.index for batch in lacking}
        scoring = deque(
            b for b in self.plan.batches if b.index not in waiting and unscored(b, self.images, self.scores)
        )
        count = self.plan.count
        log.info("%d batches to generate, %d more to score", len(generating), len(scoring))
        if generating and self.plan.sampling.guidance_scale > 1:
            ref = self.cluster.encoder.encode_text.remote(self.plan.sampling.negative_prompt)
            limit = self.plan.resources.call_timeout_s
            self._negative = ray.put(ray.get(ref, timeout=limit))
        with ExitStack() as bars:
            made = bars.enter_context(
                self.progress.phase("generate", total=_size(generating, count), unit="image")
            )
            both = [*generating, *scoring]
            scored = bars.enter_context(self.progress.phase("score", total=_size(both, count), unit="image"))
            while True:
                self._hand_out(generating, scoring)
                if not self.cluster.dispatcher.outstanding():
                    break
                self._land(self.cluster.dispatcher.wait(), scoring, made, scored)

    def _hand_out(self, generating: deque[Batch], scoring: deque[Batch]) -> None:
        resources = self.plan.resources
        room = {
            "rollout": QUEUED_PER_WORKER * self.plan.workers,
            "reward": resources.reward_workers * (resources.reward_concurrency + 1),
        }
        while generating and self._in_flight["rollout"] < room["rollout"]:
            self._generate(generating.popleft())
        while scoring and self._in_flight["reward"] < room["reward"]:
            self._score(scoring.popleft())

    @property
    def _in_flight(self) -> dict[str, int]:
        rewards = len(self._asked)
        return {"reward": rewards, "rollout": self.cluster.dispatcher.outstanding() - rewards}

    def _generate(self, batch: Batch) -> None:
        encoder, prompts = self.cluster.encoder, [item.prompt for item in batch.items]
        if len(prompts) == 1:
            found = [encoder.encode_one.remote(prompts[0], batch.size)]
        else:
            found = encoder.encode.options(num_returns=len(prompts)).remote(prompts, batch.size)
        seeds = tuple(seed for item in batch.items for seed in self.plan.seeds(item))
        conditionings = [ref for ref in found for _ in range(self.plan.count)]
        sampling = self.plan.sampling
        spec = SamplingSpec(sampling.num_steps, 0.0, sampling.guidance_scale, variant="ode")
        request = SampleRequest(batch.index, 0, seeds, (), size=batch.size)
        args = (request, spec, self.policy, self._negative, *conditionings)
        self.cluster.dispatcher.submit(Call("rollout", batch.index, "sample", args, num_returns=3))

    def _score(self, batch: Batch) -> None:
        """Hand over the pictures without a score; nothing when there are none."""
        asked = unscored(batch, self.images, self.scores)
        if not asked:
            return
        self._asked[batch.index] = asked
        arrays = [np.asarray(one.picture.load())[None] for one in asked]
        args = (batch.index, reward_set_name(batch.part), [one.item.prompt for one in asked], *arrays)
        self.cluster.dispatcher.submit(Call("reward", batch.index, "score", args))

    def _land(self, done: Done, scoring: deque[Batch], made: Bar, scored: Bar) -> None:
        batch = self.plan.batches[done.call.key]  # type: ignore[call-overload]
        size = _size([batch], self.plan.count)
        if done.call.role == "rollout":
            made.advance(size)
            if done.failure is not None:
                log.error(
                    "batch %d is missing, since it could not be generated: %s", batch.index, done.failure
                )
                self._count({"generation": size})
            elif not self._commit(batch, done.refs[2]):
                return
            scoring.append(batch)
            return
        asked = self._asked.pop(batch.index)
        scored.advance(len(asked))
        if done.failure is not None:
            log.error("batch %d is not scored: %s", batch.index, done.failure)
            self._count({"source picture": len(asked)})
            return
        found = [self._image_score(one, row, done.result.components) for row, one in enumerate(asked)]
        assert self.scores is not None
        self.scores.add(batch.index, found, done.result.failures)
        self._count(done.result.failures)
        self._answered_batches += 1
        if self.scores.empty and self._answered_batches >= HOPELESS_BATCHES:
            raise NothingScored(
                f"the first {HOPELESS_BATCHES} batches came back without a single score ({self.failures}); see the "
                "log for the cause, mend the reward, and run this command again: what was generated stays"
            )

    def _commit(self, batch: Batch, ref: Any) -> bool:
        """Fetch and keep a batch. False when its pictures were lost with the node that made them: they are then drawn
        anew, the same ones; a second loss is raised."""
        try:
            images = ray.get(ref, timeout=self.plan.resources.call_timeout_s)
        except RayError as error:
            if batch.index in self._lost:
                raise
            log.warning("batch %d was lost on its way and is drawn again: %s", batch.index, error)
            self._lost.add(batch.index)
            self._generate(batch)
            return False
        self.images.commit(batch, np.asarray(images))
        return True

    def _image_score(self, asked: Asked, row: int, components: dict[str, list[float | None]]) -> ImageScore:
        """Component names lose the reward's label; the reward's own column becomes `score`."""
        values = {
            name.partition("/")[2] or "score": column[row]
            for name, column in components.items()
            if column[row] is not None
        }
        return ImageScore(asked.item.key, asked.k, self.images.sha256(asked.picture), values)  # type: ignore[arg-type]

    def _count(self, failures: dict[str, int]) -> None:
        for cause, number in failures.items():
            self.failures[cause] = self.failures.get(cause, 0) + number


def unscored(batch: Batch, images: ImageStore, scores: ScoreStore | None) -> list[Asked]:
    """The pictures of a batch that are there and have no score; none where nothing is to be scored."""
    if scores is None:
        return []
    return [
        Asked(item, k, picture)
        for item in batch.items
        for k, picture in enumerate(images.pictures(item))
        if picture is not None and not scores.scored(item.key, k, images.sha256(picture))
    ]


def scored_items(plan: Plan, images: ImageStore, scores: ScoreStore) -> list[ScoredItem]:
    """What is known at the end, or now, of every item."""
    return [
        ScoredItem(
            item,
            tuple(
                None if picture is None else scores.get(item.key, k, images.sha256(picture))
                for k, picture in enumerate(images.pictures(item))
            ),
        )
        for item in plan.items
    ]


def _size(batches: Any, count: int) -> int:
    return sum(len(batch.items) * count for batch in batches)
