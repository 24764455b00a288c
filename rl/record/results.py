"""What a run came to: paired changes over each stage, alarms, sheets, the adapter and the merged transformer."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np

import recipes
from core import __version__
from core.statistics import Difference, paired_bootstrap
from models.components import load_transformer
from models.lora.attach import Adapter
from models.lora.files import save_adapter, save_merged_transformer
from rewards.base import reward_label
from rewards.recipe import reward_specs
from rl.recipe.schema import RunConfig
from rl.recipe.stage_parts import stage_parts, stage_tasks
from rl.record.alarms import Alarm, reward_hacking, trained_task_fell
from rl.record.evaluation import Evaluator, TaskScores
from rl.record.gallery import before_after_sheet
from rl.record.state import RunState
from rl.record.summary import BestCheckpoint, GuidancePoint, RunSummary, StageSummary


class RunResults:
    """Evaluations by moment, and what follows from them."""

    def __init__(self, config: RunConfig, evaluator: Evaluator, run_dir: Path):
        self.config, self.evaluator, self.run_dir = config, evaluator, run_dir
        self.moments: dict[str, dict[str, TaskScores]] = {}

    def add(self, moment: str, scores: dict[str, TaskScores]) -> None:
        """Remember an evaluation; moments are `before`, `after_<stage>`, `step_<n>`."""
        if scores:
            self.moments[moment] = scores

    def change_since_before(self, task: str, scores: TaskScores) -> Difference | None:
        """Paired change of a task since before the first stage; None at that moment itself."""
        before = self.moments.get("before", {}).get(task)
        if before is None or scores.moment == "before":
            return None
        return paired_bootstrap(before.rewards, scores.rewards)

    def stage_changes(self, index: int) -> dict[str, Difference]:
        """Paired change of every task over stage `index`."""
        return _changes(self._scores(index - 1), self._scores(index))

    def independent_changes(self, first: int, last: int) -> dict[str, Difference]:
        """Paired changes from after stage `first` to after `last` (-1: before any) by the evaluation's rewards of
        weight 0, named `task/label`: an independent view of a gain that training's own reward shows.
        """
        before, after = self._scores(first), self._scores(last)
        return {
            f"{task.task}/{label}": paired_bootstrap(
                before[task.task].components[label], after[task.task].components[label]
            )
            for task in self.config.evaluation.tasks
            if task.task in before and task.task in after
            for label in (reward_label(s) for s in reward_specs(task.rewards) if s.weight == 0)
        }

    def cross_task_alarms(self, index: int) -> list[Alarm]:
        """One per task that the stage did not train and that dropped by more than the margin.

        In a joint stage every task is another's other task, so all of them are watched.
        """
        stage, margin = self.config.stages[index], self.config.evaluation.cross_task_margin
        trained = stage_tasks(stage)
        return [
            Alarm(
                f"stage {stage.name!r} trained {' and '.join(trained)}, and {task} fell by {-change.mean:.4f} "
                f"[{change.low:.4f}, {change.high:.4f}] (evaluation.cross_task_margin={margin:g}); use an earlier "
                "checkpoint's adapter, or train anew with a higher learner.kl_beta or fewer steps",
                ("cross_task",),
            )
            for task, change in self.stage_changes(index).items()
            if trained != [task] and change.mean is not None and change.mean < -margin
        ]

    def stage_alarms(self, index: int, scores: dict[str, TaskScores]) -> list[Alarm]:
        """Of each part of stage `index` whose held-out score falls one per reward that rises meanwhile, or one for
        the fall alone."""
        alarms: list[Alarm] = []
        for part in stage_parts(self.config.stages[index]):
            before, now = self._scores(index - 1).get(part.task), scores.get(part.task)
            if before is not None and now is not None:
                labels = [reward_label(spec) for spec in reward_specs(part.rewards)]
                hacked = reward_hacking(part.label, labels, before, now)
                alarms += [Alarm(line, ("reward_hacking", "trained_task")) for line in hacked]
                if not hacked:
                    fell = trained_task_fell(part.label, before, now)
                    alarms += [Alarm(line, ("trained_task",)) for line in fell]
        return alarms

    def summary(
        self, state: RunState, *, best: BestCheckpoint | None = None, finished: bool = True
    ) -> RunSummary:
        """The summary, so far as evaluations are there; also draws the before-and-after sheets."""
        evaluated = [i for i, p in enumerate(state.stages) if f"after_{p.name}" in self.moments]
        stages = tuple(
            StageSummary(
                progress.name,
                self.config.stages[i].task,
                progress.steps,
                progress.seconds,
                self.stage_changes(i) | self.independent_changes(i - 1, i) if i in evaluated else {},
                progress.reward_mean,
                progress.missing / progress.samples if progress.samples else 0.0,
            )
            for i, progress in enumerate(state.stages)
        )
        total: dict[str, Difference] = {}
        if evaluated:
            total = _changes(self._scores(-1), self._scores(evaluated[-1]))
            total |= self.independent_changes(-1, evaluated[-1])
        self._sheets()
        return RunSummary(
            name=self.config.name,
            stages=stages,
            images=state.images,
            seconds=state.seconds,
            version=__version__,
            commit=_commit(),
            total=total,
            base_guidance=self._guidance(),
            restarts=state.restarts,
            learner_restarts=state.learner_restarts,
            finished=finished,
            changes=tuple(state.changes),
            best=best,
        )

    def write_adapter(self, adapter: Adapter, folder: Path) -> None:
        """PEFT folder and diffusers file of an adapter."""
        lora = self.config.model.lora
        save_adapter(adapter.tensors, folder, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)

    def write_final(self, adapter: Adapter) -> None:
        """`adapter/` and `transformer/` (merged, in the released layout) of the finished run."""
        import torch

        from models.components import torch_dtype

        self.write_adapter(adapter, self.run_dir / "adapter")
        lora = self.config.model.lora
        dtype = torch_dtype(self.config.model.dtype)
        transformer = load_transformer(recipes.resolve(self.config.model.path), dtype=dtype, device="cpu")
        with torch.no_grad():
            save_merged_transformer(
                transformer, adapter.tensors, self.run_dir / "transformer", rank=lora.rank, alpha=lora.alpha
            )

    def _scores(self, index: int) -> dict[str, TaskScores]:
        """Empty where there are none, or only of other prompts, weights or rewards."""
        return self.moments.get("before" if index < 0 else f"after_{self.config.stages[index].name}", {})

    def _guidance(self) -> dict[str, tuple[GuidancePoint, ...]]:
        points: dict[str, list[GuidancePoint]] = {}
        for moment, scores in self.moments.items():
            if moment == "before" or moment.startswith("before_guidance"):
                for task, result in scores.items():
                    points.setdefault(task, []).append(_point(result))
        return {
            task: tuple(sorted(p, key=lambda x: x.guidance_scale)) for task, p in points.items() if len(p) > 1
        }

    def _sheets(self) -> None:
        for task, columns in self.evaluator.gallery.items():
            kept = {
                moment.replace("_", " "): columns[moment]
                for moment in ["before", *(f"after_{stage.name}" for stage in self.config.stages)]
                if columns.get(moment)
            }
            if len(kept) > 1:
                before_after_sheet(kept, self.run_dir / "samples" / f"before_after_{task}.png")


def _changes(before: dict[str, TaskScores], after: dict[str, TaskScores]) -> dict[str, Difference]:
    return {
        task: paired_bootstrap(before[task].rewards, after[task].rewards) for task in after if task in before
    }


def _point(scores: TaskScores) -> GuidancePoint:
    scored = [r for r in scores.rewards if r is not None]
    return GuidancePoint(scores.guidance_scale, float(np.mean(scored)) if scored else None, len(scored))


def _commit() -> str | None:
    """The checkout's commit; None in an installed package or an uploaded working directory."""
    root: Any = recipes.resolve("recipes").parent
    if not (root / ".git").exists():
        return None
    found = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
    )
    return found.stdout.strip() or None
