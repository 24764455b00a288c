"""Time limits of an async reward's calls, which overlap: one that may be waiting for others has time for these too."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class _UnderWay:
    limit: asyncio.Timeout
    timeout_s: float
    loop: asyncio.AbstractEventLoop


class OverlappingCalls:
    """The calls of one async reward that are under way.

    Such a reward may have its calls take turns, on a lock or at an endpoint, and nobody sees when the work of one
    begins. So a call has its limit once for itself and once for every call before it, and gives back what these leave:
    by the time they have all ended it has its limit from then on, as if its clock had started with its work.
    """

    def __init__(self) -> None:
        self._calls: list[_UnderWay] = []

    async def run(self, call: Callable[[], Awaitable[Any]], timeout_s: float) -> Any:
        """The result of `call`. Raises what it raised, or TimeoutError."""
        loop = asyncio.get_running_loop()
        own = _UnderWay(asyncio.timeout(None), timeout_s, loop)
        async with own.limit:
            own.limit.reschedule(
                loop.time() + timeout_s + sum(c.timeout_s for c in self._calls if c.loop is loop)
            )
            self._calls.append(own)
            try:
                return await call()
            finally:
                self._end(own)

    def _end(self, own: _UnderWay) -> None:
        later = self._calls.index(own)
        del self._calls[later]
        deadline = own.loop.time() + sum(c.timeout_s for c in self._calls[:later] if c.loop is own.loop)
        for call in self._calls[later:]:
            if call.loop is own.loop:
                deadline += call.timeout_s
                if not call.limit.expired():
                    call.limit.reschedule(min(deadline, call.limit.when() or deadline))
