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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from core.progress import Progress
from rl.learner.rehearsal import draw_pictures
from rl.loop.checkpoint import prune_checkpoints, save_checkpoint
from rl.loop.cluster import Cluster, training_spec
from rl.loop.collect import Collector, SampledGroup
from rl.loop.publish import publish
from rl.loop.state import RunState, StageProgress
from rl.loop.step import make_batch, reward_metrics, stage_learning_rate, update_metrics
from rl.loop.turns import Turn, Turns
from rl.recipe.reward_sets import stage_set_name
from rl.recipe.schema import RehearsalConfig, RunConfig, StageConfig
from rl.recipe.stage_parts import stage_tasks
from rl.record.evaluation import Evaluator
from rl.record.groups import GroupRecord, best_and_worst, group_record, group_samples
from rl.record.journal import Journal
from rl.record.results import RunResults
from rollout.worker import Policy

log = logging.getLogger(__name__)


class TooManyFailedPrompts(RuntimeError):
    """More prompts could not be sampled than `rollout.max_failed_prompts` allows."""


@dataclass
class StepOutcome:
    """What a step hands to the journal."""

    groups: list[SampledGroup]
    metrics: dict[str, Any]


class Controller:
    """Drives one run. Tensors never pass through here, only references and small results."""

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
        self.config, self.cluster, self.state = config, cluster, state
        self.collector = Collector(cluster.dispatcher, cluster.encoder, Progress())
        self.evaluator = Evaluator(config.evaluation, self.collector, run_dir, config.gallery.prompts)
        at_border = bool(state.stages) and state.stages[-1].steps == config.stages[state.stage].steps
        self.journal = Journal(
            run_dir,
            config,
            resume_step=None if fresh else state.step if resumed else -1,
            redo_evaluation=at_border,
        )
        self.results = RunResults(config, self.evaluator, run_dir)
        self.run_dir, self.resumed = run_dir, resumed
        self.policy: Policy | None = None
        self._events = (0, 0)
        self._load_negative()

    def run(self) -> None:
        """All remaining stages, with evaluation of every task before, between and after them."""
        self.cluster.learner.check_sees(self.run_dir)
        if self.resumed:
            self.cluster.learner.load(self.resumed / "learner")
        self._publish(max(self.state.version, 1), updated=False)
        self._evaluate_base()
        for index, stage in enumerate(self.config.stages):
            if index < self.state.stage:
                continue
            self._run_stage(index, stage)
        self.results.write_final(self.cluster.learner.adapter(self.state.version, shipped=True))
        self.journal.finish(self.results.summary(self.state))

    def _run_stage(self, index: int, stage: StageConfig) -> None:
        if len(self.state.stages) == index:
            self.state.stage = index
            self.state.stages.append(StageProgress(stage.name))
            self.cluster.learner.begin_stage()
            self._publish(self.state.version + 1, updated=False)
        progress = self.state.stages[index]
        if stage.rehearsal is not None and progress.steps < stage.steps:
            self._prepare_rehearsal(index, stage.rehearsal)
        turns = Turns(stage, self.config)
        while progress.steps < stage.steps:
            began = time.monotonic()
            turn = turns.of(progress.steps)
            groups = turns.groups(progress.steps)  # pure: which prompts, which seeds
            rate = stage_learning_rate(self.config.learner, progress.steps, stage.steps)
            outcome = self._step(turn, groups, rate)
            self._account(progress, outcome, time.monotonic() - began)
            self._close_step(stage, turn, progress, outcome)
        self._evaluate(f"after_{stage.name}")
        self.journal.alarms(self.results.cross_task_alarms(index))

    def _prepare_rehearsal(self, index: int, rehearsal: RehearsalConfig) -> None:
        """Draw with the stage's first policy what its updates rehearse; a run resumed within it draws the same."""
        began = time.monotonic()
        adapter = self.cluster.learner.reference_adapter(self.state.version)
        policy = Policy(adapter.version, adapter.sha256, (ray.put(adapter),))
        pictures = draw_pictures(self.collector, self.config, index, policy, self.state.step)
        self.cluster.learner.rehearse(rehearsal, pictures)
        self.state.seconds += time.monotonic() - began

    def _step(self, turn: Turn, groups: list[Any], learning_rate: float) -> StepOutcome:
        """One turn of the algorithm: rollout with streamed rewards, advantages, update, publish."""
        assert self.policy is not None
        config, clock = self.config, _Clock()
        landed = self.collector.scored_groups(
            groups,
            training_spec(config),
            self.policy,
            stage_set_name(turn.part.label),
            config.rollout.chunk_size,
            self.state.step + 1,
        )
        scored = sorted(landed, key=lambda g: g.group.id)
        clock.lap("rollout")
        turn.monitor.observe([g.score for g in scored if g.score is not None])
        self._count_failures(scored)
        batch, advantages = make_batch(scored, config)
        stats, spans = self.cluster.learner.update(batch, learning_rate) if batch.updates else ([], [])
        self.journal.update_spans(spans, self.state.step + 1)
        clock.lap("update")
        if stats:
            with self.journal.timed("publish", self.state.step + 1):
                self._publish(self.state.version + 1, updated=True)
        clock.lap("publish")
        metrics = reward_metrics(scored, advantages, config.learner.advantage_clip)
        metrics |= update_metrics(stats, learning_rate, batch.num_samples)
        images = sum(len(g.group.seeds) for g in scored)
        metrics |= {f"time/{name}": seconds for name, seconds in clock.laps.items()}
        metrics |= {
            "time/step": clock.total(),
            "throughput/images_per_second": images / clock.laps["rollout"],
            "throughput/samples_per_second": batch.num_samples / clock.total(),
            "policy/version": self.policy.version,
            **self._worker_events(),
        }
        if not stats:
            log.warning("step %d: no group has spread in its rewards; nothing to learn", self.state.step + 1)
        return StepOutcome(scored, metrics)

    def _worker_events(self) -> dict[str, int]:
        """What the run survived since the last step's record, evaluations in between included."""
        now = (self.cluster.dispatcher.restarts, self.cluster.dispatcher.redispatched)
        before, self._events = self._events, now
        return {"workers/restarts": now[0] - before[0], "workers/redispatched_chunks": now[1] - before[1]}

    def _publish(self, version: int, *, updated: bool) -> None:
        """Give the live adapter to the replicas, unless they have it; an update must have changed it (`updated`)."""
        adapter = self.cluster.learner.adapter(version, shipped=False)
        if self.policy is not None and adapter.sha256 == self.policy.sha256:
            if not updated:
                return
            raise RuntimeError(
                f"the update after version {self.state.version} left every adapter tensor unchanged: the optimizer "
                "does not reach the adapter"
            )
        timeout_s = self.config.resources.call_timeout_s
        self.policy = publish(adapter, self.cluster.dispatcher, previous=self.policy, timeout_s=timeout_s)
        self.state.version = version

    def _close_step(
        self, stage: StageConfig, turn: Turn, progress: StageProgress, outcome: StepOutcome
    ) -> None:
        """Journal, gallery, checkpoint. The checkpoint comes last, so that what it promises is on disk."""
        step, config = self.state.step, self.config
        self.journal.spans(self.collector.spans)
        records = [group_record(group, step, stage.name) for group in outcome.groups]
        self.journal.groups(records)
        part = turn.part.task if stage.parts else None
        self.journal.log(outcome.metrics, step, stage.name, progress.steps, part=part)
        ends = progress.steps == stage.steps
        if config.evaluation.every and progress.steps % config.evaluation.every == 0 and not ends:
            self._evaluate(f"step_{step:06d}", tasks=stage_tasks(stage))
        if config.gallery.prompts and progress.steps % config.gallery.every == 0:
            self._group_pictures(outcome.groups, records)
            if not ends:
                self._gallery(stage, step)
        if ends or progress.steps % config.checkpoint.every == 0:
            with self.journal.timed("checkpoint", step):
                save_checkpoint(
                    self.run_dir, self.state, self.journal.config_yaml, self.cluster.learner,
                    self._write_shipped_adapter, border=ends,
                )  # fmt: skip
            prune_checkpoints(self.run_dir, config.checkpoint.keep_last)

    def _account(self, progress: StageProgress, outcome: StepOutcome, seconds: float) -> None:
        self.state.step += 1
        progress.steps += 1
        progress.seconds += seconds
        progress.reward_mean = outcome.metrics["reward/mean"]
        samples = sum(len(g.group.seeds) for g in outcome.groups)
        progress.samples += samples
        progress.missing += round(outcome.metrics["reward/missing_share"] * samples)
        self.state.images += self.collector.take_images()
        self.state.seconds += seconds
        self.state.restarts += int(outcome.metrics["workers/restarts"])

    def _count_failures(self, groups: list[SampledGroup]) -> None:
        for group in groups:
            if group.failure:
                self.state.failed_prompts += 1
                log.error(
                    "prompt %d (%r): %s", group.group.prompt.index, group.group.prompt.prompt, group.failure
                )
        if self.state.failed_prompts > self.config.rollout.max_failed_prompts:
            raise TooManyFailedPrompts(
                f"{self.state.failed_prompts} prompts could not be sampled (rollout.max_failed_prompts="
                f"{self.config.rollout.max_failed_prompts}); the log names each"
            )

    def _evaluate_base(self) -> None:
        """Before the first stage; a resumed run reads what the first one measured."""
        scales = {f"before_guidance_{scale:g}": scale for scale in self.config.evaluation.baseline_guidance}
        if self.resumed:
            finished = [f"after_{stage.name}" for stage in self.config.stages[: self.state.stage]]
            for moment in ["before", *scales, *finished]:
                self.results.add(moment, self.evaluator.read(moment))
            return
        self._evaluate("before")
        for moment, scale in scales.items():
            assert self.policy is not None
            began = time.monotonic()
            with self.journal.timed("evaluate", self.state.step):
                scores = self.evaluator.evaluate(moment, self.policy, self.state.step, guidance_scale=scale)
            self.results.add(moment, scores)
            self.state.seconds += time.monotonic() - began

    def _evaluate(self, moment: str, *, tasks: list[str] | None = None) -> None:
        """Evaluate the shipped adapter on all tasks (or `tasks`) and record it."""
        began = time.monotonic()
        with self.journal.timed("evaluate", self.state.step):
            scores = self.evaluator.evaluate(moment, self._shipped_policy(), self.state.step, tasks=tasks)
        self.results.add(moment, scores)
        seconds = time.monotonic() - began
        self.state.images += self.collector.take_images()
        self.state.seconds += seconds
        self.journal.evaluation(moment, scores, self.results.change_since_before, self.state, seconds)
        self.journal.spans(self.collector.spans)
        stage_name = self.state.stages[-1].name if self.state.stages else "before"
        for task in scores:
            samples = self.evaluator.gallery.get(task, {}).get(moment, [])
            self.journal.grid(task, stage_name, samples, self.state.step)
        if self.state.stages:
            self.journal.alarms(self.results.hacking_alarms(self.state.stage, scores))

    def _gallery(self, stage: StageConfig, step: int) -> None:
        for task in stage_tasks(stage):
            samples = self.evaluator.sample_gallery(f"step_{step}", task, self._shipped_policy(), step)
            self.state.images += self.collector.take_images()
            self.journal.grid(task, stage.name, samples, step)

    def _group_pictures(self, groups: list[SampledGroup], records: list[GroupRecord]) -> None:
        """Pictures of the step's best and worst group; losing them with a node does not stop the run."""
        by_id = {group.group.id: group for group in groups}
        for record in best_and_worst(records):
            group = by_id[record.group]
            try:
                images = ray.get([chunk.images for chunk in group.chunks], timeout=120)
            except RayError as error:
                log.warning(
                    "step %d: no pictures of group %d are kept (%s)", record.step, record.group, error
                )
                continue
            samples = group_samples(group.group, np.concatenate(images), record.rewards)
            self.journal.group_pictures(record, samples)

    def _shipped_policy(self) -> Policy:
        """The moving average where one is kept; replicas fetch it with their first call."""
        assert self.policy is not None
        if not self.config.learner.ema.enabled:
            return self.policy
        adapter = self.cluster.learner.adapter(self.state.version, shipped=True)
        return Policy(adapter.version, adapter.sha256, (ray.put(adapter),))

    def _write_shipped_adapter(self, folder: Path) -> None:
        self.results.write_adapter(self.cluster.learner.adapter(self.state.version, shipped=True), folder)

    def _load_negative(self) -> None:
        """The negative prompt's embedding, once for the run; none is needed without guidance."""
        ref = self.cluster.encoder.encode_text.remote(self.config.rollout.negative_prompt)
        negative = ray.get(ref, timeout=self.config.resources.call_timeout_s)
        self.collector.negative = ray.put(negative)
        self.cluster.learner.set_negative(negative)


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._start = self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = now - self._last
        self._last = now

    def total(self) -> float:
        return time.monotonic() - self._start
