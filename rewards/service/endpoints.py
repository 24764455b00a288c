"""The URLs of one served reward: which is asked next, which is left alone for a while, and how one is asked."""

from __future__ import annotations

import asyncio
import math
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from rewards.answers import PLAIN, limit_answer
from rewards.base import FatalRewardError
from rewards.service.faults import Away

CONNECT_S = 5.0
DOWN_S = 1.0
POLL_S = 1.0


@dataclass
class Endpoint:
    """One service. `fault` is empty while it is up, else why it is not; it is not asked before `down_until`, which is
    `rest_s` after it was last given back."""

    url: str
    in_flight: int = 0
    fault: str = ""
    rest_s: float = 0.0
    down_until: float = 0.0


class Endpoints:
    """Least in flight first, in turn among equals. Safe to use from several event loops and threads."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.all = [Endpoint(url) for url in urls]
        self._next = 0
        self._lock = threading.Lock()

    @contextmanager
    def borrow(self) -> Iterator[Endpoint | None]:
        """The endpoint to ask now, or None while all are down.

        One that is down and due comes first, and no other caller gets it meanwhile: who borrows it finds out
        whether it is back.
        """
        with self._lock:
            endpoint = self._choose()
        try:
            yield endpoint
        finally:
            if endpoint is not None:
                with self._lock:
                    endpoint.in_flight -= 1
                    if endpoint.fault:  # also when the borrower was cancelled before it found out
                        endpoint.down_until = time.monotonic() + max(DOWN_S, endpoint.rest_s)

    def failed(self, endpoint: Endpoint, fault: str, rest_s: float = 0.0) -> None:
        """Leave it alone until `rest_s` after it is given back, and a second at least."""
        with self._lock:
            endpoint.fault, endpoint.rest_s, endpoint.down_until = fault, rest_s, math.inf

    def doubt(self, endpoint: Endpoint, fault: str) -> None:
        """Whoever borrows it next looks at it first."""
        with self._lock:
            endpoint.fault, endpoint.rest_s, endpoint.down_until = fault, 0.0, 0.0

    def works(self, endpoint: Endpoint) -> None:
        """Give it calls again."""
        with self._lock:
            endpoint.fault = ""

    def wait_s(self) -> float:
        """Seconds until an endpoint may be due: 0 to 1, for another caller may be asking it just now."""
        now = time.monotonic()
        soonest = min(e.down_until - now if e.fault else 0.0 for e in self.all)
        return min(max(soonest, 0.0), DOWN_S)

    def faults(self) -> str:
        """Every endpoint with why it does not answer."""
        return ", ".join(f"{e.url} ({e.fault or 'answered last'})" for e in self.all)

    def _choose(self) -> Endpoint | None:
        now = time.monotonic()
        turn = self.all[self._next :] + self.all[: self._next]
        due = [e for e in turn if e.fault and e.down_until <= now]
        candidates = due or [e for e in turn if not e.fault]
        if not candidates:
            return None
        chosen = min(candidates, key=lambda e: e.in_flight)
        self._next = (self.all.index(chosen) + 1) % len(self.all)
        chosen.in_flight += 1
        if chosen.fault:
            chosen.down_until = math.inf
        return chosen


class Connections:
    """An HTTP client for each event loop: a connection must not outlive the loop that opened it."""

    def __init__(self, *, keepalive_s: float) -> None:
        """`keepalive_s`: less than the server's own, or it closes a connection that is just taken again."""
        self._keepalive_s = keepalive_s
        self._clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = (
            weakref.WeakKeyDictionary()
        )

    def client(self) -> httpx.AsyncClient:
        """That of the running loop. It limits only how long connecting takes and how large an answer is."""
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            self._clients[loop] = httpx.AsyncClient(
                timeout=httpx.Timeout(None, connect=CONNECT_S),
                limits=httpx.Limits(max_connections=None, keepalive_expiry=self._keepalive_s),
                headers=PLAIN,
                event_hooks={"response": [limit_answer]},
                trust_env=False,
            )
        return self._clients[loop]

    async def request(
        self, method: str, endpoint: Endpoint, path: str, limit_s: float, **content: Any
    ) -> httpx.Response:
        """Whatever the endpoint answers. Raises Away where nothing comes within the limit."""
        try:
            async with asyncio.timeout(limit_s):
                return await self.client().request(method, endpoint.url + path, **content)
        except TimeoutError as error:
            raise Away(f"no answer to {path} in {limit_s:g} s") from error
        except httpx.RequestError as error:
            raise Away(f"{type(error).__name__}: {error}".removesuffix(": ")) from error


async def wait_until(verify: Callable[[], Awaitable[None]], limit_s: float) -> Exception | None:
    """Call `verify` until it raises nothing. What keeps it from that: a FatalRewardError, or Away after the limit."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            await verify()
            return None
        except FatalRewardError as error:
            return error
        except Away as error:
            if time.monotonic() >= deadline:
                return error
            wait_s = max(POLL_S, error.retry_after_s)
        await asyncio.sleep(min(wait_s, max(0.0, deadline - time.monotonic())))


def url_problem(url: str) -> str:
    """Why `url` cannot be the root of a service, or an empty string."""
    if "@" in url:
        return "a URL holds a user or password, which does not belong in a recipe"
    try:
        parts = urlsplit(url)
        port = parts.port  # raises for a number out of range
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL) as error:
        return f"{url}: {error}"
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        return f"{url}: write it as http://host:port"
    if parts.query or parts.fragment:
        return f"{url}: leave out what follows ? or #"
    return ""
