"""The endpoint's side of the client: one `openai` client per replica, one HTTP request at a time per call."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from typing import Any

from rewards.judge.messages import Outcome
from rewards.judge.settings import JudgeSettings
from rewards.judge.wire import Attempt, read_completion, read_error

HIDDEN = "<key>"
DETAIL_LENGTH = 400


class MissingKeyError(Exception):
    """The environment variable that the recipe names is not set."""


class Endpoint:
    """The connections of one event loop, one client per replica."""

    def __init__(self, settings: JudgeSettings) -> None:
        """Takes about a second the first time, since it imports `openai`; call it away from the event loop."""
        import openai
        import openai.resources.chat  # noqa: F401  (else the first request would wait for it)

        self._settings = settings
        # Without a key the header is left out, also where an OPENAI_API_KEY happens to be set.
        self._headers: Any = None if settings.api_key_env else {"Authorization": openai.Omit()}
        self._clients = [
            openai.AsyncOpenAI(
                api_key=self._key if settings.api_key_env else "none",
                base_url=url,
                max_retries=0,
                timeout=settings.timeout_s,
            )
            for url in settings.base_urls
        ]

    async def send(self, arguments: dict[str, Any], *, turn: int, top_logprobs: int) -> Attempt:
        """One HTTP request within `timeout_s`, body included, to the replica whose turn it is.

        Raises nothing but cancellation.
        """
        number = turn % len(self._clients)
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                completion = await self._clients[number].chat.completions.create(
                    **arguments, extra_headers=self._headers
                )
            attempt = read_completion(completion, top_logprobs=top_logprobs)
        except Exception as error:  # the library and its transport may raise anything
            attempt = read_error(error)
        if attempt.outcome is Outcome.OK:
            return attempt
        return dataclasses.replace(attempt, detail=f"{self._settings.base_urls[number]}: {attempt.detail}")

    async def close(self) -> None:
        """Close the connections."""
        for client in self._clients:
            await client.close()

    async def _key(self) -> str:
        return read_key(self._settings)


def read_key(settings: JudgeSettings) -> str:
    """The key as the environment has it now, "" where none is needed. Raises MissingKeyError."""
    if not settings.api_key_env:
        return ""
    key = os.environ.get(settings.api_key_env, "").strip()
    if not key:
        raise MissingKeyError(
            f"environment variable {settings.api_key_env} is not set in this process; set it to the key of "
            f"{settings.base_urls[0]}, or set api_key_env to null where no key is needed"
        )
    return key


def scrub(text: str, settings: JudgeSettings) -> str:
    """The text in one line, at most DETAIL_LENGTH long, without the key."""
    key = os.environ.get(settings.api_key_env or "", "").strip()
    text = text.replace(key, HIDDEN) if key else text
    text = " ".join(text.split())
    return text if len(text) <= DETAIL_LENGTH else f"{text[:DETAIL_LENGTH]} ..."
