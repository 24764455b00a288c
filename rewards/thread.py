"""Runs a blocking reward beside the event loop, one call at a time and under a time limit."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class RewardThread:
    """One call of a blocking function at a time.

    Most rewards are not written for several threads at once (a torch model, a cache), so calls queue here.
    The time limit runs from the start of the call, not from its place in the queue. Python cannot end a
    thread: a call that runs over its limit is left behind, and the next one first waits, at most its own
    limit, for it to end. So a function that hangs for ever holds one thread, however many calls follow. The
    thread is a daemon, which lets the process exit.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._running: Future[tuple[Any, BaseException | None]] | None = None

    async def run(self, call: Callable[[], Any], timeout_s: float) -> Any:
        """The result of `call`. Raises what it raised, or TimeoutError after `timeout_s` seconds."""
        async with self._turn:
            if self._running is not None:
                async with asyncio.timeout(timeout_s):
                    await asyncio.wrap_future(self._running)
            self._running = _start(call)
            async with asyncio.timeout(timeout_s):
                result, error = await asyncio.wrap_future(self._running)
        if error is not None and not isinstance(error, Exception):
            raise RuntimeError(f"the reward tried to end the process: {error!r}") from error
        if error is not None:
            raise error
        return result


def _start(call: Callable[[], Any]) -> Future[tuple[Any, BaseException | None]]:
    """Run `call` in a new thread. The future ends with (result, error), so waiting on it never raises."""
    future: Future[tuple[Any, BaseException | None]] = Future()
    future.set_running_or_notify_cancel()  # a running future ignores the cancellation that a time-out sends

    def work() -> None:
        try:
            future.set_result((call(), None))
        except BaseException as error:
            future.set_result((None, error))

    threading.Thread(target=work, name="reward", daemon=True).start()
    return future
