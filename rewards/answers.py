"""How large an HTTP answer may be: what asks foreign endpoints must not be filled by one of them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx

MOST_BYTES = 8 * 2**20
"""An answer of 1,024 scores with fifty parts takes one MiB."""
PLAIN = {"accept-encoding": "identity"}
"""Headers to ask with: a compressed answer, whose size nobody knows before it is there, is refused."""


async def limit_answer(response: httpx.Response) -> None:
    """A response hook of an `httpx.AsyncClient`. Raises httpx.DecodingError, also from reading the body."""
    encoding = response.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise httpx.DecodingError(
            f"content-encoding {encoding[:40]!r}, which was not asked for", request=response.request
        )
    assert isinstance(response.stream, httpx.AsyncByteStream)
    response.stream = _Limited(response.stream, response.request)


class _Limited(httpx.AsyncByteStream):
    def __init__(self, stream: httpx.AsyncByteStream, request: httpx.Request) -> None:
        self._stream, self._request = stream, request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for part in self._stream:
            size += len(part)
            if size > MOST_BYTES:
                raise httpx.DecodingError(f"an answer larger than {MOST_BYTES} bytes", request=self._request)
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()
