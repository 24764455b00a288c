"""Everything that is recorded of a run: metrics, evaluations, pictures, accounts, checkpoints and its results."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from core.checkpoints import CHECKPOINTS, prune
from core.run_lock import check_held
from models.lora.attach import Adapter
from rl.learner.stats import UpdateStats
from rl.learner.worker import LearnerGroup
from rl.loop.advantages import Advantages
from rl.loop.best import best_checkpoints
from rl.loop.checkpoint import save_checkpoint
from rl.loop.schedule import ScheduledPart
from rl.loop.step import group_fates, reward_metrics, update_metrics
from rl.recipe.inputs import evaluation_identity
from rl.recipe.schema import RunConfig, StageConfig
from rl.recipe.shapes import shape_rule
from rl.recipe.stage_parts import stage_tasks
from rl.record.alarms import Alarm, stop_for
from rl.record.evaluation import Evaluator, TaskScores
from rl.record.groups import GroupRecord, best_and_worst, group_record, group_samples
from rl.record.journal import Journal
from rl.record.results import RunResults
from rl.record.state import RunState
from rl.workers.collect import Collector
from rl.workers.requests import RolloutResult
from rollout.worker import Policy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepOutcome:
    """What one step came to. `stats` has one entry per optimizer update, none where no group has spread; `laps` are the
    seconds of rollout, update and publish."""

    results: list[RolloutResult]
    advantages: Advantages
    trained_samples: int
    stats: Sequence[UpdateStats]
    learning_rate: float
    laps: dict[str, float]

    @property
    def images(self) -> int:
        return sum(len(result.request.seeds) for result in self.results)


class Observer:
    """Records one run. It changes nothing that is computed; what it counts goes into the run's `state`."""

    def __init__(
        self,
        config: RunConfig,
        learner: LearnerGroup,
        rollout: Collector,
        run_dir: Path,
        state: RunState,
        resumed: Path | None,
        *,
        fresh: bool,
    ):
        self.config, self.learner, self.rollout, self.state = config, learner, rollout, state
        self.run_dir, self.resumed = run_dir, resumed
        self.evaluator = Evaluator(
            config.evaluation, rollout, run_dir, shape_rule(config.model), config.gallery.prompts,
            inputs_sha256=evaluation_identity(config, state.inputs.held),
        )  # fmt: skip
        at_border = bool(state.stages) and state.stages[-1].steps == config.stages[state.stage].steps
        self.journal = Journal(
            run_dir,
            config,
            resume_step=None if fresh else state.step if resumed else -1,
            redo_evaluation=at_border or state.unseen,
        )
        self.results = RunResults(config, self.evaluator, run_dir)
        self._worker_events = rollout.dispatcher.restarts, rollout.dispatcher.redispatched
        self._saved_step = state.step

    def begin_run(self, policy: Policy) -> None:
        """Evaluate before the first stage; a resumed run reads what the first one measured, and says what changed."""
        if self.state.changes:
            self.journal.alarms(self.state.changes)
        self.evaluator.set_others_aside()
        scales = {f"before_guidance_{scale:g}": scale for scale in self.config.evaluation.baseline_guidance}
        if self.resumed:
            finished = [f"after_{stage.name}" for stage in self.config.stages[: self.state.stage]]
            for moment in ["before", *scales, *finished]:
                self.results.add(moment, self.evaluator.read(moment))
            if self.state.unseen:
                self._look(self.config.stages[self.state.stage], policy)
            return
        self._evaluate("before", policy)
        for moment, scale in scales.items():
            self._measure(moment, policy, guidance_scale=scale)

    def record_step(
        self, stage: StageConfig, part: ScheduledPart, outcome: StepOutcome, policy: Policy
    ) -> None:
        """What the step itself came to: metrics, every sample's reward, pictures of its best and worst group."""
        check_held(self.run_dir)
        config, progress = self.config, self.state.stages[-1]
        metrics = self._metrics(outcome, policy)
        self._account(outcome, metrics)
        step = self.state.step
        self.journal.spans(self.rollout.spans)
        records = [group_record(result, step, stage.name) for result in outcome.results]
        self.journal.groups(records)
        task = part.part.task if stage.parts else None
        self.journal.log(metrics, step, stage.name, progress.steps, part=task)
        if config.gallery.prompts and progress.steps % config.gallery.every == 0:
            self._group_pictures(outcome.results, records)
        self.state.unseen = True

    def close_step(
        self, stage: StageConfig, policy: Policy, protected: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Evaluation and pictures of the new policy. The checkpoint comes last, so that what it promises is on disk.

        protected: a block that is not interrupted; what is not in it may be, and a resumed run makes it again.
        """
        self._look(stage, policy)
        steps = self.state.stages[-1].steps
        if steps == stage.steps or steps % self.config.checkpoint.every == 0:
            with protected():
                self._save()

    def close_stage(self, index: int, policy: Policy) -> None:
        """Evaluate what the stage ships, on all tasks."""
        scores = self._evaluate(f"after_{self.config.stages[index].name}", policy)
        self._alarm([*self.results.stage_alarms(index, scores), *self.results.cross_task_alarms(index)])

    def close_early(self, *, save: bool) -> None:
        """Before the last step: a checkpoint of the steps since the last one if `save`, trace and summary so far."""
        try:
            check_held(self.run_dir)
            if save and self.state.step > self._saved_step:
                self._save()
            self._finish(finished=False)
        except Exception as error:  # what ended the run is what has to be told
            log.error("not everything was kept at the run's early end: %s", error)

    def close_run(self) -> None:
        """The shipped adapter, the merged transformer and the summary."""
        self.results.write_final(self._shipped_adapter())
        self._finish(finished=True)

    def _finish(self, *, finished: bool) -> None:
        best = next(iter(best_checkpoints(self.run_dir, self.config)), None)
        self.journal.finish(self.results.summary(self.state, best=best, finished=finished))

    def _look(self, stage: StageConfig, policy: Policy) -> None:
        """The evaluation and the gallery that are due after a step; at a stage's end `close_stage` sees to them."""
        config, steps = self.config, self.state.stages[-1].steps
        if steps < stage.steps:
            if config.evaluation.every and steps % config.evaluation.every == 0:
                scores = self._evaluate(f"step_{self.state.step:06d}", policy, tasks=stage_tasks(stage))
                self._alarm(self.results.stage_alarms(self.state.stage, scores))
            if config.gallery.prompts and steps % config.gallery.every == 0:
                self._gallery(stage, policy)
        self.state.unseen = False

    def _save(self) -> None:
        config, state = self.config, self.state
        with self.journal.timed("checkpoint", state.step):
            save_checkpoint(
                self.run_dir, state, self.journal.config_yaml, self.learner,
                lambda folder: self.results.write_adapter(self._shipped_adapter(), folder),
                border=state.stages[-1].steps == config.stages[state.stage].steps,
            )  # fmt: skip
        self._saved_step = state.step
        best = {Path(found.path) for found in best_checkpoints(self.run_dir, config)}
        prune(self.run_dir / CHECKPOINTS, state.step, keep=config.checkpoint.keep_last, spare=best)

    def _metrics(self, outcome: StepOutcome, policy: Policy) -> dict[str, Any]:
        laps, seconds = outcome.laps, sum(outcome.laps.values())
        # What the run survived since the last step's record, evaluations in between included.
        dispatcher, before = self.rollout.dispatcher, self._worker_events
        self._worker_events = dispatcher.restarts, dispatcher.redispatched
        restarts, redispatched = (now - then for now, then in zip(self._worker_events, before, strict=True))
        return {
            **reward_metrics(outcome.results, outcome.advantages, self.config.learner.advantage_clip),
            **update_metrics(outcome.stats, outcome.learning_rate, outcome.trained_samples),
            **{f"time/{name}": lap for name, lap in laps.items()},
            "time/step": seconds,
            "throughput/images_per_second": outcome.images / laps["rollout"],
            "throughput/samples_per_second": outcome.trained_samples / seconds,
            "policy/version": policy.version,
            "workers/restarts": restarts,
            "workers/redispatched_chunks": redispatched,
        }

    def _account(self, outcome: StepOutcome, metrics: dict[str, Any]) -> None:
        state, progress, seconds = self.state, self.state.stages[-1], metrics["time/step"]
        state.step += 1
        progress.steps += 1
        progress.seconds += seconds
        progress.reward_mean = metrics["reward/mean"]
        progress.samples += outcome.images
        progress.updates += sum(not s.skipped for s in outcome.stats)
        progress.fates = dict(Counter(progress.fates) + group_fates(outcome.results))
        progress.missing += round(metrics["reward/missing_share"] * outcome.images)
        state.images += self.rollout.take_images()
        state.seconds += seconds
        state.restarts += metrics["workers/restarts"]

    def _alarm(self, alarms: Sequence[Alarm]) -> None:
        """Tell all of them; raise StopRun where the recipe stops for one."""
        self.journal.alarms([alarm.line for alarm in alarms])
        stop_for(alarms, self.config.alarms)

    def _evaluate(
        self, moment: str, policy: Policy, *, tasks: list[str] | None = None
    ) -> dict[str, TaskScores]:
        """Evaluate the shipped adapter on all tasks (or `tasks`) and record it."""
        state = self.state
        scores, seconds = self._measure(moment, self._shipped_policy(policy), tasks=tasks)
        self.journal.evaluation(moment, scores, self.results.change_since_before, state, seconds)
        stage_name = state.stages[-1].name if state.stages else "before"
        for task in scores:
            samples = self.evaluator.gallery.get(task, {}).get(moment, [])
            self.journal.grid(task, stage_name, samples, state.step)
        return scores

    def _measure(
        self,
        moment: str,
        policy: Policy,
        *,
        tasks: list[str] | None = None,
        guidance_scale: float | None = None,
    ) -> tuple[dict[str, TaskScores], float]:
        """Scores under `policy`, remembered under `moment`, and their seconds, counted with their pictures."""
        state, began = self.state, time.monotonic()
        with self.journal.timed("evaluate", state.step):
            scores = self.evaluator.evaluate(
                moment, policy, state.step, tasks=tasks, guidance_scale=guidance_scale
            )
        self.results.add(moment, scores)
        seconds = time.monotonic() - began
        state.images += self.rollout.take_images()
        state.seconds += seconds
        self.journal.spans(self.rollout.spans)
        return scores, seconds

    def _gallery(self, stage: StageConfig, policy: Policy) -> None:
        step = self.state.step
        for task in stage_tasks(stage):
            samples = self.evaluator.sample_gallery(task, self._shipped_policy(policy), step)
            self.state.images += self.rollout.take_images()
            self.journal.grid(task, stage.name, samples, step)

    def _group_pictures(self, results: Sequence[RolloutResult], records: Sequence[GroupRecord]) -> None:
        """Pictures of the step's best and worst group; losing them with a node does not stop the run."""
        by_id = {result.request.id: result for result in results}
        for record in best_and_worst(records):
            result = by_id[record.group]
            try:
                images = ray.get([chunk.images for chunk in result.chunks], timeout=120)
            except RayError as error:
                log.warning(
                    "step %d: no pictures of group %d are kept (%s)", record.step, record.group, error
                )
                continue
            samples = group_samples(result.request, np.concatenate(images), record.rewards)
            self.journal.group_pictures(record, samples)

    def _shipped_adapter(self) -> Adapter:
        return self.learner.adapter(self.state.version, shipped=True)

    def _shipped_policy(self, policy: Policy) -> Policy:
        """The moving average where one is kept; replicas fetch it with their first call."""
        if not self.config.learner.ema.enabled:
            return policy
        adapter = self._shipped_adapter()
        return Policy(adapter.version, adapter.sha256, (ray.put(adapter),))
