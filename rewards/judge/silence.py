"""For how long an endpoint has not answered anything."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection

from rewards.judge.messages import JudgeReply, JudgeRequest, Outcome
from rewards.judge.protocols import Asker


class Silence:
    """An asker around another that keeps count. Answers from the cache say nothing about the endpoint.

    Silence begins with the first failed or cancelled question since the last answer, at the time that question
    was put: time in which nothing was asked is not counted.
    """

    def __init__(
        self,
        asker: Asker,
        failures: Collection[Outcome],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._asker = asker
        self._failures = failures
        self._clock = clock
        self._heard = -float("inf")
        self._since: float | None = None
        self.detail = "none"

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        """The other asker's reply."""
        began = self._clock()
        try:
            reply = await self._asker.ask(request)
        except asyncio.CancelledError:
            self._unheard(began, "cancelled before it was answered")
            raise
        if reply.outcome in self._failures:
            self._unheard(began, f"{reply.outcome}: {reply.detail}")
        elif not reply.cached:
            self._heard, self._since = self._clock(), None
        return reply

    def seconds(self) -> float:
        """Seconds of silence up to now; 0 after an answer."""
        return 0.0 if self._since is None else self._clock() - self._since

    def _unheard(self, began: float, detail: str) -> None:
        self.detail = detail
        if self._since is None:
            self._since = max(began, self._heard)
