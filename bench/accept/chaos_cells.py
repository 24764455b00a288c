"""One fault, or one run under fire, and what became of it: the run ended as the undisturbed one, or stopped with the
cause and ended so once it was resumed, or something is wrong."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.accept.evidence import Claim
from tests.chaos.harness import Chaos, Fault, Outcome, result

CALL_S = 30.0
"""After which a call hangs; longer than in the tests, since a busy machine is no fault."""
CELL_S = 300.0
"""Limit of a cell's run."""


@dataclass(frozen=True)
class Cell:
    """One fault, or one run under fire, and what became of it.

    verdict: `held` (ended as the undisturbed run), `stopped` (with a cause, and ended so when resumed), or
    what is wrong.
    """

    fault: str
    verdict: str
    cause: str
    seconds: float
    resumed_s: float = 0.0

    @property
    def right(self) -> bool:
        return self.verdict in ("held", "stopped")


def run_straight(chaos: Chaos) -> tuple[float, object]:
    """The undisturbed run: its seconds, and what others are compared with."""
    outcome = chaos.run("straight", limit_s=CELL_S)
    assert outcome.state == "finished", outcome
    return outcome.seconds, result(chaos.out("straight"))


def run_cell(
    chaos: Chaos,
    fault: Fault,
    expected: object,
    *,
    note: str = "",
    overrides: Sequence[str] = (),
    meanwhile: Callable[[list[int]], None] = lambda pids: None,
    mend: Callable[[], None] = lambda: None,
) -> Cell:
    """One run with one fault, resumed where it stopped.

    note: how it differs from other runs with this fault. overrides: of the recipe. meanwhile: as in `Chaos.run`.
    mend: is called before the run is resumed.
    """
    what = f"{fault}, {note}" if note else str(fault)
    name = what.replace(",", "").replace(" ", "_")
    try:
        outcome = chaos.run(name, fault, limit_s=CELL_S, overrides=overrides, meanwhile=meanwhile)
        if not outcome.fired:
            return Cell(what, "the point was not reached", outcome.cause, outcome.seconds)
        return ended(chaos, name, what, outcome, expected, mend=mend)
    except Exception as error:  # a third thing, which the other cells do not wait for
        return Cell(what, f"{type(error).__name__}: {error}"[:300], "", CELL_S)


def ended(
    chaos: Chaos,
    name: str,
    what: str,
    outcome: Outcome,
    expected: object,
    *,
    overrides: Sequence[str] = (),
    mend: Callable[[], None] = lambda: None,
) -> Cell:
    """Judge a run's end; one that stopped, or whose driver was killed, is resumed first."""
    verdict, resumed_s = "held", 0.0
    if outcome.state != "finished":
        killed = outcome.state in ("running", "absent")
        if not killed and not outcome.cause:
            return Cell(what, f"{outcome.state} without a cause", "", outcome.seconds)
        if not killed and (left := chaos.left(name)):
            return Cell(what, f"left: {left[:3]}", outcome.cause, outcome.seconds)
        mend()
        verdict, began = "stopped", time.monotonic()
        again = chaos.run(name, resume=True, limit_s=CELL_S, overrides=overrides)
        resumed_s = time.monotonic() - began
        if again.state != "finished":
            return Cell(what, f"resumed: {again.state}", again.cause, outcome.seconds, resumed_s)
    if result(chaos.out(name)) != expected:
        verdict = "another end than the undisturbed run's"
    elif left := chaos.left(name):
        verdict = f"left: {left[:3]}"
    return Cell(what, verdict, outcome.cause, outcome.seconds, resumed_s)


def tell(cell: Cell) -> None:
    sys.stdout.write(f"{cell.verdict:8} {cell.seconds:6.1f} s  {cell.fault}  {cell.cause[:160]}\n")
    sys.stdout.flush()


def claim(text: str, cells: list[Cell]) -> Claim:
    held, stopped = (sum(cell.verdict == verdict for cell in cells) for verdict in ("held", "stopped"))
    wrong = [f"{cell.fault}: {cell.verdict}" for cell in cells if not cell.right]
    measured = f"{len(cells)} run, {held} held, {stopped} stopped and resumed, {len(wrong)} wrong"
    return Claim(text, "; ".join([measured, *wrong]), bool(cells) and not wrong)
