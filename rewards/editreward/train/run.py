"""A training run as seen from the driver: advance, validate, log, save, keep the best. The ranks do the work.

run_dir/recipe.yaml            the resolved recipe
run_dir/editreward.json        constants of the training split, saved with the model
run_dir/data.txt               what was found in the shards, and what was left out
run_dir/index/                 one file a shard
run_dir/metrics.jsonl, tensorboard/
run_dir/checkpoints/step_*     exact state, newest `train.keep_checkpoints`
run_dir/best/step_*            trained weights with the best validation score so far
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from core.checkpoints import CHECKPOINTS, check_same_keys, find_step, next_multiple, publish_step
from core.cluster.ranks import Ranks
from core.files import atomic_write_json, atomic_write_text
from core.progress import Progress
from core.recipe import flat, to_yaml
from core.scalars import ScalarLog
from rewards.editreward.config import Recipe
from rewards.editreward.data.index import Entry
from rewards.editreward.evaluate.metrics import Scored, agreement, group_mean
from rewards.editreward.settings import FILE, EditRewardSettings

log = logging.getLogger(__name__)
BEST, RECIPE = "best", "recipe.yaml"
STATE = "state.json"

# Keys that may differ between a run and its continuation: they leave what is learned alone.
_FREE = (
    "output_dir", "train.stop_step", "train.loader_workers", "train.log_every", "train.save_every",
    "train.keep_checkpoints", "data.index_workers", "resources.", "evaluate.",
)  # fmt: skip


@dataclass(frozen=True)
class RunState:
    """Where a run stands: optimizer steps done, and the best validation so far."""

    step: int = 0
    best_step: int = 0
    best_score: float | None = None


class TrainingRun:
    """Runs ranks that are set up, from `state` on; a run that is not `fresh` drops its records after that step.

    `validation`: the entries whose labels the ranks' predictions are held against.
    """

    def __init__(
        self,
        recipe: Recipe,
        settings: EditRewardSettings,
        ranks: Ranks,
        validation: Sequence[Entry],
        state: RunState,
        *,
        fresh: bool,
    ):
        self.recipe, self.settings, self.ranks, self.validation = recipe, settings, ranks, validation
        self.folder, self.state = recipe.run_dir, state
        self.end = recipe.train.stop_step or recipe.train.steps
        self.scalars = ScalarLog(self.folder, resume_step=None if fresh else state.step)

    def run(self) -> RunState:
        """Train to the end of this run. The last step is validated and saved whatever the intervals."""
        train = self.recipe.train
        with Progress().phase("train", total=max(0, self.end - self.state.step), unit="step") as bar:
            while self.state.step < self.end:
                start = self.state.step
                stop = min(
                    self.end,
                    *(
                        next_multiple(start, n)
                        for n in (train.log_every, train.evaluate_every, train.save_every)
                    ),
                )
                self._log_steps(self.ranks.call("advance", stop))
                self.state = replace(self.state, step=stop)
                last = stop == self.end
                if stop % train.evaluate_every == 0 or last:
                    self._validate()
                if stop % train.save_every == 0 or last:
                    self._save()
                bar.advance(stop - start)
        self.scalars.close()
        return self.state

    def _log_steps(self, figures: list[list[Any]]) -> None:
        """One record a step: means over ranks."""
        ranking = self.recipe.train.ranking.weight
        records = []
        for ranks in zip(*figures, strict=True):
            regression = float(np.mean([f.regression for f in ranks]))
            pairwise = float(np.mean([f.ranking for f in ranks]))
            records.append(
                {
                    "step": ranks[0].step,
                    "train/loss": regression + ranking * pairwise,
                    "train/regression": regression,
                    "train/ranking": pairwise,
                    "train/gradient_norm": ranks[0].gradient_norm,
                    "train/learning_rate": ranks[0].learning_rate,
                }
            )
        self.scalars.write(records)
        log.info("step %d: loss %.4f", records[-1]["step"], records[-1]["train/loss"])

    def _validate(self) -> None:
        answers = [row for rank in self.ranks.call("validate") for row in rank]
        raw = dict(answers)
        settings = self.settings
        scored = Scored(
            np.array([settings.combined(entry.scores) for entry in self.validation]),
            np.array([settings.score(raw[i]) for i in range(len(self.validation))]),
            [entry.group for entry in self.validation],
            [entry.source for entry in self.validation],
            [entry.edit_type for entry in self.validation],
        )
        figures = agreement(scored.target, scored.predicted)
        figures["group_spearman"] = group_mean(scored, agreement, "spearman")
        figures["group_pairwise"] = group_mean(scored, agreement, "pairwise")
        step = self.state.step
        self.scalars.write(
            [{"step": step, **{f"validation/{name}": value for name, value in figures.items()}}]
        )
        score = figures[self.recipe.train.best_by]
        log.info("step %d: validation %s %s", step, self.recipe.train.best_by, _short(score))
        best = self.state.best_score
        if score is not None and (best is None or score > best):
            self.state = replace(self.state, best_step=step, best_score=score)
            self._publish(BEST, "save_trainable", keep=1)

    def _save(self) -> None:
        self._publish(CHECKPOINTS, "save", keep=self.recipe.train.keep_checkpoints)

    def _publish(self, kind: str, method: str, *, keep: int) -> None:
        def fill(folder: Path) -> None:
            self.ranks.call(method, str(folder))
            atomic_write_text(folder / RECIPE, to_yaml(self.recipe))
            atomic_write_json(folder / FILE, self.settings.to_json())
            atomic_write_json(folder / STATE, asdict(self.state))

        publish_step(self.folder / kind, self.state.step, fill, keep=keep)


def find_checkpoint(recipe: Recipe, resume: str | None) -> Path | None:
    """The folder to continue from; see `find_step`. Raises ConfigError where another recipe wrote it."""
    from rewards.editreward.validate import load_recipe

    def check(folder: Path) -> None:
        saved = load_recipe(folder / RECIPE)
        check_same_keys(flat(saved), flat(recipe), free=_FREE, when=folder.name)

    return find_step(recipe.run_dir, resume, check)


def read_state(checkpoint: Path) -> RunState:
    """Where a checkpoint stands."""
    return RunState(**json.loads((checkpoint / STATE).read_text(encoding="utf-8")))


def _short(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
