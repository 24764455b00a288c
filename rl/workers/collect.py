"""Rollout with streamed rewards: a result goes to the reward workers as soon as it is whole, while others are sampled.

a request's prompts ──► encode workers ──► conditioning (references; for the first ones from `encode_ahead`)
its chunks, once that is there ──► rollout workers ──► SampleInfo here; trajectory and images stay in the object store
its images ──► reward workers ──► GroupScore here

What a node took with it is drawn again: the same, since all of it is a function of the request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from core.cluster.dispatch import Dispatcher
from core.cluster.workers import Call, Done
from core.failures import ObjectsLost
from core.progress import Progress
from core.spans import Span
from rl.workers.ahead import HeadStart
from rl.workers.requests import Chunk, RolloutRequest, RolloutResult, encode_call
from rollout.engine import SampleInfo, SampleRequest
from rollout.sampler import SamplingSpec
from rollout.worker import Policy

log = logging.getLogger(__name__)
_DRAWS = 3
_AHEAD = 3
"""Chunks handed out beforehand to each rollout worker, and as many encoded requests: embeddings are megabytes."""


@dataclass
class _Pending:
    """A request of which chunks are still to come."""

    result: RolloutResult
    missing: int
    chunks: list[Chunk] = field(default_factory=list)


class Collector:
    """Samples and scores. Spans of all its work gather in `spans`, under the step that the caller names.

    `negative` is a reference to the negative prompt's conditioning, or None.
    """

    def __init__(self, dispatcher: Dispatcher, progress: Progress):
        self.dispatcher, self.progress = dispatcher, progress
        self.spans: list[Span] = []
        self.negative: Any = None
        self.images = 0
        self._head_start = HeadStart()

    def encode_ahead(self, requests: Sequence[RolloutRequest]) -> None:
        """Have the first of what `sample` is asked for next encoded meanwhile. Returns at once."""
        self._head_start.begin(requests, self.dispatcher.workers("encode"))

    def sample(
        self,
        requests: Sequence[RolloutRequest],
        spec: SamplingSpec,
        policy: Policy,
        *,
        step: int,
        chunk_size: int | None = None,
        label: str = "rollout",
    ) -> Iterator[RolloutResult]:
        """Draw the requests, each in chunks of `chunk_size` samples (None: in one), and yield each as soon as it is
        whole or has failed, in any order. Raises ObjectsLost where nodes take results with them again and again.
        """
        return _until_kept(requests, lambda some: self._sample(some, spec, policy, step, chunk_size, label))

    def score(
        self,
        requests: Sequence[RolloutRequest],
        sample: Callable[[Sequence[RolloutRequest]], Iterable[RolloutResult]],
        reward_set: str,
        *,
        step: int,
        label: str = "scoring",
    ) -> Iterator[RolloutResult]:
        """Score what `sample` draws, and yield each with its score; what failed on either way comes with its failure.

        It is read as it is being sampled, so that scoring overlaps with the rest of the rollout.
        """
        return _until_kept(requests, lambda some: self._score(some, sample(some), reward_set, step, label))

    def _sample(
        self,
        requests: Sequence[RolloutRequest],
        spec: SamplingSpec,
        policy: Policy,
        step: int,
        chunk_size: int | None,
        label: str,
    ) -> Iterator[RolloutResult]:
        pending: dict[int, _Pending] = {}
        failed: list[RolloutResult] = []
        ahead = _AHEAD * max(1, len(self.dispatcher.workers("rollout")))

        def conditioned() -> Iterator[RolloutResult]:
            by_id = {request.id: request for request in requests}
            for request in requests:
                if (conditionings := self._head_start.take(request)) is not None:
                    yield RolloutResult(by_id.pop(request.id), conditionings)
            for done in self.dispatcher.stream("encode", map(encode_call, by_id.values()), ahead=ahead):
                yield encoded(by_id[done.call.key], done)  # type: ignore[index]

        def calls() -> Iterator[Call]:
            for result in conditioned():
                if result.failure:
                    failed.append(result)
                    continue
                chunks = self.sample_calls(result, spec, policy, chunk_size)
                pending[result.request.id] = _Pending(result, len(chunks))
                yield from chunks

        total = sum(len(request.seeds) for request in requests)
        with self.progress.phase(label, total=total, unit="image") as bar:
            for done in self.dispatcher.stream("rollout", calls(), ahead=ahead):
                number, _, size = _chunk_key(done)
                entry = pending[number]
                bar.advance(size)
                finished = self._add_chunk(entry, done, policy, step)
                if not entry.missing:
                    del pending[number]  # and with it the references, unless the caller keeps them
                if finished is not None:
                    yield finished
            yield from failed

    def _score(
        self,
        requests: Sequence[RolloutRequest],
        sampled: Iterable[RolloutResult],
        reward_set: str,
        step: int,
        label: str,
    ) -> Iterator[RolloutResult]:
        waiting: dict[Any, RolloutResult] = {}
        failed: list[RolloutResult] = []

        def calls() -> Iterator[Call]:
            for result in sampled:
                request = result.request
                if result.failure:
                    failed.append(result)
                    continue
                waiting[request.id] = result
                prompts = [request.prompt_of(k) for k in range(len(request.seeds))]
                args = (request.id, reward_set, prompts, *(chunk.images for chunk in result.chunks))
                yield Call("reward", request.id, "score", args)

        total = sum(len(request.seeds) for request in requests)
        with self.progress.phase(label, total=total, unit="image") as bar:
            for done in self.dispatcher.stream("reward", calls()):
                result = waiting.pop(done.call.key)
                bar.advance(len(result.request.seeds))
                if done.failure is not None:
                    yield result.failed(done.failure)
                    continue
                self.images += len(done.result.rewards)
                longest = max(done.result.seconds.values(), default=0.0)
                self.spans.append(Span("reward", "reward", done.time - longest, done.time, step))
                yield replace(result, score=done.result)
            yield from failed

    def take_images(self) -> int:
        """Images scored since the last call."""
        taken, self.images = self.images, 0
        return taken

    def encode_negative(self, text: str) -> Any:
        """Have the negative prompt encoded, for all sampling to come; its conditioning."""
        negative = encode_text(self.dispatcher, text)
        self.negative = ray.put(negative)
        return negative

    def sample_calls(
        self, result: RolloutResult, spec: SamplingSpec, policy: Policy, chunk_size: int | None = None
    ) -> list[Call]:
        """The calls that draw an encoded request, in chunks of `chunk_size` samples (None: in one)."""
        request, calls = result.request, []
        size = chunk_size or len(request.seeds)
        for first in range(0, len(request.seeds), size):
            seeds = request.seeds[first : first + size]
            samples = SampleRequest(request.id, first, seeds, request.steps, request.trunk_seed, request.size)
            own = result.conditionings
            if len(own) > 1:  # a single one serves all samples of the chunk
                own = tuple(result.conditioning_of(first + k) for k in range(len(seeds)))
            args = (samples, spec, policy, self.negative, *own)
            calls.append(Call("rollout", (request.id, first, len(seeds)), "sample", args, num_returns=3))
        return calls

    def _add_chunk(self, entry: _Pending, done: Done, policy: Policy, step: int) -> RolloutResult | None:
        """The result where this chunk makes it whole, or is the first of it to fail."""
        entry.missing -= 1
        if done.failure is not None:
            known, entry.result = entry.result.failure, entry.result.failed(done.failure)
            return None if known else entry.result
        self._note_sample(done.result, policy, step)
        _, first, size = _chunk_key(done)
        entry.chunks.append(Chunk(first, size, done.refs[1], done.refs[2]))
        if entry.missing or entry.result.failure:
            return None
        return replace(entry.result, chunks=tuple(sorted(entry.chunks, key=lambda chunk: chunk.first)))

    def _note_sample(self, info: SampleInfo, policy: Policy, step: int) -> None:
        policy.check(info)
        self.spans.append(Span("rollout", info.worker, info.started, info.started + info.seconds, step))


def encoded(request: RolloutRequest, done: Done) -> RolloutResult:
    """A request with references to its conditionings, or with its failure."""
    result = RolloutResult(request, done.refs[1:])
    return result if done.failure is None else result.failed(done.failure)


def encode_text(dispatcher: Dispatcher, text: str) -> Any:
    """The conditioning of text alone."""
    dispatcher.submit(Call("encode", text, "encode_text", (text,)))
    return dispatcher.wait("encode").result


def _until_kept(
    requests: Sequence[RolloutRequest], draw: Callable[[Sequence[RolloutRequest]], Iterator[RolloutResult]]
) -> Iterator[RolloutResult]:
    """The results of `draw`; what was lost with a node is drawn again."""
    for _ in range(_DRAWS):
        lost = []
        for result in draw(requests):
            if result.lost:
                log.warning("request %d is drawn again: %s", result.request.id, result.failure)
                lost.append(result.request)
            else:
                yield result
        if not lost:
            return
        requests = lost
    raise ObjectsLost(
        f"{len(requests)} requests were lost with their nodes {_DRAWS} times; are nodes leaving?"
    )


def _chunk_key(done: Done) -> tuple[int, int, int]:
    """Request, first sample and number of samples of a finished call to sample."""
    return done.call.key  # type: ignore[return-value]
