"""The HTTP side of the served reward: one request per edit, to whichever replica has the least in flight.

| what came back | what follows |
|---|---|
| 200 with K finite numbers | the raw outputs |
| 400, 413, 422 | this edit cannot be scored; no other is touched |
| connection refused, lost or silent, 502, 503, 504 | the replica is away: the request goes to another one |
| 408, 425, 429, a 200 that is no JSON | the same, and it is left alone for as long as its Retry-After asks |
| 500 | the same, and after `SERVER_ERRORS` of them this edit cannot be scored: it may be what brings servers down |
| 404 | another model is served there: the run stops |
| anything else | no vLLM server is there: the run stops |

A replica that was away is asked for its health and for the model it serves before it gets work again. When none has
answered for `unavailable_s`, the run stops and names them all.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import weakref
from collections.abc import Sequence
from typing import Any

import httpx

from rewards.base import FatalRewardError
from rewards.retry_after import retry_after
from rewards.service.endpoints import Connections, Endpoint, Endpoints, wait_until
from rewards.service.faults import NOT_NOW, Away, read_200, read_json

log = logging.getLogger(__name__)

LIST_S = 30.0
SERVER_ERRORS = 3


class Unscorable(Exception):
    """The servers answer, but not with numbers for this edit; says what they answered."""


class _ServerError(Away):
    """HTTP 500: the request or the server is at fault."""


class Replicas:
    """Equal vLLM servers of one model. Usable from one event loop after another; each keeps its connections.

    served_name: the model's name there (see `model_folder.py`). outputs: how many numbers an answer holds.
    """

    def __init__(
        self,
        urls: Sequence[str],
        served_name: str,
        *,
        outputs: int,
        concurrency: int,
        timeout_s: float,
        unavailable_s: float,
    ) -> None:
        self._served_name, self._outputs = served_name, outputs
        self._concurrency, self._timeout_s, self._unavailable_s = concurrency, timeout_s, unavailable_s
        self._endpoints = Endpoints([url.rstrip("/") for url in urls])
        self._connections = Connections(keepalive_s=4)  # vLLM's uvicorn closes after 5 s
        self._places: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
            weakref.WeakKeyDictionary()
        )
        self._silent_since: float | None = None

    async def classify(self, body: dict[str, Any]) -> list[float]:
        """The K raw outputs for one request, from whichever replica answers.

        Raises Unscorable for this edit alone, FatalRewardError when no later call can succeed.
        """
        places = asyncio.Semaphore(self._concurrency)
        async with self._places.setdefault(asyncio.get_running_loop(), places):
            return await self._send(body)

    async def wait_for_all(self) -> list[str]:
        """Wait, `unavailable_s` at most, until every replica serves the model; what is wrong with the others."""
        problems = await asyncio.gather(*(self._wait_for(endpoint) for endpoint in self._endpoints.all))
        return [problem for problem in problems if problem]

    def stop_if_silent(self) -> None:
        """Raises FatalRewardError when no replica has answered for `unavailable_s`."""
        silent = 0.0 if self._silent_since is None else time.monotonic() - self._silent_since
        if silent >= self._unavailable_s:
            raise FatalRewardError(
                f"editreward: no replica answered for unavailable_s={self._unavailable_s:g} s: "
                f"{self._endpoints.faults()}; is `python -m rewards.editreward serve` running?"
            )

    async def _send(self, body: dict[str, Any]) -> list[float]:
        errors: list[str] = []
        while True:
            with self._endpoints.borrow() as endpoint:
                if endpoint is not None:
                    try:
                        return await self._ask(endpoint, body)
                    except Away as error:
                        self._away(endpoint, error)
                        errors += [f"{endpoint.url}: {error}"] if isinstance(error, _ServerError) else []
            if len(errors) >= SERVER_ERRORS:
                raise Unscorable(f"{len(errors)} times: {errors[-1]}")
            self.stop_if_silent()
            await asyncio.sleep(self._endpoints.wait_s())

    def _away(self, endpoint: Endpoint, error: Away) -> None:
        if not endpoint.fault:
            log.warning("editreward: %s is away: %s", endpoint.url, error)
        if self._silent_since is None:
            self._silent_since = time.monotonic()
        self._endpoints.failed(endpoint, str(error), error.retry_after_s)

    async def _ask(self, endpoint: Endpoint, body: dict[str, Any]) -> list[float]:
        """One request. A replica that was away is looked at first: it may serve something else now."""
        if endpoint.fault:
            await self._verify(endpoint)
            self._endpoints.works(endpoint)
            log.info("editreward: %s is back", endpoint.url)
        response = await self._request("POST", endpoint, "/classify", self._timeout_s, body)
        answer = read_200(response)
        self._silent_since = None
        if response.status_code == 200:
            return self._numbers(answer, endpoint.url)
        said = f"HTTP {response.status_code}: {_message(response)}"
        if response.status_code in (400, 413, 422):
            raise Unscorable(f"{endpoint.url}: {said}")
        if response.status_code == 404:
            await self._verify(endpoint)
        raise FatalRewardError(f"editreward: {endpoint.url} answered {said}; is it a vLLM server?")

    def _numbers(self, answer: Any, url: str) -> list[float]:
        """Raises FatalRewardError for an answer of another kind, Unscorable for one that is not finite."""
        data = answer.get("data") if isinstance(answer, dict) else None
        entry = data[0] if isinstance(data, list) and len(data) == 1 else None
        found = entry.get("probs") if isinstance(entry, dict) else None
        if not isinstance(found, list) or len(found) != self._outputs:
            count = f"{len(found)} numbers" if isinstance(found, list) else "none"
            raise FatalRewardError(
                f"editreward: {url} answered with {count} where the model has {self._outputs} outputs"
            )
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in found):
            raise Unscorable(f"{url}: the outputs {found} are not finite")
        return [float(value) for value in found]

    async def _verify(self, endpoint: Endpoint) -> None:
        """Raises Away while nothing answers there, FatalRewardError when another model is served.

        The health first: a server whose engine has died lists its model for a while yet, and fails every request.
        """
        await self._request("GET", endpoint, "/health", LIST_S)
        response = await self._request("GET", endpoint, "/v1/models", LIST_S)
        answer = read_200(response)
        data = answer.get("data") if isinstance(answer, dict) else None
        names = [entry.get("id") for entry in data or [] if isinstance(entry, dict)]
        if response.status_code != 200 or not names:
            raise FatalRewardError(
                f"editreward: {endpoint.url} is no vLLM server (HTTP {response.status_code} to /v1/models)"
            )
        if self._served_name not in names:
            raise FatalRewardError(
                f"editreward: {endpoint.url} serves {', '.join(map(str, names))}, this recipe's model is "
                f"{self._served_name} (named after the export's bytes); serve the very folder that `model` names"
            )

    async def _request(
        self, method: str, endpoint: Endpoint, path: str, limit_s: float, body: dict[str, Any] | None = None
    ) -> httpx.Response:
        """Raises Away for every failure to get an answer, 5xx included, and for what passes."""
        response = await self._connections.request(method, endpoint, path, limit_s, json=body)
        if response.status_code == 500:
            raise _ServerError(f"HTTP 500: {_message(response)}")
        if response.status_code > 500 or response.status_code in NOT_NOW:
            asked_s = retry_after(response.headers, time.time())
            raise Away(f"HTTP {response.status_code}: {_message(response)}", asked_s)
        return response

    async def _wait_for(self, endpoint: Endpoint) -> str:
        error = await wait_until(lambda: self._verify(endpoint), self._unavailable_s)
        if isinstance(error, Away):
            return (
                f"{endpoint.url} did not answer within unavailable_s={self._unavailable_s:g} s ({error}); start "
                "`python -m rewards.editreward serve`"
            )
        return "" if error is None else str(error)


def _message(response: httpx.Response) -> str:
    """vLLM's own sentence, or the start of whatever came."""
    answer = read_json(response)
    error = answer.get("error", answer) if isinstance(answer, dict) else None
    said = error.get("message") if isinstance(error, dict) else None
    return " ".join(str(said or response.text).split())[:400]
