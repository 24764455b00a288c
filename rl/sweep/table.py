"""The table of a grid: what each row's runs came to on every metric, over prompts and training seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from core.statistics import Estimate, seeds_bootstrap
from rl.sweep.config import SweepConfig
from rl.sweep.scores import GridScores, RowScores


@dataclass(frozen=True)
class Cell:
    """Mean score over seeds and prompts, and the paired change against the untrained model, both with 95 % intervals
    over seeds and prompts (with one seed, over prompts alone). by_seed: each seed's mean.
    """

    mean: Estimate
    change: Estimate
    by_seed: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """A row's cells by metric; empty while none of its runs is finished. `seeds` is empty for the untrained model."""

    name: str
    seeds: tuple[int, ...]
    cells: dict[str, Cell]
    untrained: bool = False


def collect_rows(grid: SweepConfig) -> list[Row]:
    """All rows in the grid's order, from the runs that have a summary."""
    found = GridScores(grid)
    return [
        Row(
            row.name,
            tuple(found.seeds(row)),
            {metric: _cell(found.scores(row, metric)) for metric in found.metrics(row)},
            row.untrained,
        )
        for row in grid.rows
    ]


def _cell(scores: RowScores) -> Cell:
    mean, change = seeds_bootstrap(scores.after), seeds_bootstrap(scores.after - scores.before)
    by_seed = (seeds_bootstrap(row[None], resamples=1).mean for row in scores.after)
    return Cell(mean, change, tuple(value for value in by_seed if value is not None))


def table_document(rows: Sequence[Row]) -> dict[str, Any]:
    """For programs."""
    return {"rows": [asdict(row) for row in rows]}


def table_markdown(name: str, rows: Sequence[Row]) -> str:
    """One line a row; changes against the untrained model in brackets with their intervals."""
    metrics = list(dict.fromkeys(metric for row in rows for metric in row.cells))
    lines = [
        f"# {name}",
        "",
        "| row | seeds | " + " | ".join(metrics) + " |",
        "|---" * (len(metrics) + 2) + "|",
    ]
    for row in rows:
        cells = [_text(row.cells.get(metric), untrained=row.untrained) for metric in metrics]
        lines.append(f"| {row.name} | {len(row.seeds) or '–'} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Held-out prompts, equal prompts and noise everywhere; `task/label`: another scorer's view, which trained "
        "nothing. After the mean the change against the untrained model, paired by prompt. Intervals: 95 % bootstrap "
        "over training seeds and prompts; with one seed, over prompts alone. –: not run yet.",
    ]
    return "\n".join(lines) + "\n"


def _text(cell: Cell | None, *, untrained: bool) -> str:
    if cell is None or cell.mean.mean is None:
        return "–"
    mean = f"{cell.mean.mean:.3f}{interval(cell.mean, '')}"
    return mean if untrained else f"{mean} ({signed(cell.change)})"


def signed(change: Estimate) -> str:
    """`+0.031 [+0.010, +0.052]`."""
    return "–" if change.mean is None else f"{change.mean:+.3f}{interval(change, '+')}"


def interval(estimate: Estimate, sign: str) -> str:
    """` [low, high]`, or nothing where there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f" [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"
