"""The time-line of a run: records, Chrome trace and idle shares, against worked cases."""

import json

import pytest

from core.spans import Span, chrome_trace, idle_shares, timed


def test_bad_spans_are_refused() -> None:
    with pytest.raises(ValueError, match="'sampling' is not one of rollout, reward, update"):
        Span("sampling", "rollout-0", 0.0, 1.0, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ends 1.0 s before its start"):
        Span("rollout", "rollout-0", 2.0, 1.0, 1)


def test_timed_appends_also_when_the_block_raises() -> None:
    spans: list[Span] = []
    with pytest.raises(RuntimeError), timed("publish", "learner-0", 7, spans.append):
        raise RuntimeError
    (span,) = spans
    assert (span.name, span.worker, span.step) == ("publish", "learner-0", 7) and span.end >= span.start


def test_a_clock_set_back_does_not_make_a_span_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    wall, monotonic = iter([100.0, 50.0]), iter([1.0, 3.0])
    monkeypatch.setattr("core.spans.time.time", lambda: next(wall))
    monkeypatch.setattr("core.spans.time.perf_counter", lambda: next(monotonic))
    spans: list[Span] = []
    with timed("update", "learner-0", 1, spans.append):
        pass
    assert spans == [Span("update", "learner-0", 100.0, 102.0, 1)]


def test_idle_shares_of_a_worked_case() -> None:
    spans = [
        # Step 1 lasts from 0 to 10.
        Span("rollout", "rollout-0", 0, 6, 1),
        Span("rollout", "rollout-10", 0, 4, 1),
        Span("rollout", "rollout-2", 0, 5, 1),
        Span("reward", "reward-0", 2, 5, 1),
        Span("reward", "reward-0", 4, 7, 1),  # overlaps the one before: busy from 2 to 7
        Span("update", "learner-0", 7, 10, 1),
        # A pause of 990 s between two runs belongs to nobody; step 2 lasts from 1000 to 1010.
        Span("rollout", "rollout-0", 1000, 1010, 2),
    ]
    shares = idle_shares(spans)
    assert list(shares) == ["learner-0", "reward-0", "rollout-0", "rollout-2", "rollout-10"]
    assert shares == pytest.approx(
        {
            "rollout-0": 4 / 20,
            "rollout-2": 15 / 20,
            "rollout-10": 16 / 20,
            "reward-0": 15 / 20,
            "learner-0": 17 / 20,
        }
    )


def test_steps_that_overlap_count_once() -> None:
    spans = [Span("rollout", "a", 0, 6, 1), Span("update", "b", 6, 8, 1), Span("rollout", "a", 6, 10, 2)]
    assert idle_shares(spans) == pytest.approx({"a": 0.0, "b": 0.8})


def test_idle_shares_without_time() -> None:
    assert idle_shares([]) == {}
    assert idle_shares([Span("publish", "a", 1.0, 1.0, 1)]) == {"a": 0.0}


def test_the_chrome_trace_has_a_named_row_per_worker() -> None:
    spans = [Span("update", "learner-0", 1003.0, 1003.5, 1), Span("rollout", "rollout-0", 1000.0, 1002.25, 1)]
    trace = json.loads(json.dumps(chrome_trace(spans)))
    rows = {
        event["tid"]: event["args"]["name"]
        for event in trace["traceEvents"]
        if event["name"] == "thread_name"
    }
    drawn = [
        (event["name"], rows[event["tid"]], event["ts"], event["dur"], event["args"]["step"])
        for event in trace["traceEvents"]
        if event["ph"] == "X"
    ]
    assert drawn == [
        ("rollout", "rollout-0", 0, 2_250_000, 1),
        ("update", "learner-0", 3_000_000, 500_000, 1),
    ]
    assert chrome_trace([])["traceEvents"] == []
