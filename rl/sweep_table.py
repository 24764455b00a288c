"""The table of a grid: what each row's runs came to on every evaluation, over prompts and training seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rl.sweep_config import SweepConfig, SweepRow

RESAMPLES = 10_000


@dataclass(frozen=True)
class Cell:
    """Mean score over seeds and prompts, and the change against the untrained model with its 95 % interval.

    The interval comes from a two-level bootstrap: training seeds are drawn with replacement, then prompts, the
    same prompts for all seeds, since all runs are evaluated on the same ones. With one seed it covers prompts only.
    by_seed: each seed's mean. `low`, `high` are None with fewer than two prompts.
    """

    mean: float
    change: float
    low: float | None
    high: float | None
    by_seed: tuple[float, ...]
    prompts: int


@dataclass(frozen=True)
class Row:
    """A row's cells by evaluation task; empty while none of its runs is finished."""

    name: str
    seeds: tuple[int, ...]
    cells: dict[str, Cell]


def collect_rows(grid: SweepConfig, run_name: Callable[[str, int], str]) -> list[Row]:
    """All rows in the grid's order, from the runs that have a summary."""
    finished = {
        row.name: [s for s in grid.seeds if (grid.folder / run_name(row.name, s) / "summary.json").is_file()]
        for row in grid.rows
        if not row.untrained
    }
    trained = next(((name, seeds) for name, seeds in finished.items() if seeds), None)
    rows = []
    for row in grid.rows:
        # Any run tells what the untrained model scores: every run evaluates it on the same prompts and noise.
        name, seeds = (trained or (row.name, [])) if row.untrained else (row.name, finished[row.name])
        seeds = seeds[:1] if row.untrained else seeds
        folders = [grid.folder / run_name(name, seed) for seed in seeds]
        rows.append(Row(row.name, tuple(() if row.untrained else seeds), _cells(row, folders)))
    return rows


def _cells(row: SweepRow, folders: Sequence[Path]) -> dict[str, Cell]:
    if not folders:
        return {}
    tasks = sorted(path.stem for path in (folders[0] / "evaluations" / "before").glob("*.json"))
    cells = {}
    for task in tasks:
        before = np.stack([_scores(folder, "before", task) for folder in folders])
        moments = ["before" if row.untrained else _last(folder) for folder in folders]
        after = np.stack([_scores(folder, m, task) for folder, m in zip(folders, moments, strict=True)])
        cells[task] = _cell(before, after)
    return cells


def _last(folder: Path) -> str:
    """The moment after the run's last stage."""
    return f"after_{json.loads((folder / 'summary.json').read_text())['stages'][-1]['name']}"


def _scores(folder: Path, moment: str, task: str) -> np.ndarray:
    stored = json.loads((folder / "evaluations" / moment / f"{task}.json").read_text())["rewards"]
    return np.array([np.nan if value is None else value for value in stored])


def _cell(before: np.ndarray, after: np.ndarray) -> Cell:
    """From scores [seeds, prompts]; a prompt that is not scored in every run counts for none."""
    scored = ~(np.isnan(before) | np.isnan(after)).any(axis=0)
    before, after = before[:, scored], after[:, scored]
    change = after - before
    rng, (seeds, prompts) = np.random.default_rng(0), change.shape
    low = high = None
    if prompts > 1:
        means = [
            change[rng.integers(0, seeds, seeds)][:, rng.integers(0, prompts, prompts)].mean()
            for _ in range(RESAMPLES)
        ]
        low, high = (float(bound) for bound in np.percentile(means, [2.5, 97.5]))
    return Cell(
        float(after.mean()), float(change.mean()), low, high, tuple(map(float, after.mean(axis=1))), prompts
    )


def table_document(rows: Sequence[Row]) -> dict[str, Any]:
    """For programs."""
    return {"rows": [asdict(row) for row in rows]}


def table_markdown(name: str, rows: Sequence[Row]) -> str:
    """One line a row; changes against the untrained model in brackets with their intervals."""
    tasks = sorted({task for row in rows for task in row.cells})
    lines = [
        f"# {name}",
        "",
        "| row | seeds | " + " | ".join(tasks) + " |",
        "|---" * (len(tasks) + 2) + "|",
    ]
    for row in rows:
        cells = [_text(row.cells.get(task), untrained=not row.seeds) for task in tasks]
        lines.append(f"| {row.name} | {len(row.seeds) or '–'} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Held-out prompts, equal prompts and noise everywhere. In brackets: change against the untrained model, 95 % "
        "bootstrap over training seeds and prompts; with one seed, over prompts alone. –: not run yet.",
    ]
    return "\n".join(lines) + "\n"


def _text(cell: Cell | None, *, untrained: bool) -> str:
    if cell is None:
        return "–"
    if untrained:
        return f"{cell.mean:.3f}"
    interval = "" if cell.low is None else f" [{cell.low:+.3f}, {cell.high:+.3f}]"
    return f"{cell.mean:.3f} ({cell.change:+.3f}{interval})"
