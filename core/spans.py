"""When each worker did what: the time-line of a run, as records, as a Chrome trace, and as idle shares.

`trace.json` opens in chrome://tracing and in Perfetto.
"""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from core.records import read_records

SPANS_FILE = "spans.jsonl"

SpanName = Literal["rollout", "reward", "update", "publish", "evaluate", "checkpoint"]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Span:
    """One piece of work of one worker, `start` to `end` in Unix seconds, within global step `step`.

    Spans of workers on different nodes line up as well as the nodes' clocks do.
    """

    name: SpanName
    worker: str
    start: float
    end: float
    step: int

    def __post_init__(self) -> None:
        if self.name not in get_args(SpanName):
            raise ValueError(f"span name {self.name!r} is not one of {', '.join(get_args(SpanName))}")
        if self.end < self.start:
            raise ValueError(
                f"span {self.name!r} of {self.worker} ends {self.start - self.end} s before its start"
            )


@contextmanager
def timed(name: SpanName, worker: str, step: int, add: Callable[[Span], None]) -> Iterator[None]:
    """Hand the span of the `with` block to `add`, also when the block raises.

    Its length comes from the monotonic clock, so that a clock set back meanwhile cannot make it negative.
    """
    start, began = time.time(), time.perf_counter()
    try:
        yield
    finally:
        add(Span(name, worker, start, start + time.perf_counter() - began, step))


def read_spans(path: Path) -> list[Span]:
    """The spans of a `spans.jsonl`; raises ValueError as `core.records.read_records` does."""
    return [Span(**record) for record in read_records(path)]


def chrome_trace(spans: list[Span]) -> dict[str, Any]:
    """The spans in the Chrome trace event format: one row per worker, microseconds from the first start."""
    rows = {
        worker: row
        for row, worker in enumerate(sorted({span.worker for span in spans}, key=_natural), start=1)
    }
    origin = min((span.start for span in spans), default=0.0)
    events: list[dict[str, Any]] = []
    for worker, row in rows.items():
        common = {"ph": "M", "pid": 1, "tid": row}
        events.append({**common, "name": "thread_name", "args": {"name": worker}})
        events.append({**common, "name": "thread_sort_index", "args": {"sort_index": row}})
    for span in sorted(spans, key=lambda span: span.start):
        events.append(
            {
                "name": span.name,
                "cat": span.name,
                "ph": "X",
                "pid": 1,
                "tid": rows[span.worker],
                "ts": round((span.start - origin) * 1e6),
                "dur": round((span.end - span.start) * 1e6),
                "args": {"step": span.step},
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def idle_shares(spans: list[Span]) -> dict[str, float]:
    """Worker -> share of the run's working time in which it did nothing, 0 to 1, workers in natural order.

    Working time is the union over steps of the time from a step's first start to its last end: a pause
    between two runs of a resumed job is nobody's idleness, and steps that overlap count once. A worker's own
    overlapping spans count once as well.
    """
    by_step: dict[int, list[Span]] = defaultdict(list)
    by_worker: dict[str, list[Interval]] = defaultdict(list)
    for span in spans:
        by_step[span.step].append(span)
        by_worker[span.worker].append((span.start, span.end))
    windows = [(min(s.start for s in group), max(s.end for s in group)) for group in by_step.values()]
    total = _union_length(windows)
    if total == 0:
        return dict.fromkeys(sorted(by_worker, key=_natural), 0.0)
    return {
        worker: 1 - _union_length(by_worker[worker]) / total for worker in sorted(by_worker, key=_natural)
    }


def _union_length(intervals: list[Interval]) -> float:
    """Seconds covered by at least one of the intervals."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def _natural(worker: str) -> list[tuple[int, str]]:
    """Sort key that puts rollout-2 before rollout-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", worker)]
