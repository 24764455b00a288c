"""The stored evaluations behind the rows of a grid: scores by seed and prompt, of the score itself and of every
independent reward (one of weight 0 in the evaluation).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from core.statistics import Estimate, seeds_bootstrap
from rewards.base import RewardSpec, reward_label
from rl.record.summary import run_finished
from rl.sweep.config import SweepConfig, SweepRow


@dataclass(frozen=True)
class RowScores:
    """One row on one metric, from its finished runs in the order of `seeds`. before, after: [seeds, prompts], NaN where
    a prompt was not scored; `before` is the untrained model's.
    """

    seeds: tuple[int, ...]
    before: NDArray[np.float64]
    after: NDArray[np.float64]


class GridScores:
    """All rows of a grid by metric: a task, or `task/label` for an independent reward on it."""

    def __init__(self, grid: SweepConfig) -> None:
        self.grid = grid
        self._finished = {
            row.name: [s for s in grid.seeds if run_finished(grid.run_folder(row, s))]
            for row in (*grid.trained, *grid.rows)
            if not row.untrained
        }

    def seeds(self, row: SweepRow) -> list[int]:
        """Seeds whose run is finished; none for the untrained model, which has no run."""
        return [] if row.untrained else self._finished[row.name]

    def metrics(self, row: SweepRow) -> list[str]:
        """What the row's runs are evaluated on; empty while none is finished."""
        folders = self._folders(row)
        return _metrics(folders[0]) if folders else []

    def scores(self, row: SweepRow, metric: str) -> RowScores:
        """The row's scores. Raises FileNotFoundError when an evaluation of a finished run is missing."""
        folders = self._folders(row)
        moments = [row.moment or ("before" if row.untrained else _last(folder)) for folder in folders]
        return RowScores(
            tuple(self.seeds(row)),
            np.stack([_scores(folder, "before", metric) for folder in folders]),
            np.stack([_scores(f, moment, metric) for f, moment in zip(folders, moments, strict=True)]),
        )

    def compare(self, later: SweepRow, earlier: SweepRow, metric: str) -> Estimate:
        """How much better a row is than another, paired by training seed and prompt; see `seeds_bootstrap`.

        Over the seeds that both have finished. Against the untrained model the row's own start counts.
        """
        found = self.scores(later, metric)
        if earlier.untrained:
            return seeds_bootstrap(found.after - found.before)
        other = self.scores(earlier, metric)
        common = [seed for seed in found.seeds if seed in other.seeds]
        rows = [found.after[found.seeds.index(s)] - other.after[other.seeds.index(s)] for s in common]
        return seeds_bootstrap(np.array(rows).reshape(len(common), -1))

    def _folders(self, row: SweepRow) -> list[Path]:
        if not row.untrained:
            return [self.grid.run_folder(row, seed) for seed in self.seeds(row)]
        # Any run tells what the untrained model scores: every run evaluates it on the same prompts and noise.
        for trained in self.grid.trained:
            for seed in self.seeds(trained):
                return [self.grid.run_folder(trained, seed)]
        return []


def _metrics(folder: Path) -> list[str]:
    """By the recipe that the run kept."""
    recipe = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    found = []
    for task in recipe["evaluation"]["tasks"]:
        watched = [RewardSpec(r["name"], label=r["label"]) for r in task["rewards"] if r["weight"] == 0]
        found += [task["task"], *(f"{task['task']}/{label}" for label in map(reward_label, watched))]
    return found


def _last(folder: Path) -> str:
    """The moment after the run's last stage."""
    return f"after_{json.loads((folder / 'summary.json').read_text())['stages'][-1]['name']}"


def _scores(folder: Path, moment: str, metric: str) -> NDArray[np.float64]:
    task, _, label = metric.partition("/")
    stored = json.loads((folder / "evaluations" / moment / f"{task}.json").read_text())
    values = stored["components"][label] if label else stored["rewards"]
    return np.array([np.nan if value is None else value for value in values], np.float64)
