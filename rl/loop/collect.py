"""Rollout with streamed rewards: groups go to the reward workers as soon as they land, while others are sampled.

prompts ──► encode worker ──► conditioning (references)
chunks of a group ──► rollout workers ──► SampleInfo here; trajectory and images stay in the object store
a group's images ──► reward workers ──► GroupScore here
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from core.cluster.dispatch import Call, Dispatcher, Done
from core.progress import Progress
from core.prompts import Prompt
from core.seeds import derive_seed
from core.spans import Span
from rewards.scoring import GroupScore
from rollout.engine import SampleInfo, SampleRequest
from rollout.prompts import PromptGroup
from rollout.sampler import SamplingSpec
from rollout.worker import Policy

log = logging.getLogger(__name__)
_ENCODE_BATCH = 32


@dataclass(frozen=True)
class Chunk:
    """A landed piece of a group: sample k lies in row k - first of the trajectory and of the images."""

    first: int
    size: int
    trajectory: Any
    images: Any


@dataclass(frozen=True)
class SampledGroup:
    """A group with its score, or with the reason why it could not be sampled."""

    group: PromptGroup
    steps: tuple[int, ...]
    conditioning: Any
    chunks: tuple[Chunk, ...]
    score: GroupScore | None
    failure: str = ""


@dataclass(frozen=True)
class SampledPrompt:
    """One picture: row `row` of a trajectory, and its conditioning (both references)."""

    trajectory: Any
    row: int
    conditioning: Any


@dataclass
class _Pending:
    group: PromptGroup
    steps: tuple[int, ...]
    conditioning: Any
    missing: int
    chunks: list[Chunk] = field(default_factory=list)
    abandoned: bool = False


class Collector:
    """Samples and scores. Spans and policy checks of everything it does gather in `spans`."""

    def __init__(self, dispatcher: Dispatcher, encoder: Any, progress: Progress):
        self.dispatcher, self.encoder, self.progress = dispatcher, encoder, progress
        self.spans: list[Span] = []
        self.negative: Any = None
        self.images = 0

    def encode(self, prompts: Sequence[Prompt]) -> list[Any]:
        """One reference to a `Conditioning` per prompt; the encode worker fills them while sampling starts."""
        refs: list[Any] = []
        for start in range(0, len(prompts), _ENCODE_BATCH):
            part = list(prompts[start : start + _ENCODE_BATCH])
            if len(part) == 1:
                refs.append(self.encoder.encode_one.remote(part[0]))
            else:
                refs += self.encoder.encode.options(num_returns=len(part)).remote(part)
        return refs

    def scored_groups(
        self,
        groups: Sequence[PromptGroup],
        spec: SamplingSpec,
        policy: Policy,
        reward_set: str,
        chunk_size: int,
        step: int,
    ) -> Iterator[SampledGroup]:
        """Sample every group in chunks of `chunk_size` and yield each as soon as it is scored (any order)."""
        pending: dict[int, _Pending] = {}
        # One call per group: a reference image that fails takes no other group with it.
        for group in groups:
            steps = spec.stochastic_steps(derive_seed("group-steps", *group.seeds[:1]))
            trunk = derive_seed("trunk", *group.seeds[:1]) if spec.branch else None
            (conditioning,) = self.encode([group.prompt])
            size = len(group.seeds)
            pending[group.id] = _Pending(group, steps, conditioning, missing=-(-size // chunk_size))
            for first in range(0, size, chunk_size):
                seeds = group.seeds[first : first + chunk_size]
                request = SampleRequest(group.id, first, seeds, steps, trunk)
                args = (request, spec, policy, self.negative, conditioning)
                self.dispatcher.submit(Call("rollout", (group.id, first), "sample", args, num_returns=3))
        with ExitStack() as bars:
            total = sum(len(group.seeds) for group in groups)
            sampled = bars.enter_context(self.progress.phase("rollout", total=total, unit="image"))
            scored = bars.enter_context(self.progress.phase("scoring", total=total, unit="image"))
            while self.dispatcher.outstanding():
                done = self.dispatcher.wait()
                if done.call.role == "rollout":
                    n = len(done.call.args[0].seeds)
                    sampled.advance(n)
                    finished = self._landed(done, pending, policy, reward_set, step)
                else:
                    finished = self._scored(done, pending, step)
                if finished is not None:
                    scored.advance(len(finished.group.seeds))
                    yield finished

    def _landed(
        self, done: Done, pending: dict[int, _Pending], policy: Policy, reward_set: str, step: int
    ) -> SampledGroup | None:
        """A chunk came back; hand the group on to the rewards when it is whole."""
        group_id = done.call.args[0].group_id
        entry = pending[group_id]
        entry.missing -= 1
        if done.failure is not None:
            if entry.abandoned:
                return None
            entry.abandoned = True
            return SampledGroup(entry.group, entry.steps, entry.conditioning, (), None, str(done.failure))
        self._note_sample(done.result, policy, step)
        request = done.call.args[0]
        entry.chunks.append(Chunk(request.first, len(request.seeds), done.refs[1], done.refs[2]))
        if entry.missing == 0 and not entry.abandoned:
            entry.chunks.sort(key=lambda chunk: chunk.first)
            self._submit_score(
                group_id,
                reward_set,
                [entry.group.prompt] * len(entry.group.seeds),
                [c.images for c in entry.chunks],
            )
        return None

    def _scored(self, done: Done, pending: dict[int, _Pending], step: int) -> SampledGroup:
        entry = pending[done.call.args[0]]
        if done.failure is not None:
            return SampledGroup(entry.group, entry.steps, entry.conditioning, (), None, str(done.failure))
        self._note_score(done.result, step)
        return SampledGroup(entry.group, entry.steps, entry.conditioning, tuple(entry.chunks), done.result)

    def _submit_score(self, key: int, reward_set: str, prompts: list[Prompt], images: list[Any]) -> None:
        self.dispatcher.submit(Call("reward", key, "score", (key, reward_set, prompts, *images)))

    def score_prompts(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        spec: SamplingSpec,
        policy: Policy,
        reward_set: str,
        batch_size: int,
        step: int,
        label: str,
    ) -> tuple[list[float | None], dict[str, list[float | None]], list[Any]]:
        """One image per prompt, scored: evaluation. Batches are fixed by position, whatever workers there are.

        Returns rewards and components in prompt order, and one reference to images [n, H, W, 3] per batch.
        """
        starts = range(0, len(prompts), batch_size)
        scores: dict[int, GroupScore | None] = {}
        images: dict[int, Any] = {}
        with self.progress.phase(label, total=len(prompts), unit="image") as bar:
            for start in starts:
                part = prompts[start : start + batch_size]
                request = SampleRequest(start, 0, tuple(seeds[start : start + batch_size]), ())
                args = (request, spec, policy, self.negative, *self.encode(part))
                self.dispatcher.submit(Call("rollout", start, "sample", args, num_returns=3))
            while self.dispatcher.outstanding():
                done = self.dispatcher.wait()
                start = done.call.key  # type: ignore[assignment]
                part = list(prompts[start : start + batch_size])
                if done.failure is not None:
                    log.error(
                        "%s: prompts %d-%d not scored: %s", label, start, start + len(part) - 1, done.failure
                    )
                    scores[start] = None
                elif done.call.role == "rollout":
                    self._note_sample(done.result, policy, step)
                    images[start] = done.refs[2]
                    self._submit_score(start, reward_set, part, [done.refs[2]])
                    continue
                else:
                    self._note_score(done.result, step)
                    scores[start] = done.result
                bar.advance(len(part))
        rewards, components = _in_order(scores, starts, len(prompts), batch_size)
        return rewards, components, [images.get(start) for start in starts]

    def sample_prompts(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        spec: SamplingSpec,
        policy: Policy,
        batch_size: int,
        step: int,
        label: str,
    ) -> list[SampledPrompt]:
        """One picture per prompt, in prompt order, not scored. A batch that fails is logged and left out."""
        landed: dict[int, list[SampledPrompt]] = {}
        with self.progress.phase(label, total=len(prompts), unit="image") as bar:
            # One call per prompt, as in training: a reference image that fails takes its own batch alone with it.
            conditionings = [ref for prompt in prompts for ref in self.encode([prompt])]
            for start in range(0, len(prompts), batch_size):
                request = SampleRequest(start, 0, tuple(seeds[start : start + batch_size]), ())
                args = (request, spec, policy, self.negative, *conditionings[start : start + batch_size])
                self.dispatcher.submit(Call("rollout", start, "sample", args, num_returns=3))
            while self.dispatcher.outstanding():
                done = self.dispatcher.wait()
                start, own = done.call.key, done.call.args[4:]  # type: ignore[assignment]
                bar.advance(len(own))
                if done.failure is not None:
                    log.error(
                        "%s: prompts %d-%d left out: %s", label, start, start + len(own) - 1, done.failure
                    )
                    continue
                self._note_sample(done.result, policy, step)
                landed[start] = [SampledPrompt(done.refs[1], row, ref) for row, ref in enumerate(own)]
        return [picture for start in sorted(landed) for picture in landed[start]]

    def take_images(self) -> int:
        """Images scored since the last call."""
        taken, self.images = self.images, 0
        return taken

    def _note_sample(self, info: SampleInfo, policy: Policy, step: int) -> None:
        if info.policy_sha256 != policy.sha256:
            raise RuntimeError(
                f"{info.worker} sampled with adapter {info.policy_sha256[:12]}, asked was {policy.sha256[:12]}"
            )
        self.spans.append(Span("rollout", info.worker, info.started, info.started + info.seconds, step))

    def _note_score(self, score: GroupScore, step: int) -> None:
        now = time.time()
        self.images += len(score.rewards)
        self.spans.append(Span("reward", "reward", now - max(score.seconds.values(), default=0.0), now, step))


def _in_order(
    scores: dict[int, GroupScore | None], starts: range, count: int, batch_size: int
) -> tuple[list[float | None], dict[str, list[float | None]]]:
    rewards: list[float | None] = []
    names = sorted({name for score in scores.values() if score for name in score.components})
    components: dict[str, list[float | None]] = {name: [] for name in names}
    for start in starts:
        score, size = scores[start], min(batch_size, count - start)
        rewards += score.rewards if score else [None] * size
        for name in names:
            components[name] += score.components.get(name, [None] * size) if score else [None] * size
    return rewards, components
