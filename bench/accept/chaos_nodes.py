"""Nodes whose power is taken in the middle of small runs on a Ray of several, with and without one that takes their
place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from bench.accept.chaos_cells import CALL_S, Cell, run_cell, run_straight, tell
from tests.chaos.harness import Chaos, Fault
from tests.chaos.nodes import TAKES, Nodes

FAULTS = (
    Fault("encode", "node", 2),
    Fault("denoise", "node", 8),
    Fault("reward", "node", 4),
    Fault("micro_batch", "node", 9),
    Fault("publish", "node", 5),
    Fault("evaluate", "node", 4),
    Fault("driver_update", "node", 2, role="rollout"),
    Fault("driver_update", "node", 2, role="helper"),
)
"""At the last two a node goes with what the learner is about to read: trajectories, or prompts that are encoded."""
ALONE = ("resources.start_timeout_s=45", "resources.learner_restarts=1")
"""Where no node joins: how long a run waits for one."""


def run_nodes(folder: Path) -> list[Cell]:
    """All cells, on a Ray of their own."""
    cells = []
    with harness(folder) as (chaos, nodes):
        _, expected = run_straight(chaos)
        for fault in FAULTS:
            for joins in (True, False):
                nodes.complete()
                cells.append(
                    run_cell(
                        chaos, fault, expected, note="another joins" if joins else "none joins",
                        overrides=() if joins else ALONE, meanwhile=nodes.watch(chaos.folder, joins=joins),
                        mend=nodes.complete,
                    )
                )  # fmt: skip
                tell(cells[-1])
    return cells


@contextlib.contextmanager
def harness(folder: Path) -> Iterator[tuple[Chaos, Nodes]]:
    """A Ray of several nodes. No services: they are on no node."""
    folder.mkdir()
    nodes = Nodes(folder)
    takes = {f"resources__{key}": value for key, value in TAKES.items()}
    chaos = Chaos(folder, nodes.address, nodes.python, services=0, resources__call_timeout_s=CALL_S, **takes)
    try:
        yield chaos, nodes
    finally:
        chaos.close()
        nodes.close()
