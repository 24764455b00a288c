"""Rollout with streamed rewards: a result goes to the reward workers as soon as it is whole, while others are sampled.

prompts ──► encode worker ──► conditioning (references)
chunks of a request ──► rollout workers ──► SampleInfo here; trajectory and images stay in the object store
a request's images ──► reward workers ──► GroupScore here
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from core.cluster.dispatch import Call, Dispatcher, Done
from core.progress import Progress
from core.spans import Span
from rl.workers.requests import Chunk, RolloutRequest, RolloutResult
from rollout.engine import SampleInfo, SampleRequest
from rollout.sampler import SamplingSpec
from rollout.worker import Policy


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

    def __init__(self, dispatcher: Dispatcher, encoder: Any, progress: Progress):
        self.dispatcher, self.encoder, self.progress = dispatcher, encoder, progress
        self.spans: list[Span] = []
        self.negative: Any = None
        self.images = 0

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
        whole or has failed, in any order.
        """
        pending: dict[int, _Pending] = {}

        def calls() -> Iterator[Call]:
            for request in requests:
                result = self.encode(request)
                chunks = self.sample_calls(result, spec, policy, chunk_size)
                pending[request.id] = _Pending(result, len(chunks))
                yield from chunks

        total = sum(len(request.seeds) for request in requests)
        with self.progress.phase(label, total=total, unit="image") as bar:
            for done in self.dispatcher.stream("rollout", calls()):
                number, _, size = _chunk_key(done)
                entry = pending[number]
                bar.advance(size)
                finished = self._add_chunk(entry, done, policy, step)
                if not entry.missing:
                    del pending[number]  # and with it the references, unless the caller keeps them
                if finished is not None:
                    yield finished

    def score(
        self,
        sampled: Iterable[RolloutResult],
        reward_set: str,
        *,
        step: int,
        total: int,
        label: str = "scoring",
    ) -> Iterator[RolloutResult]:
        """Score what was sampled, and yield each with its score; what failed on either way comes with its failure.

        `sampled` is read as it is being sampled, so that scoring overlaps with the rest of the rollout. total: its
        samples, for the progress line.
        """
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

        with self.progress.phase(label, total=total, unit="image") as bar:
            for done in self.dispatcher.stream("reward", calls()):
                result = waiting.pop(done.call.key)
                bar.advance(len(result.request.seeds))
                if done.failure is not None:
                    yield replace(result, failure=str(done.failure))
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

    def encode(self, request: RolloutRequest) -> RolloutResult:
        """The request with references to its conditionings, which the encode worker fills while sampling starts.

        One call per prompt: a reference image that cannot be read takes its own request alone with it.
        """
        refs = [self.encoder.encode_one.remote(prompt, request.size) for prompt in request.prompts]
        return RolloutResult(request, tuple(refs))

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
            known, entry.result = entry.result.failure, replace(entry.result, failure=str(done.failure))
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


def _chunk_key(done: Done) -> tuple[int, int, int]:
    """Request, first sample and number of samples of a finished call to sample."""
    return done.call.key  # type: ignore[return-value]
