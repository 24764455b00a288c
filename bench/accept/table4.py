"""The paper's Table 4 in miniature: the grid `recipes/shapes/table4.yaml` under a judge and a trained EditReward.

`python -m bench.accept.table4 [--seeds 0 ...] [--editreward FOLDER] [--output-dir DIR] [key=value ...]`. Resumable: the
same command goes on where it was. With overrides it is a trial, whose table is printed and not kept as evidence.
Outcomes are reported with intervals and never required; only a run that does not finish fails the proof.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.accept.commands import judge_endpoint
from bench.accept.evidence import ROOT, write
from bench.accept.table4_directions import (
    METRICS,
    OURS,
    PAPER,
    REVERSED,
    Direction,
    best_rows,
    direction_table,
    directions,
)
from rl.sweep import __main__ as sweep
from rl.sweep.config import SweepConfig, load_sweep
from rl.sweep.scores import GridScores
from rl.sweep.table import Row, collect_rows, signed, table_document, table_markdown

GRID = "recipes/shapes/table4.yaml"
EDITREWARD = ROOT / "runs" / "accept_editreward" / "editreward" / "model"


def main(argv: Sequence[str] | None = None) -> int:
    """0 with every run finished, 1 when one failed, 2 when the grid cannot run."""
    arguments = _parse(argv)
    if not arguments.editreward.is_dir():
        sys.stderr.write(
            f"{arguments.editreward} is no folder of a trained EditReward; make one first by python -m "
            "bench.accept.editreward, or name one with --editreward\n"
        )
        return 2
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, judge_endpoint(Path(folder)) as url:
        words = [f"values.judge={url}", f"values.editreward={arguments.editreward}", *arguments.overrides]
        code = sweep.main([GRID, *words, *_options(arguments)])
    if code:
        return code
    grid = load_sweep(GRID, words, seeds=arguments.seeds, output_dir=arguments.output_dir)
    body, data = report(grid, arguments.seeds, time.monotonic() - began)
    if arguments.overrides:
        sys.stdout.write("\n".join(body) + "\n")
    else:
        sys.stdout.write(write("table4", "The paper's Table 4 in miniature", body, data).read_text())
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.accept.table4", description="Table 4 in miniature."
    )
    parser.add_argument("overrides", nargs="*", help="key=value for the grid: a trial, not kept as evidence")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the grid's seeds")
    parser.add_argument(
        "--editreward", type=Path, default=EDITREWARD, help="folder of an exported EditReward"
    )
    parser.add_argument("--output-dir", help="where the runs go")
    return parser.parse_intermixed_args(argv)


def _options(arguments: argparse.Namespace) -> list[str]:
    options = ["--seeds", *map(str, arguments.seeds)] if arguments.seeds else []
    return options + (["--output-dir", arguments.output_dir] if arguments.output_dir else [])


def report(grid: SweepConfig, seeds: Sequence[int] | None, wall_s: float) -> tuple[list[str], dict[str, Any]]:
    """The evidence page's lines, and the same for programs."""
    rows, scores = collect_rows(grid), GridScores(grid)
    found = directions(scores)
    minutes = [
        json.loads((grid.folder / sweep.run_name(row.name, seed) / "summary.json").read_text())["seconds"]
        / 60
        for row in grid.trained
        for seed in grid.seeds
    ]
    asked = f" --seeds {' '.join(map(str, seeds))}" if seeds else ""
    lines = [
        f"`python -m bench.accept.table4{asked}` (the grid is `{GRID}`): {len(minutes)} runs, {grid.parallel} at once, "
        f"the longest {max(minutes):.1f} min; {sum(minutes) / len(minutes) / grid.parallel:.1f} min of the machine a "
        f"run, {wall_s / 60:.0f} min for what this command had left to do.",
        "",
        *table_markdown("Rows", rows).splitlines()[2:],
        "",
        "`t2i` stands for the paper's GenEval and `edit` (the exact verifier) for GEdit-EN; the second columns are the "
        "same pictures by an independent scorer, and are held against DPG-Bench and ImgEdit. `judge`: the exact "
        "verifier behind the judge's wire protocol, where GPT-4.1 would stand. Editing alone is the two-stage run "
        "after its first stage.",
        "",
        "## The paper's directions",
        "",
        "The paper's difference; ours; whether its sign holds (the interval lies on that side of 0; for a tie, around "
        "0), is reversed, or is open.",
        "",
        *direction_table(found),
        "",
        *(f"- {metric}: {counted(found, metric)}" for metric in METRICS),
        "",
        *best_lines(rows),
        "",
        "## Joint training, which the paper does not have",
        "",
        *joint_lines(scores),
    ]
    data = {
        "seeds": list(grid.seeds),
        "minutes": minutes,
        "table": table_document(rows),
        "directions": [asdict(direction) for direction in found],
    }
    return lines, data


def counted(found: Sequence[Direction], metric: str) -> str:
    """`9 hold, 1 reversed (...)`: the verdicts on one metric, and which directions were reversed."""
    mine = [direction for direction in found if direction.metric == metric]
    counts = Counter(direction.verdict for direction in mine)
    text = ", ".join(f"{number} {told}" for told, number in sorted(counts.items()))
    wrong = [f"{d.later} − {d.earlier}" for d in mine if d.verdict == REVERSED]
    return f"of {len(mine)} directions {text}" + (f" ({'; '.join(wrong)})" if wrong else "")


def best_lines(rows: Sequence[Row]) -> list[str]:
    """The best row of each metric, the paper's (its exceptions among them) and ours, by mean."""
    lines = ["Best row by mean, the paper's and ours:", ""]
    for column, (name, metric) in enumerate(METRICS.items()):
        paper = best_rows({row: values[column] for row, values in PAPER.items()})
        means = {row.name: row.cells[metric].mean.mean for row in rows if row.name in PAPER and row.cells}
        ours = best_rows({row: mean for row, mean in means.items() if mean is not None})
        lines.append(f"- {name}: {' and '.join(paper)}; ours {' and '.join(ours)}")
    return lines


def joint_lines(scores: GridScores) -> list[str]:
    """Both tasks in turns under one optimizer, against no training and against the staged order."""
    rows = {row.name: row for row in scores.grid.rows}
    lines = ["| difference | " + " | ".join(METRICS.values()) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for later, earlier in OURS:
        cells = [signed(scores.compare(rows[later], rows[earlier], metric)) for metric in METRICS.values()]
        lines.append(f"| {later} − {earlier} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
