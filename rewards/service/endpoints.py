"""The URLs of one served reward: which is asked next, and which is left alone for a while."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

DOWN_S = 1.0


@dataclass
class Endpoint:
    """One service. `fault` is empty while it is up, else why it is not; it is not asked before `down_until`."""

    url: str
    in_flight: int = 0
    fault: str = ""
    down_until: float = 0.0


class Endpoints:
    """Least in flight first, in turn among equals. Safe to use from several event loops and threads."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.all = [Endpoint(url) for url in urls]
        self._next = 0
        self._lock = threading.Lock()

    @contextmanager
    def borrow(self) -> Iterator[Endpoint | None]:
        """The endpoint to ask now, or None while all are down.

        One that is down and due comes first, and no other caller gets it meanwhile: who borrows it finds out
        whether it is back.
        """
        with self._lock:
            endpoint = self._choose()
        try:
            yield endpoint
        finally:
            if endpoint is not None:
                with self._lock:
                    endpoint.in_flight -= 1
                    if endpoint.fault:  # also when the borrower was cancelled before it found out
                        endpoint.down_until = time.monotonic() + DOWN_S

    def failed(self, endpoint: Endpoint, fault: str) -> None:
        """Leave it alone until a second after it is given back."""
        with self._lock:
            endpoint.fault, endpoint.down_until = fault, math.inf

    def works(self, endpoint: Endpoint) -> None:
        """Give it calls again."""
        with self._lock:
            endpoint.fault = ""

    def wait_s(self) -> float:
        """Seconds until an endpoint may be due: 0 to 1, for another caller may be asking it just now."""
        now = time.monotonic()
        soonest = min(e.down_until - now if e.fault else 0.0 for e in self.all)
        return min(max(soonest, 0.0), DOWN_S)

    def faults(self) -> str:
        """Every endpoint with why it does not answer."""
        return ", ".join(f"{e.url} ({e.fault or 'answered last'})" for e in self.all)

    def _choose(self) -> Endpoint | None:
        now = time.monotonic()
        turn = self.all[self._next :] + self.all[: self._next]
        due = [e for e in turn if e.fault and e.down_until <= now]
        candidates = due or [e for e in turn if not e.fault]
        if not candidates:
            return None
        chosen = min(candidates, key=lambda e: e.in_flight)
        self._next = (self.all.index(chosen) + 1) % len(self.all)
        chosen.in_flight += 1
        if chosen.fault:
            chosen.down_until = math.inf
        return chosen
