"""Ctrl-C and SIGTERM: the first asks a run to end where nothing is lost, a second one ends the process at once.

first signal ──► KeyboardInterrupt, inside `protected` where the block ends ──► save, end the actors, exit
second signal ──► `leave`; the limit has passed ──► `late`
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRun(Exception):
    """A run that is to end as at a signal, saved and to be continued, by its own decision; the text is the cause."""


class Stopping:
    """Holds both signals between `install` and `restore`.

    limit_s: seconds that a run may take for its orderly end. leave: ends the process, given the reason. heard: called
    with the number of each signal that arrives, in its handler.
    """

    def __init__(self, limit_s: float, leave: Callable[[str], None], heard: Callable[[int], None]):
        self.limit_s, self._leave, self._heard = limit_s, leave, heard
        self.signal: signal.Signals | None = None
        self._deadline, self._depth, self._pid = float("inf"), 0, os.getpid()
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Take both signals over; nothing outside the main thread, where Python takes none."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextmanager
    def protected(self) -> Iterator[None]:
        """A block that no signal interrupts; one that came raises KeyboardInterrupt where the outermost block ends."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self.signal is not None and not self._depth:
            raise KeyboardInterrupt

    @property
    def late(self) -> bool:
        """Whether the limit has passed. To be looked at from a thread of its own: the main one may hang."""
        return time.monotonic() > self._deadline

    def _receive(self, number: int, frame: Any) -> None:
        if os.getpid() != self._pid:  # a forked child, which ends with its parent
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        first = self.signal is None
        self.signal = self.signal or signal.Signals(number)
        self._heard(number)
        if not first:
            self._leave("a second signal came")
        self._deadline = time.monotonic() + self.limit_s
        if not self._depth:
            raise KeyboardInterrupt
