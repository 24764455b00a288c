"""Time limits of an async reward's calls, which overlap: one that may be waiting for others has time for these too."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary


@dataclass(eq=False)
class _UnderWay:
    limit: asyncio.Timeout
    timeout_s: float


class OverlappingCalls:
    """The calls of one async reward that are under way.

    Such a reward may have its calls take turns, on a lock or at an endpoint, and nobody sees when the work of one
    begins. So a call has its limit once for itself and once for every call before it, and gives back what these leave:
    by the time they have all ended it has its limit from then on, as if its clock had started with its work.
    """

    def __init__(self) -> None:
        # Of each event loop its own, which no other thread touches.
        self._of_loop = WeakKeyDictionary[asyncio.AbstractEventLoop, list[_UnderWay]]()

    async def run(self, call: Callable[[], Awaitable[Any]], timeout_s: float) -> Any:
        """The result of `call`. Raises what it raised, or TimeoutError."""
        loop = asyncio.get_running_loop()
        calls = self._of_loop.setdefault(loop, [])
        own = _UnderWay(asyncio.timeout(None), timeout_s)
        async with own.limit:
            own.limit.reschedule(loop.time() + timeout_s + sum(c.timeout_s for c in calls))
            calls.append(own)
            try:
                return await call()
            finally:
                _end(own, calls, loop.time())


def _end(own: _UnderWay, calls: list[_UnderWay], now: float) -> None:
    later = calls.index(own)
    del calls[later]
    deadline = now + sum(call.timeout_s for call in calls[:later])
    for call in calls[later:]:
        deadline += call.timeout_s
        if not call.limit.expired():
            call.limit.reschedule(min(deadline, call.limit.when() or deadline))
