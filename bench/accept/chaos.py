"""Faults injected into small real runs: every kind at every point, drivers killed at random moments, a long soak.

    python -m bench.accept.chaos [--only matrix|nodes|drivers|soak] [--cells N] [--kills N] [--steps N] [--seed N]

A run must end bit for bit as the undisturbed one, or stop with the cause and end so once it is resumed. The evidence is
written by the whole of it alone; a part prints its figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import psutil

from bench.accept.chaos_cells import CALL_S, CELL_S, Cell, claim, ended, run_cell, run_straight, tell
from bench.accept.chaos_nodes import run_nodes
from bench.accept.evidence import claims_table, conclude
from tests.chaos.faults import BEGUN
from tests.chaos.harness import NOW, Chaos, Fault, result
from tests.fakes.forked_workers import WorkerServer

NTH = {"encode": 2, "denoise": 8, "evaluate": 4, "publish": 5, "micro_batch": 9, "gather": 2, "save": 3,
       "reward": 4, "served": 6}  # fmt: skip
"""Which passage of a point in a worker is struck: one in the middle of the run."""
DRIVER = {"driver_rollout": 2, "driver_update": 2, "driver_publish": 3, "driver_record": 3, "driver_metrics": 3,
          "driver_evaluate": 2, "driver_pictures": 1, "driver_save": 2, "driver_export": 1}  # fmt: skip
FULL = ("driver_record", "driver_metrics", "driver_pictures", "driver_save", "driver_export")
"""Where the driver writes, so that a disk may be full."""
STOPPED = ("driver_update", "driver_save")
"""Where the driver is stopped."""
SOAK_S, KILL_EVERY_S = 7200.0, 5.0
"""Limit of the soak; seconds between two of its kills, on average."""


Planned = tuple[Fault, str, tuple[str, ...]]
"""A fault, how its run differs from the others, and the overrides that make it so."""


def matrix() -> list[Planned]:
    """Every kind of fault at every point. A stopped driver ends when it is killed: nothing in the run could see it."""
    worker = [Fault(p, how, nth) for p, nth in NTH.items() for how in ("kill", "stop", "raise", "slow")]
    driver = [Fault(p, how, nth) for p, nth in DRIVER.items() for how in ("kill", "raise", "slow")]
    driver += [Fault(p, "full", DRIVER[p]) for p in FULL] + [Fault(p, "stop", DRIVER[p]) for p in STOPPED]
    rank = Fault("micro_batch", "kill", NTH["micro_batch"])
    return [
        *((fault, "", ()) for fault in (*worker, *driver)),
        (rank, "placement shared", ("resources.placement=shared",)),
        (rank, "no restart is left", ("resources.learner_restarts=0",)),
    ]


def run_matrix(chaos: Chaos, planned: list[Planned], expected: object) -> list[Cell]:
    cells = []
    for fault, note, overrides in planned:
        cells.append(
            run_cell(chaos, fault, expected, note=note, overrides=overrides, meanwhile=kill_stopped_driver)
        )
        tell(cells[-1])
    return cells


def kill_stopped_driver(pids: list[int]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        if pids and (driver := psutil.Process(pids[0])).status() == psutil.STATUS_STOPPED:
            driver.kill()


def kill_drivers(
    chaos: Chaos, kills: int, straight_s: float, expected: object, dice: random.Random
) -> list[Cell]:
    """Runs whose driver is killed once each, at any moment from its start to the end, and resumed."""
    cells = []
    for number in range(kills):
        after_s, name = dice.uniform(0.0, straight_s), f"driver_{number}"
        began = time.monotonic()

        def kill(pids: list[int], at: float = began + after_s) -> None:
            if pids and time.monotonic() > at:
                with contextlib.suppress(psutil.NoSuchProcess):
                    psutil.Process(pids[0]).kill()

        outcome = chaos.run(name, limit_s=CELL_S, meanwhile=kill)
        cells.append(ended(chaos, name, f"driver killed after {after_s:.1f} s", outcome, expected))
        tell(cells[-1])
    return cells


def soak(chaos: Chaos, steps: int, dice: random.Random) -> list[Cell]:
    """Two stages of `steps` together, first undisturbed, then with a worker killed every few seconds."""
    length = tuple(f"stages[{stage}].steps={steps // 2}" for stage in range(2))
    more = (*length, "resources.learner_restarts=1000", "resources.max_restarts=1000")
    assert chaos.run("soak_straight", overrides=more, limit_s=SOAK_S).state == "finished"
    killed: list[int] = []
    due = time.monotonic()

    def strike(pids: list[int]) -> None:
        nonlocal due
        if time.monotonic() < due or not (chaos.folder / NOW / BEGUN).exists():
            return  # a run does not start again what dies in its start: it stops
        due = time.monotonic() + dice.expovariate(1 / KILL_EVERY_S)
        alive = [pid for pid in pids[1:] if pid not in killed and psutil.pid_exists(pid)]
        if alive:
            killed.append(dice.choice(alive))
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(killed[-1]).kill()

    outcome = chaos.run("soak", overrides=more, limit_s=SOAK_S, meanwhile=strike)
    what = f"{len(killed)} kills in {steps} steps"
    cells = [ended(chaos, "soak", what, outcome, result(chaos.out("soak_straight")), overrides=more)]
    tell(cells[0])
    return cells


@contextlib.contextmanager
def harness(folder: Path) -> Iterator[Chaos]:
    """A Ray of its own, with forked workers, and the services."""
    import ray

    workers = WorkerServer(folder)
    with workers.shortened():
        ray.init(
            address="local", num_cpus=16, num_gpus=0, include_dashboard=False, log_to_driver=False,
            runtime_env={"py_executable": workers.python},
        )  # fmt: skip
    workers.start()
    address = ray.get_runtime_context().gcs_address
    chaos = Chaos(folder, address, workers.python, resources__call_timeout_s=CALL_S)
    try:
        yield chaos
    finally:
        chaos.close()
        ray.shutdown()
        workers.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accept.chaos")
    parser.add_argument("--only", choices=tuple(TEXTS), help="one part, without evidence")
    parser.add_argument("--cells", type=int, help="so many cells of the matrix, drawn")
    parser.add_argument("--kills", type=int, default=20, help="drivers to kill")
    parser.add_argument("--steps", type=int, default=200, help="steps of the soak")
    parser.add_argument("--seed", type=int, default=0, help="of cells, moments and victims")
    options = parser.parse_args()
    dice, parts = random.Random(options.seed), (options.only,) if options.only else tuple(TEXTS)
    found: dict[str, list[Cell]] = {}
    straight_s = 0.0
    with tempfile.TemporaryDirectory() as folder:
        if set(parts) - {"nodes"}:
            with harness(Path(folder)) as chaos:
                straight_s, expected = run_straight(chaos)
                planned = matrix() if options.cells is None else dice.sample(matrix(), options.cells)
                if "matrix" in parts:
                    found["matrix"] = run_matrix(chaos, planned, expected)
                if "drivers" in parts:
                    found["drivers"] = kill_drivers(chaos, options.kills, straight_s, expected, dice)
                if "soak" in parts:
                    found["soak"] = soak(chaos, options.steps, dice)
        if "nodes" in parts:
            found["nodes"] = run_nodes(Path(folder) / "nodes")
    claims = [claim(TEXTS[part], cells) for part, cells in found.items()]
    if options.only or options.cells is not None:
        sys.stdout.write("\n".join(claims_table(claims)) + "\n")
        sys.exit(0 if all(c.holds for c in claims) else 1)
    body = [*claims_table(claims), "", f"The undisturbed run takes {straight_s:.0f} s.", "",
            "| fault | verdict | seconds | resumed, seconds | cause |", "|---|---|---|---|---|"]  # fmt: skip
    body += [
        f"| {c.fault} | {c.verdict} | {c.seconds:.0f} | {c.resumed_s:.0f} | {c.cause.replace('|', '/')[:200]} |"
        for cells in found.values()
        for c in cells
    ]
    data = {"claims": [asdict(c) for c in claims], "straight_s": straight_s,
            "cells": {part: [asdict(c) for c in cells] for part, cells in found.items()}}  # fmt: skip
    holds = all(c.holds for c in claims)
    conclude("chaos", "Injected faults", body, json.loads(json.dumps(data)), holds=holds)


TEXTS = {
    "matrix": "each fault at each point: the end is the undisturbed run's to the bit, or a stop with the cause whose "
    "resumed end is",
    "nodes": "the power of a node is taken at each point, with and without another one that joins: the same end",
    "drivers": "drivers killed at random moments of a run of two stages, each resumed: the same end",
    "soak": "a worker killed every 5 s on average: the same end",
}

if __name__ == "__main__":
    main()
