"""What the tests of the judge's client ask, and a clock that they turn themselves."""

from __future__ import annotations

import asyncio
from typing import Any

from PIL import Image

from rewards.judge.client import JudgeClient
from rewards.judge.limits import Clock
from rewards.judge.messages import JudgeReply, JudgeRequest
from rewards.judge.settings import JudgeSettings

TEMPLATE_SHA256 = "ab" * 32


def picture(grey: int = 128, size: tuple[int, int] = (16, 12)) -> Image.Image:
    """A flat picture with one pixel that tells up from down and left from right."""
    image = Image.new("RGB", size, (grey, grey, grey))
    image.putpixel((1, 0), (255, 0, 7))
    return image


def question(text: str = "content - how much", **changes: Any) -> JudgeRequest:
    """One text and one picture."""
    fields: dict[str, Any] = {
        "template": "test.v1",
        "template_sha256": TEMPLATE_SHA256,
        "system": "You grade.",
        "parts": (text, picture()),
        "instruction": "a red square",
        "max_tokens": 64,
    }
    return JudgeRequest(**fields | changes)


def settings_for(server: Any, **changes: Any) -> JudgeSettings:
    """A local endpoint without a key, with waits too short to notice."""
    fields: dict[str, Any] = {
        "model": "judge",
        "base_url": server.base_url,
        "api_key_env": None,
        "attempts": 3,
        "longest_wait_s": 0.02,
        "timeout_s": 10.0,
        "queue_timeout_s": 20.0,
    }
    return JudgeSettings(**fields | changes)


def ask(settings: JudgeSettings, *requests: JudgeRequest, clock: Clock | None = None) -> list[JudgeReply]:
    """Ask all at once with a client of their own, under an event loop of its own; waits pass at once."""

    async def go() -> list[JudgeReply]:
        client = JudgeClient(settings, clock=clock or TurnedClock().clock)
        try:
            return await asyncio.gather(*(client.ask(request) for request in requests))
        finally:
            await client.close()

    return asyncio.run(go())


class TurnedClock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.clock = Clock(now=lambda: self.time, sleep=self._sleep)

    async def _sleep(self, seconds: float) -> None:
        self.time += seconds
        await asyncio.sleep(0)
