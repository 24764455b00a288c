"""The training loop: sample, score, train, publish, in the order of the stages.

what the loop waits for         bounded by
------------------------------  -----------------------------------------------
a chunk or a score              resources.call_timeout_s, then the worker is restarted
the learner's ranks             resources.call_timeout_s, then fresh ones (rl/loop/restarts.py)
the replicas' receipts          resources.call_timeout_s together, then silent ones are restarted
a worker coming back            resources.start_timeout_s, then it is given up
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from core.failures import ObjectsLost
from core.progress import Progress
from core.run_status import RunWatch
from core.stopping import StopRun
from rl.learner.batching import TrainBatch
from rl.learner.stats import UpdateStats
from rl.loop.cluster import Cluster, training_spec
from rl.loop.observer import Observer, StepOutcome
from rl.loop.rehearsal import prepare_rehearsal
from rl.loop.schedule import ScheduledPart, StageSchedule, stage_learning_rate
from rl.loop.step import describe_fates, group_fates, group_requests, make_batch
from rl.recipe.schema import RunConfig, StageConfig
from rl.recipe.shapes import shape_rule
from rl.record.state import RunState, StageProgress
from rl.workers.collect import Collector
from rl.workers.publish import publish
from rl.workers.requests import RolloutResult
from rollout.worker import Policy

log = logging.getLogger(__name__)
MOST_LOSSES = 3


class TooManyFailedPrompts(RuntimeError):
    """More prompts could not be sampled than `rollout.max_failed_prompts` allows."""


class NothingLearned(RuntimeError):
    """A stage, or one update after another, left the adapter as it was."""


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
        watch: RunWatch,
    ):
        self.config, self.state, self.run_dir, self.resumed = config, state, run_dir, resumed
        self.watch, self.protected = watch, watch.stop.protected
        self.workers, self.learner = cluster.workers, cluster.learner
        self.spec, self.shapes = training_spec(config), shape_rule(config.model)
        self.rollout = Collector(self.workers.dispatcher, Progress())
        self.observer = Observer(config, self.learner, self.rollout, run_dir, state, resumed, fresh=fresh)
        self._policy: Policy | None = None
        self._losses = 0

    def run(self) -> None:
        """All remaining stages. An early end keeps what was done: a stop saves, an error leaves trace and summary."""
        try:
            self._run_stages()
        except BaseException as error:
            with self.protected():
                self.observer.close_early(save=isinstance(error, KeyboardInterrupt | StopRun))
            raise

    def _run_stages(self) -> None:
        """All remaining stages, with evaluation of every task before, between and after them."""
        self.watch.at(self.state.step)
        self.learner.check_sees(self.run_dir)
        self._encode_negative()
        if self.resumed:
            self.learner.load(self.resumed / "learner")
        self._publish(max(self.state.version, 1))
        self.observer.begin_run(self.policy)
        for index, stage in list(enumerate(self.config.stages))[self.state.stage :]:
            self._begin_stage(index, stage)
            self._train(stage)
            self._check_learned(stage)
            self.observer.close_stage(index, self.policy)
        self.observer.close_run()

    def _train(self, stage: StageConfig) -> None:
        """The algorithm: the stage's remaining steps."""
        config, progress = self.config, self.state.stages[-1]
        schedule = StageSchedule(stage, config, progress)
        for step in schedule.remaining_steps(progress):
            number, clock = self.state.step + 1, Clock()
            part, groups = schedule.part(step), schedule.groups(step)  # pure: which prompts, which seeds
            requests = group_requests(groups, self.spec, self.shapes)
            sample = partial(  # yields each group as it finishes
                self.rollout.sample, spec=self.spec, policy=self.policy, step=number,
                chunk_size=config.rollout.chunk_size,
            )  # fmt: skip
            # Rewards overlap with sampling.
            scored = self.rollout.score(requests, sample, part.reward_set, step=number)
            results = sorted(scored, key=lambda result: result.request.id)
            clock.lap("rollout")
            batch, advantages = make_batch(results, config)  # complete groups, advantages
            if not self._fetched(batch, number):
                continue  # the same step again, with the same samples
            self._encode_ahead(schedule, step + 1)  # while the learner updates
            with self.protected():  # learner and records go on together; before, a stop costs samples alone
                self._guard(part, results)
                rate = stage_learning_rate(config.learner, step, stage.steps)
                stats = self._update(batch, results, rate, number)  # clipped objective, LoRA only
                clock.lap("update")
                if any(not s.skipped for s in stats):
                    with self.observer.journal.timed("publish", number):
                        self._publish(self.state.version + 1, updated=True)  # returns only when verified
                clock.lap("publish")
                outcome = StepOutcome(results, advantages, batch.num_samples, stats, rate, clock.laps)
                self.observer.record_step(stage, part, outcome, self.policy)
                self.watch.at(number, stage.name)
            self.observer.close_step(stage, self.policy, self.protected)  # evaluation, gallery, checkpoint

    def _encode_ahead(self, schedule: StageSchedule, step: int) -> None:
        """Begin the next step's conditioning, unless encoders take turns with the learner on one card."""
        resources = self.config.resources
        if schedule.has(step) and not (resources.placement == "shared" and resources.encode_gpus):
            self.rollout.encode_ahead(group_requests(schedule.groups(step), self.spec, self.shapes))

    @property
    def policy(self) -> Policy:
        """What the replicas sample with."""
        assert self._policy is not None, "nothing was published yet"
        return self._policy

    def _begin_stage(self, index: int, stage: StageConfig) -> None:
        """At a stage's start its adapter and KL reference; at every start within it, what it rehearses."""
        state = self.state
        if len(state.stages) == index:
            state.stage = index
            state.stages.append(StageProgress(stage.name))
            self.learner.begin_stage()
            self._publish(state.version + 1)
        if stage.rehearsal is not None and state.stages[index].steps < stage.steps:
            prepare_rehearsal(self.learner, self.rollout, self.config, state)

    def _guard(self, part: ScheduledPart, results: Sequence[RolloutResult]) -> None:
        """Stop before an update that rewards or prompts would make worthless."""
        part.monitor.observe([result.score for result in results if result.score is not None])
        limit = self.config.rollout.max_failed_prompts
        for result in results:
            if result.failure:
                self.state.failed_prompts += 1
                (prompt,) = result.request.prompts
                log.error("%s (%r): %s", prompt.name, prompt.prompt, result.failure)
        if self.state.failed_prompts > limit:
            raise TooManyFailedPrompts(
                f"{self.state.failed_prompts} prompts could not be sampled (rollout.max_failed_prompts={limit}); the "
                "log names each"
            )

    def _fetched(self, batch: TrainBatch, step: int) -> bool:
        """Whether the learner has the step's samples. Raises ObjectsLost where nodes take them again and again."""
        try:
            self.learner.fetch(batch)
        except ObjectsLost as error:
            self._losses += 1
            if self._losses > MOST_LOSSES:
                raise
            log.warning("step %d is sampled again: %s", step, error)
            return False
        self._losses = 0
        return True

    def _update(
        self, batch: TrainBatch, results: Sequence[RolloutResult], rate: float, step: int
    ) -> list[UpdateStats]:
        """One entry per optimizer update; none where no group teaches anything."""
        if not batch.updates:
            log.warning("step %d: nothing to learn: %s", step, describe_fates(group_fates(results)))
            return []
        stats, spans = self.learner.update(rate)
        self.observer.journal.update_spans(spans, step)
        self._check_applied(stats, step)
        return stats

    def _check_applied(self, stats: Sequence[UpdateStats], step: int) -> None:
        """Count updates that DeepSpeed skipped; stop when there are more than a run can have by accident."""
        skipped, limit = sum(s.skipped for s in stats), self.config.learner.max_skipped_updates
        self.state.skipped_updates += skipped
        if skipped:
            log.error(
                "step %d: %d of %d updates skipped, their gradient is not finite", step, skipped, len(stats)
            )
        if self.state.skipped_updates > limit:
            raise NothingLearned(
                f"step {step}: {self.state.skipped_updates} updates had a gradient that is not finite and were "
                f"skipped (learner.max_skipped_updates={limit}); look at the rewards of these steps in groups.jsonl, "
                "or use an earlier checkpoint's adapter and train anew with a lower learner.learning_rate"
            )

    def _check_learned(self, stage: StageConfig) -> None:
        """A stage without an update would be shipped as if it had been trained."""
        progress = self.state.stages[-1]
        if progress.updates:
            return
        line = (
            f"stage {stage.name!r} ended without one optimizer update that took effect: "
            f"{describe_fates(progress.fates)}; the log and groups.jsonl name them"
        )
        self.observer.journal.alarms([line])
        raise NothingLearned(line)

    def _publish(self, version: int, *, updated: bool = False) -> None:
        """Give the live adapter to the replicas, unless they have it; an update must have changed it (`updated`)."""
        adapter = self.learner.adapter(version, shipped=False)
        if self._policy is not None and adapter.sha256 == self._policy.sha256:
            if not updated:
                return
            raise RuntimeError(
                f"the update after version {self.state.version} left every adapter tensor unchanged: the optimizer "
                "does not reach the adapter"
            )
        limit = self.config.resources.call_timeout_s
        self._policy = publish(adapter, self.workers.dispatcher, previous=self._policy, timeout_s=limit)
        self.state.version = version

    def _encode_negative(self) -> None:
        """The negative prompt's embedding, once for the run, for sampling and for the replay."""
        self.learner.set_negative(self.rollout.encode_negative(self.config.rollout.negative_prompt))


class Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = now - self._last, now
