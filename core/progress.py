"""One line of progress per phase: a bar on a terminal, a log line now and then elsewhere (job logs, CI)."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger(__name__)


class Bar:
    """What a phase has done so far; `advance` after every piece of work."""

    def __init__(self, total: int, clock: Callable[[], float], show: Callable[["Bar", int], None]) -> None:
        self.total, self.done = total, 0
        self._clock, self._began, self._show = clock, clock(), show

    @property
    def seconds(self) -> float:
        """Seconds since the phase began."""
        return self._clock() - self._began

    @property
    def rate(self) -> float:
        """Units per second since the phase began; 0 before any time has passed."""
        seconds = self.seconds
        return self.done / seconds if seconds > 0 else 0.0

    def advance(self, n: int = 1) -> None:
        """Count `n` more units as done."""
        self.done += n
        self._show(self, n)


class Progress:
    """Makes the progress lines of a run.

    On a terminal each phase is a tqdm bar that goes away when the phase ends. Elsewhere each phase name logs
    at most one line every `every` seconds, so that many short phases do not flood a job's log.
    """

    def __init__(
        self,
        *,
        every: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._every, self._clock = every, clock
        self._stream = stream if stream is not None else sys.stderr
        self._last_line: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, *, total: int, unit: str) -> Iterator[Bar]:
        """Show progress of `total` units ("image", "sample"; in the singular) while the block runs.

        Phases may overlap: scoring goes on while the rollout does.
        """
        if self._stream.isatty():
            look = {"file": self._stream, "leave": False, "dynamic_ncols": True}
            with logging_redirect_tqdm(), tqdm(total=total, desc=name, unit=unit, **look) as line:
                yield Bar(total, self._clock, lambda _, n: line.update(n))
            return

        def show(bar: Bar, n: int) -> None:
            if bar.done < total and bar.seconds >= self._every:
                left = (total - bar.done) / bar.rate
                self._say(name, f"{bar.done}/{total} {unit}s, {bar.rate:.1f} {unit}s/s, {left:.0f} s left")

        bar = Bar(total, self._clock, show)
        yield bar
        self._say(name, f"{bar.done}/{total} {unit}s in {bar.seconds:.1f} s, {bar.rate:.1f} {unit}s/s")

    def _say(self, name: str, text: str) -> None:
        now = self._clock()
        if now - self._last_line.get(name, float("-inf")) >= self._every:
            self._last_line[name] = now
            logger.info("%s: %s", name, text)
