"""Command line: `python -m rl.sweep GRID [key=value ...] [--only ROW] [--seeds 0 1] [--parallel N] [--dry-run]`.

An ablation grid is a YAML file: a recipe, seeds, and rows that each change something in the recipe.

    name: table4
    recipe: pdtr.yaml                # relative to the grid's own folder
    seeds: [0, 1, 2]
    rows:
      - {name: none, untrained: true}                         # the model before any training
      - {name: both, changes: {stages: [...]}}                # keys of the recipe; lists are replaced whole
      - {name: editing only, of: both, moment: after_edit}    # read from that row's run, half-way

Each run is a `python -m rl.train` of its own, to `OUTPUT_DIR/NAME/ROW-seedK`; `parallel` of them at once, which changes
nothing in their results. A finished run is kept, an unfinished one is resumed: run the same command again after
anything. The table is written after every run.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from core.files import atomic_write_json, atomic_write_text
from core.logs import start_logging
from core.recipe import ConfigError
from core.recipe_help import add_help_config
from core.run_lock import hold_run
from core.run_status import STOP_TIMEOUT_S, watch_run
from rl.record.summary import run_finished
from rl.sweep.config import SweepConfig, SweepFile, load_sweep, row_recipe, run_name
from rl.sweep.table import collect_rows, table_document, table_markdown

log = logging.getLogger("rl.sweep")
_STARTING = threading.Lock()
"""Runs start one after the other: a start is mostly imports, and several at once are slower than Ray allows."""
_STOPPED = (-signal.SIGTERM, 128 + signal.SIGTERM)
_UNDER_WAY: list[subprocess.Popen[bytes]] = []


def main(argv: list[str] | None = None) -> int:
    """0 when every run of the grid is finished; 1 when one failed; 2 for a grid that cannot run."""
    arguments = _parse(argv)
    start_logging()
    try:
        grid = load_sweep(
            arguments.grid,
            arguments.overrides,
            only=arguments.only,
            seeds=arguments.seeds,
            parallel=arguments.parallel,
            output_dir=arguments.output_dir,
        )
        with hold_run(grid.folder):
            return sweep(grid, dry_run=arguments.dry_run)
    except ConfigError as error:
        sys.stderr.write(f"This grid cannot run:\n{error}\n")
        return 2


def sweep(grid: SweepConfig, *, dry_run: bool) -> int:
    """Check every recipe, train every run, write the table; the exit code. Raises ConfigError."""
    plans = write_recipes(grid)
    # The seed changes nothing that could be found wrong.
    problems = check({name: plans[name] for name in (run_name(r.name, grid.seeds[0]) for r in grid.trained)})
    if problems or dry_run:
        sys.stdout.write(
            "\n".join([*(f"- {p}" for p in problems), f"{len(plans)} runs in {grid.folder}"]) + "\n"
        )
        return 2 if problems else 0
    failed = run_all(grid, plans)
    sys.stdout.write(write_table(grid).read_text())
    for name in failed:
        sys.stderr.write(f"run {name} failed; its log is {grid.folder / name}.log\n")
    return 1 if failed else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m rl.sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("grid", help="path of a YAML grid, for example recipes/shapes/table4.yaml")
    parser.add_argument(
        "overrides", nargs="*", help="key=value of the recipe, for every row; values.NAME=... of the grid"
    )
    add_help_config(parser, SweepFile)
    parser.add_argument("--only", nargs="+", metavar="ROW", help="only these rows")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the grid's seeds")
    parser.add_argument("--output-dir", metavar="DIR", help="instead of the grid's output_dir")
    parser.add_argument("--parallel", type=int, metavar="N", help="runs at once, instead of the grid's own")
    parser.add_argument("--dry-run", action="store_true", help="check every recipe; train nothing")
    return parser.parse_intermixed_args(argv)


def write_recipes(grid: SweepConfig) -> dict[str, Path]:
    """Run name to the recipe it will run, resolved and written beside the runs.

    Raises ConfigError with the problems of all rows.
    """
    plans, problems = {}, []
    for row in grid.trained:
        for seed in grid.seeds:
            name = run_name(row.name, seed)
            try:
                text = row_recipe(grid, row, name, seed)
            except ConfigError as error:
                problems += [f"row {row.name!r}: {problem}" for problem in error.problems]
                break
            plans[name] = grid.folder / f"{name}.yaml"
            plans[name].parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(plans[name], text)
    if problems:
        raise ConfigError(problems)
    return plans


def check(plans: dict[str, Path]) -> list[str]:
    """The preflight's problems of every recipe, before the first run takes anything."""
    from rl.recipe.preflight import preflight
    from rl.recipe.schema import load_config

    found: dict[str, str] = {}
    for name, recipe in plans.items():
        for problem in preflight(load_config(recipe)).problems:
            found.setdefault(problem, name)
    return [f"{name}: {problem}" for problem, name in found.items()]


def run_all(grid: SweepConfig, plans: dict[str, Path]) -> list[str]:
    """Train every run, at most `grid.parallel` at once, in the order of the grid; the names of those that failed."""
    failed = []
    with ThreadPoolExecutor(grid.parallel) as pool:
        started = {pool.submit(run, grid, name, recipe): name for name, recipe in plans.items()}
        with watch_run(grid.folder, resume=False, heard=_forward) as watch:
            try:
                for number, done in enumerate(as_completed(started), start=1):
                    if not done.result():
                        failed.append(started[done])
                    write_table(grid)
                    watch.at(number)
            except BaseException:  # runs under way have heard the signal and save; the others are not begun
                pool.shutdown(cancel_futures=True)
                raise
    return sorted(failed)


def run(grid: SweepConfig, name: str, recipe: Path) -> bool:
    """Train one run, or what is left of it; its output goes to a log file. True when it is finished.

    A run that fails before it wrote anything is tried once more: Ray allows its own start 30 seconds, and on a busy
    machine that may not do.
    """
    folder = grid.folder / name
    if run_finished(folder):
        log.info("%s: finished before", name)
        return True
    code = train(grid, name, recipe)
    if code and code not in _STOPPED and not (folder / "metrics.jsonl").is_file():
        code = train(grid, name, recipe)
    return code == 0


def train(grid: SweepConfig, name: str, recipe: Path) -> int:
    """One process of `rl.train`; its exit code."""
    folder = grid.folder / name
    command = [sys.executable, "-m", "rl.train", str(recipe)]
    command += ["--resume", "auto"] if (folder / "metrics.jsonl").is_file() else []
    log.info("%s: %s", name, " ".join(command))
    before, deadline = _written(folder), time.monotonic() + grid.timeout_s
    with open(f"{folder}.log", "ab") as output:
        with _STARTING:
            # In a group of its own: the terminal's Ctrl-C reaches the grid alone, which passes on each signal once.
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, process_group=0)
            _UNDER_WAY.append(process)
            while process.poll() is None and time.monotonic() < deadline and _written(folder) == before:
                time.sleep(0.2)
        try:
            return process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.error("%s: not finished within timeout_s=%g; stopped", name, grid.timeout_s)
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
            return 1
        finally:
            process.kill()
            process.wait()
            _UNDER_WAY.remove(process)


def _forward(number: int) -> None:
    """Let the runs under way save too, or with the second signal leave."""
    for process in _UNDER_WAY:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)


def _written(folder: Path) -> int | None:
    """When a run last wrote records, by a clock that may be set back: a new one says that its actors are up."""
    path = folder / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.is_file() else None


def write_table(grid: SweepConfig) -> Path:
    """`table.md` and `table.json` from the runs that are finished so far."""
    rows = collect_rows(grid)
    atomic_write_json(grid.folder / "table.json", table_document(rows))
    path = grid.folder / "table.md"
    atomic_write_text(path, table_markdown(grid.name, rows))
    return path


if __name__ == "__main__":
    sys.exit(main())
