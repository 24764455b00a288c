"""The time-line of a run: who did what when, by worker and step, with idle shares."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, get_args

from core.spans import SPANS_FILE, Span, SpanName, idle_shares
from rl.report.reading import Notes, Record, thinned
from rl.report.runs import Run

KINDS: tuple[str, ...] = get_args(SpanName)
_ROLES = {"rollout": "rollout", "reward": "reward", "update": "learner"}
_ORDER = ("controller", "rollout", "reward", "learner")
CONTROLLER = "controller"


def parse_spans(records: Sequence[Record], notes: Notes) -> list[Span]:
    """The spans of the records of spans.jsonl; a record that is none is left out with a note."""
    spans: list[Span] = []
    for record in records:
        try:
            spans.append(Span(**record))
        except (TypeError, ValueError):
            notes.append(f"{SPANS_FILE}: a record of step {record['step']} is no span and left out")
    return spans


def timeline(run: Run, spans: Sequence[Span], most_spans: int) -> dict[str, Any]:
    """Rows by worker, and the spans of each step as `[row, kind, start, length]` in milliseconds of working time.

    Working time leaves out the pauses in which no step was under way (a run stopped and resumed later). Where
    there are more than `most_spans`, an even choice of the steps is kept, with a note. The controller waits for
    others most of the time, so it has no idle share.
    """
    shares = idle_shares(list(spans))
    roles = _roles(spans)
    workers = sorted(
        shares, key=lambda worker: _ORDER.index(roles[worker])
    )  # stable: natural order within a role
    counts: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    for worker in workers:
        role = roles[worker]
        idle = None if role == CONTROLLER else round(shares[worker], 4)
        rows.append({"worker": worker, "role": role, "label": f"{role} {counts[role]}", "idle": idle})
        counts[role] += 1
    for row in rows:
        if counts[row["role"]] == 1:
            row["label"] = row["role"]
    number = {worker: i for i, worker in enumerate(workers)}
    by_step: dict[int, list[Span]] = defaultdict(list)
    for span in spans:
        by_step[span.step].append(span)
    working = _WorkingTime(spans)
    kept = sorted(by_step)
    if len(spans) > most_spans:
        kept = thinned(kept, max(2, most_spans * len(kept) // len(spans)))
        run.notes.append(f"the time-line shows {len(kept)} of {len(by_step)} steps; trace.json has all")
    return {
        "kinds": KINDS,
        "rows": rows,
        "complete": len(kept) == len(by_step),
        "steps": [
            {
                "step": step,
                "spans": [
                    [
                        number[span.worker],
                        KINDS.index(span.name),
                        round(1000 * working.at(span.start)),
                        round(1000 * (span.end - span.start)),
                    ]
                    for span in sorted(by_step[step], key=lambda span: span.start)
                ],
            }
            for step in kept
        ],
    }


def _roles(spans: Sequence[Span]) -> dict[str, str]:
    """Worker -> the role whose work it does most."""
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for span in spans:
        kinds[span.worker][_ROLES.get(span.name, CONTROLLER)] += 1
    return {worker: found.most_common(1)[0][0] for worker, found in kinds.items()}


class _WorkingTime:
    """Seconds since the first start, less the pauses between steps."""

    def __init__(self, spans: Sequence[Span]):
        windows: dict[int, tuple[float, float]] = {}
        for span in spans:
            start, end = windows.get(span.step, (span.start, span.end))
            windows[span.step] = (min(start, span.start), max(end, span.end))
        self._starts: list[tuple[float, float]] = []
        reached, pauses = None, 0.0
        for start, end in sorted(windows.values()):
            if reached is None or start > reached:
                pauses += start - (start if reached is None else reached)
                self._starts.append((start, pauses))
            reached = end if reached is None else max(reached, end)
        self._origin = self._starts[0][0] if self._starts else 0.0

    def at(self, moment: float) -> float:
        pauses = next(pauses for start, pauses in reversed(self._starts) if start <= moment)
        return moment - self._origin - pauses
