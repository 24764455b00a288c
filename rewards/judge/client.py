"""Asks the judge: cache, coalescing, limits, budget and retries around one chat completion."""

from __future__ import annotations

from rewards.judge.messages import JudgeReply, JudgeRequest
from rewards.judge.settings import JudgeSettings


class JudgeClient:
    """Answers questions from the cache or the endpoint. Every failure is an `Outcome`, never an exception.

    Light to make: nothing is opened or imported before the first question. Works under one event loop after
    another; close it at the end of each.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        """Raises ValueError with all of `settings.problems()`."""
        raise NotImplementedError

    def problems(self) -> list[str]:
        """What can be known without network: a missing key, a cache or ledger that cannot be used."""
        raise NotImplementedError

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        """Ends within `settings.longest_ask_s`."""
        raise NotImplementedError

    async def close(self) -> None:
        """Close this event loop's connections; the client can be used again afterwards."""
        raise NotImplementedError
