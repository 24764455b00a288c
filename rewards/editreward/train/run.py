"""A training run as seen from the driver: advance, log, validate, save, keep the best. The ranks do the work.

run_dir/recipe.yaml            the resolved recipe
run_dir/editreward.json        constants of the training split, saved with the model
run_dir/data.txt               what was found in the shards, and what was left out
run_dir/index/                 one file a shard
run_dir/metrics.jsonl, tensorboard/
run_dir/checkpoints/step_*     exact state, newest `train.keep_checkpoints`
run_dir/best/step_*            trained weights with the best validation score so far
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from core.agreement import agreement
from core.checkpoints import BEST, step_folders
from core.cluster.ranks import Ranks
from core.files import atomic_write_json
from core.training.run import Due, RunState, SupervisedRun
from rewards.editreward.config import Recipe
from rewards.editreward.data.index import Entry
from rewards.editreward.evaluate.metrics import group_mean, scored_entries
from rewards.editreward.settings import FILE, EditRewardSettings

log = logging.getLogger(__name__)

# Keys that may differ between a run and its continuation: they leave what is learned alone.
FREE = (
    "output_dir", "train.stop_step", "train.loader_workers", "train.log_every", "train.save_every",
    "train.keep_checkpoints", "data.index_workers", "resources.", "evaluate.",
)  # fmt: skip


@dataclass(frozen=True)
class TrainState(RunState):
    """With the best validation so far."""

    best_step: int = 0
    best_score: float | None = None


class TrainingRun(SupervisedRun):
    """`validation`: the entries whose labels the ranks' predictions are held against."""

    recipe: Recipe
    state: TrainState

    def __init__(
        self,
        recipe: Recipe,
        settings: EditRewardSettings,
        ranks: Ranks,
        validation: Sequence[Entry],
        state: TrainState,
        *,
        fresh: bool,
    ):
        train = recipe.train
        super().__init__(
            recipe, ranks, state, end=train.stop_step or train.steps, log_every=train.log_every, fresh=fresh
        )
        self.settings, self.validation = settings, validation
        if state.best_step not in step_folders(self.folder / BEST).values():
            self.state = replace(state, best_score=None)  # a later best took its place, and was set aside

    def due(self) -> list[Due]:
        train = self.recipe.train
        return [(train.evaluate_every, self._validate), (train.save_every, self.checkpoint)]

    def checkpoint(self) -> None:
        self.save(keep=self.recipe.train.keep_checkpoints, more=self._write_constants)

    def record(self, figures: list[list[dict[str, float]]], seconds: float) -> None:
        """One record a step: means over ranks."""
        records = [
            {name: float(np.mean([rank[name] for rank in ranks])) for name in ranks[0]}
            | {"step": ranks[0]["step"]}
            for ranks in zip(*figures, strict=True)
        ]
        self.scalars.write(records)
        log.info("step %d: loss %.4f", records[-1]["step"], records[-1]["train/loss"])

    def _validate(self) -> None:
        raw = dict(row for rank in self.ranks.call("validate") for row in rank)
        labels = [self.settings.combined(entry.scores) for entry in self.validation]
        predicted = [self.settings.score(raw[i]) for i in range(len(self.validation))]
        scored = scored_entries(self.validation, labels, predicted)
        figures = agreement(scored.target, scored.predicted)
        figures["group_spearman"] = group_mean(scored, "spearman")
        figures["group_pairwise"] = group_mean(scored, "pairwise")
        step, name = self.state.step, self.recipe.train.best_by
        self.scalars.write([{"step": step, **{f"validation/{key}": value for key, value in figures.items()}}])
        score, best = figures[name], self.state.best_score
        log.info("step %d: validation %s %s", step, name, "undefined" if score is None else f"{score:.4f}")
        if score is not None and (best is None or score > best):
            self.state = replace(self.state, best_step=step, best_score=score)
            self.publish(BEST, "save_trainable", keep=1, more=self._write_constants)

    def _write_constants(self, folder: Path) -> None:
        atomic_write_json(folder / FILE, self.settings.to_json())
