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
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rewards.editreward.config import Recipe, flat, to_yaml
from rewards.editreward.evaluate_metrics import Scored, agreement, group_mean
from rewards.editreward.index import Entry
from rewards.editreward.settings import FILE, EditRewardSettings
from rewards.editreward.train_ranks import Ranks
from rl.atomic import atomic_write_json, atomic_write_text, publish_folder, verify_folder
from rl.config import ConfigError
from rl.jsonl import append_records, open_records
from rl.progress import Progress

log = logging.getLogger(__name__)
CHECKPOINTS, BEST, RECIPE = "checkpoints", "best", "recipe.yaml"
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
        from torch.utils.tensorboard import SummaryWriter

        self.recipe, self.settings, self.ranks, self.validation = recipe, settings, ranks, validation
        self.folder, self.state = recipe.run_dir, state
        self.end = recipe.train.stop_step or recipe.train.steps
        resumed = None if fresh else state.step
        open_records(self.folder / "metrics.jsonl", resumed)
        self.board = SummaryWriter(
            str(self.folder / "tensorboard"), purge_step=None if resumed is None else state.step + 1
        )

    def run(self) -> RunState:
        """Train to the end of this run. The last step is validated and saved whatever the intervals."""
        train = self.recipe.train
        with Progress().phase("train", total=max(0, self.end - self.state.step), unit="step") as bar:
            while self.state.step < self.end:
                start = self.state.step
                stop = min(
                    self.end,
                    *(_next(start, n) for n in (train.log_every, train.evaluate_every, train.save_every)),
                )
                self._log_steps(self.ranks.call("advance", stop), bar.rate)
                self.state = replace(self.state, step=stop)
                last = stop == self.end
                if stop % train.evaluate_every == 0 or last:
                    self._validate()
                if stop % train.save_every == 0 or last:
                    self._save()
                bar.advance(stop - start)
        self.board.close()
        return self.state

    def _log_steps(self, figures: list[list[Any]], rate: float) -> None:
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
        self._write(records)
        log.info("step %d: loss %.4f, %.2f steps/s", records[-1]["step"], records[-1]["train/loss"], rate)

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
        self._write([{"step": step, **{f"validation/{name}": value for name, value in figures.items()}}])
        score = figures[self.recipe.train.best_by]
        log.info("step %d: validation %s %s", step, self.recipe.train.best_by, _short(score))
        best = self.state.best_score
        if score is not None and (best is None or score > best):
            self.state = replace(self.state, best_step=step, best_score=score)
            self._publish(BEST, "save_trainable", keep=1)

    def _save(self) -> None:
        self._publish(CHECKPOINTS, "save", keep=self.recipe.train.keep_checkpoints)

    def _publish(self, kind: str, method: str, *, keep: int) -> None:
        """A folder complete or absent, under a new name; only then the oldest go."""
        final = self.folder / kind / f"step_{self.state.step:07d}"
        temporary = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        self.ranks.call(method, str(temporary))
        atomic_write_text(temporary / RECIPE, to_yaml(self.recipe))
        atomic_write_json(temporary / FILE, self.settings.to_json())
        atomic_write_json(temporary / STATE, asdict(self.state))
        publish_folder(temporary, final)
        for old in sorted((self.folder / kind).glob("step_*"))[:-keep]:
            shutil.rmtree(old)

    def _write(self, records: list[dict[str, Any]]) -> None:
        append_records(self.folder / "metrics.jsonl", records)
        for record in records:
            for name, value in record.items():
                if name != "step" and value is not None:
                    self.board.add_scalar(name, value, record["step"])
        self.board.flush()


def find_checkpoint(recipe: Recipe, resume: str | None) -> Path | None:
    """The folder to continue from; None to start afresh.

    Raises ConfigError for a run that exists and was not asked to continue, for a folder that is damaged (with
    `auto` an older sound one is taken instead), and for a recipe that would compute something else.
    """
    folder = recipe.run_dir
    if resume is None:
        if (folder / "metrics.jsonl").exists():
            raise ConfigError([f"{folder} holds an earlier run; add --resume auto, or set another name="])
        return None
    newest_first = sorted((folder / CHECKPOINTS).glob("step_*"), reverse=True)
    for candidate in newest_first if resume == "auto" else [Path(resume)]:
        problems = verify_folder(candidate)
        if not problems:
            _check_same(candidate / RECIPE, recipe)
            return candidate
        if resume != "auto":
            raise ConfigError(problems)
        log.warning("passing over a damaged checkpoint: %s", problems[0])
    return None


def read_state(checkpoint: Path) -> RunState:
    """Where a checkpoint stands."""
    return RunState(**json.loads((checkpoint / STATE).read_text(encoding="utf-8")))


def _check_same(saved: Path, recipe: Recipe) -> None:
    from rewards.editreward.config import load_recipe

    before, now = flat(load_recipe(saved)), flat(recipe)
    problems = [
        f"{key} was {before.get(key)!r} when {saved.parent.name} was written and is {now.get(key)!r} now; set it "
        "back, or start a new run under another name"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(_FREE)
    ]
    if problems:
        raise ConfigError(problems)


def _next(step: int, every: int) -> int:
    """The first multiple of `every` behind `step`."""
    return (step // every + 1) * every


def _short(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
