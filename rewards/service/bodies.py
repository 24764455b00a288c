"""Bodies of requests: how large, how slow, and how many of them at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request
from starlette.requests import ClientDisconnect

from rewards.base import RetryableRewardError
from rewards.service.faults import Fault
from rewards.service.wire import MEDIA_TYPE, Cause

BODY_S = 30.0
SLOWEST = 2**20
"""Bytes per second beyond `BODY_S`, for a large body."""


class Bodies:
    """Reads bodies into memory: `room` bytes of all together, and one more of `largest` bytes.

    Who finds the room taken waits, as its client then does. One at a time may read on all the same, so that large
    bodies that came at once do not wait for each other for ever.
    """

    def __init__(self, largest: int, room: int) -> None:
        self._largest, self._free = largest, room
        self._privileged: object | None = None
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytearray]:
        """The body; its place is given back at the end of the context.

        Raises Fault for another content type or a larger body, ClientDisconnect, and RetryableRewardError when it
        takes over `BODY_S` and a second per MiB.
        """
        self._check_head(request)
        body, taken, left_s = bytearray(), 0, BODY_S
        try:
            more = True
            while more:
                part, more, seconds = await _next_part(request, left_s)
                left_s += len(part) / SLOWEST - seconds
                if len(body) + len(part) > self._largest:
                    raise self._too_large()
                if await self._admit(len(part), body):
                    taken += len(part)
                body += part
            yield body
        finally:
            self._free += taken
            if self._privileged is body:
                self._privileged = None
            self._changed.set()

    async def _admit(self, size: int, reader: bytearray) -> bool:
        """Wait for room; True once it is taken, False for the one who needs none."""
        while self._privileged is not reader and self._free < size:
            if self._privileged is None:
                self._privileged = reader
            else:
                self._changed.clear()
                await self._changed.wait()
        if self._privileged is reader:
            return False
        self._free -= size
        return True

    def _check_head(self, request: Request) -> None:
        if request.headers.get("content-type") != MEDIA_TYPE:
            raise Fault(Cause.MALFORMED, f"content-type must be {MEDIA_TYPE}")
        declared = request.headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > self._largest:
            raise self._too_large()

    def _too_large(self) -> Fault:
        return Fault(Cause.TOO_LARGE, f"the request is larger than {self._largest} bytes (--max-request-mb)")


async def _next_part(request: Request, limit_s: float) -> tuple[bytes, bool, float]:
    """What came of the body, whether there is more, and the seconds that it was waited for."""
    start = time.monotonic()
    try:
        async with asyncio.timeout(limit_s):
            message = await request.receive()
    except TimeoutError as error:
        raise RetryableRewardError(
            f"the request did not arrive within {BODY_S:g} s and a second per {SLOWEST} bytes"
        ) from error
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message.get("body", b""), message.get("more_body", False), time.monotonic() - start
