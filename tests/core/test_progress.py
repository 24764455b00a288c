"""A bar on a terminal, few lines in a job's log."""

import io
import logging

import pytest

from core.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="core.progress")
    return caplog


def test_a_log_gets_a_line_every_so_often(clock: Clock, lines: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    progress = Progress(every=10.0, stream=stream, clock=clock)
    with progress.phase("rollout", total=64, unit="image") as bar:
        for _ in range(16):
            clock.now += 2.0
            bar.advance(4)
        assert (bar.done, bar.seconds, bar.rate) == (64, 32.0, 2.0)
    assert lines.messages == [
        "rollout: 20/64 images, 2.0 images/s, 22 s left",
        "rollout: 40/64 images, 2.0 images/s, 12 s left",
        "rollout: 60/64 images, 2.0 images/s, 2 s left",
    ]
    assert stream.getvalue() == "", "no carriage returns in a log"


def test_short_phases_share_the_lines_of_their_name(clock: Clock, lines: pytest.LogCaptureFixture) -> None:
    progress = Progress(every=10.0, stream=io.StringIO(), clock=clock)
    for _ in range(11):
        with progress.phase("update", total=8, unit="sample") as bar:
            clock.now += 2.0
            bar.advance(8)
    assert lines.messages == ["update: 8/8 samples in 2.0 s, 4.0 samples/s"] * 3


def test_overlapping_phases_do_not_silence_each_other(clock: Clock, lines: pytest.LogCaptureFixture) -> None:
    progress = Progress(every=10.0, stream=io.StringIO(), clock=clock)
    with (
        progress.phase("rollout", total=2, unit="image") as rollout,
        progress.phase("reward", total=2, unit="image") as reward,
    ):
        clock.now += 20.0
        rollout.advance()
        reward.advance()
    assert [message.split(":")[0] for message in lines.messages] == ["rollout", "reward"]


def test_a_failed_phase_does_not_claim_its_end(clock: Clock, lines: pytest.LogCaptureFixture) -> None:
    progress = Progress(stream=io.StringIO(), clock=clock)
    with pytest.raises(RuntimeError), progress.phase("evaluate", total=2, unit="image"):
        raise RuntimeError
    assert lines.messages == []


def test_no_time_has_no_rate(clock: Clock) -> None:
    with Progress(stream=io.StringIO(), clock=clock).phase("update", total=1, unit="sample") as bar:
        bar.advance()
        assert bar.rate == 0.0


def test_a_terminal_gets_a_bar(clock: Clock, lines: pytest.LogCaptureFixture) -> None:
    terminal = Terminal()
    with Progress(stream=terminal, clock=clock).phase("rollout", total=8, unit="image") as bar:
        bar.advance(8)
        assert bar.done == 8
    assert "rollout:" in terminal.getvalue() and "image/s" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r"), "the bar goes away when the phase ends"
    assert lines.messages == []
