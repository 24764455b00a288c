"""The training loop: sample, score, train, publish, in the order of the stages.

what the loop waits for         bounded by
------------------------------  -----------------------------------------------
a chunk or a score              resources.call_timeout_s, then the worker is restarted
the learner's ranks             resources.call_timeout_s, then the run stops
a replica's receipt             resources.call_timeout_s, then the worker is taken out
a worker coming back            resources.start_timeout_s, then it is given up
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import ray

from core.progress import Progress
from rl.loop.cluster import Cluster, training_spec
from rl.loop.observer import Observer, StepOutcome
from rl.loop.rehearsal import draw_pictures
from rl.loop.schedule import ScheduledPart, StageSchedule
from rl.loop.step import group_requests, make_batch
from rl.recipe.schema import RehearsalConfig, RunConfig, StageConfig
from rl.record.state import RunState, StageProgress
from rl.workers.collect import Collector
from rl.workers.publish import publish
from rl.workers.requests import RolloutResult
from rollout.prompts import PromptGroup
from rollout.worker import Policy

log = logging.getLogger(__name__)


class TooManyFailedPrompts(RuntimeError):
    """More prompts could not be sampled than `rollout.max_failed_prompts` allows."""


class Controller:
    """Drives one run. It holds references to trajectories and small results; of tensors it sees the adapter alone."""

    def __init__(
        self,
        config: RunConfig,
        cluster: Cluster,
        run_dir: Path,
        state: RunState,
        resumed: Path | None,
        *,
        fresh: bool,
    ):
        self.config, self.state, self.run_dir, self.resumed = config, state, run_dir, resumed
        self.dispatcher, self.learner = cluster.workers.dispatcher, cluster.learner
        self.spec = training_spec(config)
        self.rollout = Collector(self.dispatcher, cluster.workers.encoder, Progress())
        self.observer = Observer(config, cluster.learner, self.rollout, run_dir, state, resumed, fresh=fresh)
        self.policy: Policy | None = None
        self._encode_negative(cluster.workers.encoder)

    def run(self) -> None:
        """All remaining stages, with evaluation of every task before, between and after them."""
        self.learner.check_sees(self.run_dir)
        if self.resumed:
            self.learner.load(self.resumed / "learner")
        self.observer.begin_run(self._publish(max(self.state.version, 1)))
        for index, stage in list(enumerate(self.config.stages))[self.state.stage :]:
            self._train_stage(index, stage)
        self.observer.close_run()

    def _train_stage(self, index: int, stage: StageConfig) -> None:
        progress = self._begin_stage(index, stage)
        schedule = StageSchedule(stage, self.config)
        for step in schedule.remaining_steps(progress):
            began = time.monotonic()
            part, groups = schedule.part(step), schedule.groups(step)  # pure: which prompts, which seeds
            outcome = self._step(part, groups, schedule.learning_rate(step))
            assert self.policy is not None
            self.observer.close_step(stage, part, outcome, self.policy, time.monotonic() - began)
        assert self.policy is not None
        self.observer.close_stage(index, self.policy)

    def _step(self, part: ScheduledPart, groups: list[PromptGroup], learning_rate: float) -> StepOutcome:
        """One step of the algorithm: rollout with streamed rewards, advantages, update, publish."""
        assert self.policy is not None
        step, clock = self.state.step + 1, Clock()
        requests = group_requests(groups, self.spec)
        sampled = self.rollout.sample(  # yields each group as it finishes
            requests, self.spec, self.policy, step=step, chunk_size=self.config.rollout.chunk_size
        )
        total = sum(len(group.seeds) for group in groups)
        scored = self.rollout.score(
            sampled, part.reward_set, step=step, total=total
        )  # overlaps with the rollout
        results = sorted(scored, key=lambda result: result.request.id)
        clock.lap("rollout")
        self._guard(part, results)
        batch, advantages = make_batch(results, self.config)  # complete groups alone
        stats, spans = self.learner.update(batch, learning_rate) if batch.updates else ([], [])
        self.observer.journal.update_spans(spans, step)
        clock.lap("update")
        if stats:
            with self.observer.journal.timed("publish", step):
                self._publish(self.state.version + 1, updated=True)
        clock.lap("publish")
        return StepOutcome(results, advantages, batch.num_samples, stats, learning_rate, clock.laps)

    def _begin_stage(self, index: int, stage: StageConfig) -> StageProgress:
        """Where the stage stands; at its start adapter and reference, and what it rehearses."""
        state = self.state
        if len(state.stages) == index:
            state.stage = index
            state.stages.append(StageProgress(stage.name))
            self.learner.begin_stage()
            self._publish(state.version + 1)
        progress = state.stages[index]
        if stage.rehearsal is not None and progress.steps < stage.steps:
            self._prepare_rehearsal(index, stage.rehearsal)
        return progress

    def _prepare_rehearsal(self, index: int, rehearsal: RehearsalConfig) -> None:
        """Draw with the stage's first policy what its updates rehearse; a run resumed within it draws the same."""
        began = time.monotonic()
        adapter = self.learner.reference_adapter(self.state.version)
        policy = Policy(adapter.version, adapter.sha256, (ray.put(adapter),))
        pictures = draw_pictures(self.rollout, self.config, index, policy, self.state.step)
        self.learner.rehearse(rehearsal, pictures)
        self.state.seconds += time.monotonic() - began

    def _publish(self, version: int, *, updated: bool = False) -> Policy:
        """Give the live adapter to the replicas, unless they have it; an update must have changed it (`updated`).

        Returns only when it is verified.
        """
        adapter = self.learner.adapter(version, shipped=False)
        if self.policy is not None and adapter.sha256 == self.policy.sha256:
            if updated:
                raise RuntimeError(
                    f"the update after version {self.state.version} left every adapter tensor unchanged: the "
                    "optimizer does not reach the adapter"
                )
            return self.policy
        limit = self.config.resources.call_timeout_s
        self.policy = publish(adapter, self.dispatcher, previous=self.policy, timeout_s=limit)
        self.state.version = version
        return self.policy

    def _guard(self, part: ScheduledPart, results: Sequence[RolloutResult]) -> None:
        """Stop before an update that rewards or prompts would make worthless."""
        part.monitor.observe([result.score for result in results if result.score is not None])
        limit = self.config.rollout.max_failed_prompts
        for result in results:
            if result.failure:
                self.state.failed_prompts += 1
                (prompt,) = result.request.prompts
                log.error("prompt %d (%r): %s", prompt.index, prompt.prompt, result.failure)
        if self.state.failed_prompts > limit:
            raise TooManyFailedPrompts(
                f"{self.state.failed_prompts} prompts could not be sampled (rollout.max_failed_prompts={limit}); the "
                "log names each"
            )

    def _encode_negative(self, encoder: object) -> None:
        """The negative prompt's embedding, once for the run, for sampling and for the replay."""
        ref = encoder.encode_text.remote(self.config.rollout.negative_prompt)  # type: ignore[attr-defined]
        negative = ray.get(ref, timeout=self.config.resources.call_timeout_s)
        self.rollout.negative = ray.put(negative)
        self.learner.set_negative(negative)


class Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = now - self._last, now
