"""Generates what is absent and scores what has no score, until both are done.

    batches that lack pictures ──► encode worker ──► rollout worker ──► ImageStore (on disk) ──┐
    batches with pictures but no scores ──────────────────────────────────────────────────────┴──► reward worker
                                                                               ──► ScoreStore (on disk)

Pictures that were just generated and pictures found on disk go to the rewards alike: as the files hold them.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from core.cluster.workers import Call, Done
from core.failures import ObjectsLost
from core.progress import Bar, Progress
from rewards.benchmarks.items import Item, ScoredItem
from rewards.benchmarks.layouts import Picture
from rl.evaluate.images import ImageStore
from rl.evaluate.plan import Batch, Plan, reward_set_name
from rl.evaluate.scores import ImageScore, ScoreStore
from rl.workers.collect import Collector, encoded
from rl.workers.requests import RolloutRequest, encode_call
from rl.workers.start import Workers
from rollout.sampler import SamplingSpec
from rollout.shapes import Shape
from rollout.worker import Policy

log = logging.getLogger(__name__)

QUEUED_PER_WORKER = 3
"""Batches handed out beforehand to each worker: prompt embeddings are megabytes, so not all at once."""
HOPELESS_BATCHES = 4


class NothingScored(RuntimeError):
    """The reward has scored nothing at all in the first batches: it would go on like that."""


@dataclass(frozen=True)
class UnscoredPicture:
    """A picture that is there and has no score."""

    item: Item
    k: int
    picture: Picture


class EvaluationRun:
    """One pass over a plan. policy: None when nothing is generated. scores: None when nothing is scored.

    keep_record: called before a result is kept; says in the output folder what its results are made from.
    """

    def __init__(
        self,
        plan: Plan,
        images: ImageStore,
        scores: ScoreStore | None,
        workers: Workers,
        policy: Policy | None,
        progress: Progress,
        keep_record: Callable[[], None],
    ):
        self.plan, self.images, self.scores, self.policy = plan, images, scores, policy
        self.progress, self.keep_record = progress, keep_record
        self.dispatcher = workers.dispatcher
        self.collector = Collector(workers.dispatcher, progress)
        self.failures: Counter[str] = Counter()
        self._generating: deque[Batch] = deque()
        self._scoring: deque[Batch] = deque()
        self._being_scored: dict[int, list[UnscoredPicture]] = {}
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
        plan = self.plan
        for batch in plan.batches:
            if self.policy and self.images.lacks(batch):
                self._generating.append(batch)
            elif unscored(batch, self.images, self.scores):
                self._scoring.append(batch)
        log.info("%d batches to generate, %d more to score", len(self._generating), len(self._scoring))
        if self._generating and plan.sampling.guidance_scale > 1:
            self.collector.encode_negative(plan.sampling.negative_prompt)
        lacking = self._size(self._generating)
        with (
            self.progress.phase("generate", total=lacking, unit="image") as made,
            self.progress.phase("score", total=lacking + self._size(self._scoring), unit="image") as scored,
        ):
            while True:
                self._hand_out()
                if not self.dispatcher.outstanding():
                    break
                done = self.dispatcher.wait()
                if done.call.role == "encode" and done.failure is None:
                    self._sample(done)
                elif done.call.role != "reward":
                    self._keep_pictures(done, made)
                else:
                    self._keep_scores(done, scored)

    def _hand_out(self) -> None:
        """Give every role as much as it may have beforehand."""
        resources, outstanding = self.plan.resources, self.dispatcher.outstanding
        enough = QUEUED_PER_WORKER * self.plan.workers
        while self._generating and outstanding("encode") + outstanding("rollout") < enough:
            self._generate(self._generating.popleft())
        room = resources.reward_workers * (resources.reward_concurrency + 1)
        while self._scoring and outstanding("reward") < room:
            self._score(self._scoring.popleft())

    def _generate(self, batch: Batch) -> None:
        self.dispatcher.submit(encode_call(self._request(batch)))

    def _request(self, batch: Batch) -> RolloutRequest:
        seeds = tuple(seed for item in batch.items for seed in self.plan.seeds(item))
        prompts = tuple(item.prompt for item in batch.items)
        return RolloutRequest(batch.index, prompts, seeds, shape=Shape(batch.size))

    def _sample(self, done: Done) -> None:
        """A batch's prompts are encoded: draw it."""
        assert self.policy is not None
        sampling = self.plan.sampling
        spec = SamplingSpec(sampling.num_steps, 0.0, sampling.guidance_scale, variant="ode")
        number: Any = done.call.key
        request = self._request(self.plan.batches[number])
        for call in self.collector.sample_calls(encoded(request, done), spec, self.policy):
            self.dispatcher.submit(call)

    def _score(self, batch: Batch) -> None:
        """Hand over the pictures without a score; nothing when there are none."""
        pictures = unscored(batch, self.images, self.scores)
        if not pictures:
            return
        self._being_scored[batch.index] = pictures
        arrays = [np.asarray(one.picture.load())[None] for one in pictures]
        args = (batch.index, reward_set_name(batch.part), [one.item.prompt for one in pictures], *arrays)
        self.dispatcher.submit(Call("reward", batch.index, "score", args))

    def _keep_pictures(self, done: Done, bar: Bar) -> None:
        key: Any = done.call.key
        batch = self.plan.batches[key if done.call.role == "encode" else key[0]]
        if isinstance(done.failure, ObjectsLost):
            self._draw_again(batch, done.failure)
            return
        size = self._size([batch])
        bar.advance(size)
        if done.failure is not None:
            log.error("batch %d is missing, since it could not be generated: %s", batch.index, done.failure)
            self.failures["generation"] += size
        else:
            assert self.policy is not None
            self.policy.check(done.result)
            if not self._commit(batch, done.refs[2]):
                return
        self._scoring.append(batch)

    def _keep_scores(self, done: Done, bar: Bar) -> None:
        number: int = done.call.key  # type: ignore[assignment]
        pictures = self._being_scored.pop(number)
        bar.advance(len(pictures))
        if done.failure is not None:
            log.error("batch %d is not scored: %s", number, done.failure)
            self.failures["source picture"] += len(pictures)
            return
        found = [self._image_score(one, row, done.result.components) for row, one in enumerate(pictures)]
        assert self.scores is not None
        self.keep_record()
        self.scores.add(number, found, done.result.failures)
        self.failures.update(done.result.failures)
        self._answered_batches += 1
        if self.scores.empty and self._answered_batches >= HOPELESS_BATCHES:
            raise NothingScored(
                f"the first {HOPELESS_BATCHES} batches came back without a single score ({dict(self.failures)}); see "
                "the log for the cause, mend the reward, and run this command again: what was generated stays"
            )

    def _commit(self, batch: Batch, ref: Any) -> bool:
        """Fetch and keep a batch. False when its pictures were lost with the node that made them: they are then drawn
        anew, the same ones; a second loss is raised."""
        try:
            images = ray.get(ref, timeout=self.plan.resources.call_timeout_s)
        except RayError as error:
            self._draw_again(batch, error)
            return False
        self.keep_record()
        self.images.commit(batch, np.asarray(images))
        return True

    def _draw_again(self, batch: Batch, error: Exception) -> None:
        if batch.index in self._lost:
            raise error
        log.warning("batch %d was lost on its way and is drawn again: %s", batch.index, error)
        self._lost.add(batch.index)
        self._generate(batch)

    def _image_score(
        self, one: UnscoredPicture, row: int, components: Mapping[str, list[float | None]]
    ) -> ImageScore:
        """Component names lose the reward's label; the reward's own column becomes `score`."""
        values = {
            name.partition("/")[2] or "score": value
            for name, column in components.items()
            if (value := column[row]) is not None
        }
        return ImageScore(one.item.key, one.k, self.images.sha256(one.picture), values)

    def _size(self, batches: Iterable[Batch]) -> int:
        return sum(len(batch.items) * self.plan.count for batch in batches)


def unscored(batch: Batch, images: ImageStore, scores: ScoreStore | None) -> list[UnscoredPicture]:
    """The pictures of a batch that are there and have no score; none where nothing is to be scored."""
    if scores is None:
        return []
    return [
        UnscoredPicture(item, k, picture)
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
