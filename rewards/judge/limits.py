"""Limits on asking: requests in flight, requests and tokens per minute, and the pause an endpoint asks for.

A request takes its slot in flight first and then waits for the minute's allowance, first come first served,
so that it is sent the moment it is counted: no 60 s hold more than the allowance. Tokens are counted by an upper
bound until the bill corrects it.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

WINDOW_S = 60.0
RECHECK_S = 1.0
"""A wait is looked at again this often: bills and pauses change it."""


@dataclass(frozen=True)
class Clock:
    """Where the limits take their time from, in seconds."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


@dataclass
class Sent:
    """One request as the window counts it."""

    time: float
    tokens: int


class QueueTimeout(Exception):
    """The request cannot be sent in time. The argument: seconds that were still to wait at least, 0 if not known."""


class RateWindow:
    """What was sent in the last minute. Plain arithmetic on the clock; waiting is the throttle's task.

    A request of more tokens than a minute's allowance counts as the whole allowance.
    """

    def __init__(self, requests: int | None, tokens: int | None, clock: Clock) -> None:
        self._rates = self._requests, self._tokens = requests, tokens
        self._clock = clock
        self._sent: deque[Sent] = deque()
        self._pause_until = 0.0

    def share(self, windows: int) -> None:
        """Allow the n-th part of the rates from now on, and 1 at least: so many windows stand for one endpoint."""
        self._requests, self._tokens = (
            None if rate is None else max(1, rate // windows) for rate in self._rates
        )

    def delay(self, tokens: int) -> float:
        """Seconds until a request of so many tokens may be sent, as things stand; 0 for now."""
        now = self._clock.now()
        while self._sent and now - self._sent[0].time >= WINDOW_S:
            self._sent.popleft()
        free_at = max(now, self._pause_until)
        if self._requests is not None and len(self._sent) >= self._requests:
            free_at = max(free_at, self._sent[-self._requests].time + WINDOW_S)
        if self._tokens is not None:
            excess = sum(sent.tokens for sent in self._sent) + min(tokens, self._tokens) - self._tokens
            for sent in self._sent:
                if excess <= 0:
                    break
                excess -= sent.tokens
                free_at = max(free_at, sent.time + WINDOW_S)
        return free_at - now

    def take(self, tokens: int) -> Sent:
        """Count a request that is sent now."""
        self._sent.append(Sent(self._clock.now(), min(tokens, self._tokens or tokens)))
        return self._sent[-1]

    def pause(self, seconds: float) -> None:
        """Send nothing for so long."""
        self._pause_until = max(self._pause_until, self._clock.now() + seconds)


_SHARED: weakref.WeakValueDictionary[Hashable, RateWindow] = weakref.WeakValueDictionary()


def shared_window(key: Hashable, requests: int | None, tokens: int | None) -> RateWindow:
    """The window of all clients of this process that say the same of the same endpoint."""
    window = _SHARED.get(key)
    if window is None:
        window = _SHARED[key] = RateWindow(requests, tokens, Clock())
    return window


class Throttle:
    """Lets requests of one event loop through, `concurrency` at a time, as the window allows."""

    def __init__(self, concurrency: int, window: RateWindow, clock: Clock) -> None:
        self._slots = asyncio.Semaphore(concurrency)
        self._line = asyncio.Lock()
        self._window, self._clock = window, clock

    @asynccontextmanager
    async def slot(self, tokens: int, limit_s: float) -> AsyncIterator[Sent]:
        """Wait until a request of so many tokens may be sent; it is in flight within the context.

        Set `tokens` of what is returned to the bill when it is known. Raises QueueTimeout after `limit_s` seconds,
        or at once when the window will not open by then.
        """
        deadline = self._clock.now() + limit_s
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(limit_s):
                    await held.enter_async_context(self._slots)
                    async with self._line:
                        while (delay := self._window.delay(tokens)) > 0:
                            if self._clock.now() + delay > deadline:
                                raise QueueTimeout(delay)
                            await self._clock.sleep(min(delay, RECHECK_S))
                        sent = self._window.take(tokens)
            except TimeoutError:
                raise QueueTimeout(0.0) from None
            yield sent
