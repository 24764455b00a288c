"""The reward that a worker calls when a recipe has it served: sends the batch to a service and reads the answer.

A service that is away (connection refused or lost, not ready, silent) is waited for, `service.unavailable_s` long,
within one call: `rewards/scoring.py` sees neither a failure nor an attempt. After that the run stops, naming every
URL. What the reward itself raised comes back as the same class of error that it would be in process.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import httpx
from PIL import Image

from rewards.base import FatalRewardError, RewardOutput, RewardSpec, reward_label
from rewards.loading import RewardSource
from rewards.service.endpoints import Connections, Endpoint, Endpoints, url_problem, wait_until
from rewards.service.faults import Away, read_answer, read_output
from rewards.service.wire import (
    CODECS,
    MEDIA_TYPE,
    Call,
    WireError,
    encode_request,
    fingerprint,
    read_token,
)

logger = logging.getLogger(__name__)

ASK_S = 10.0  # for the list of rewards
WATCH_S = 10.0  # after so long without an answer, and again and again, the service is asked whether it lives
ALIVE_S = 30.0  # a service deep in work may be slow to say so


class ServedReward:
    """One reward behind one or more equal services. Usable from any event loop; each keeps its connections."""

    def __init__(self, spec: RewardSpec) -> None:
        assert spec.service is not None
        self.label = reward_label(spec)
        self.urls = tuple(url.rstrip("/") for url in spec.service.urls)
        self._spec, self._service = spec, spec.service
        self._endpoints = Endpoints(self.urls)
        self._connections = Connections(keepalive_s=30)
        self._takes_sources = False  # as the services say when they are looked at
        self._source: tuple[str, str | None] | None = None  # first URL to answer, sha256 of the reward's file

    @property
    def served_source(self) -> RewardSource:
        """The file that the services score with, once one has answered."""
        url, sha256 = self._source or (None, None)
        return RewardSource(self._spec.name, url, sha256)

    def check(self) -> list[str]:
        """Problems of the `service` block; nothing is sent."""
        service = self._service
        problems = [] if self.urls else ["service.urls is empty; give at least one, like http://host:8100"]
        problems += [f"service.urls: {problem}" for url in self.urls if (problem := url_problem(url))]
        if len(set(self.urls)) < len(self.urls) and not problems:  # else one might hold a password
            problems.append(f"service.urls holds one URL twice: {', '.join(self.urls)}")
        if service.codec not in CODECS:
            problems.append(f"service.codec is {service.codec!r}; choose one of {', '.join(CODECS)}")
        if not service.unavailable_s > 0:
            problems.append(f"service.unavailable_s is {service.unavailable_s:g}; give seconds above 0")
        try:
            self._authorization()
        except FatalRewardError as error:
            problems.append(f"service.token_env: {error}")
        try:
            fingerprint(self._spec.name, self._spec.params)
        except (TypeError, ValueError) as error:
            problems.append(f"params of a served reward must be plain JSON: {error}")
        return problems

    async def readiness(self, *, restarted: bool = False) -> list[str]:
        """Wait, `unavailable_s` at most, until every URL serves this very reward; what is wrong with the others.

        `restarted`: within a run one that does is enough; the others are named in the log and count as away.
        """
        asked = {
            asyncio.ensure_future(self._wait_for(endpoint)): endpoint for endpoint in self._endpoints.all
        }
        try:
            pending = set(asked)
            while pending:
                when = asyncio.FIRST_COMPLETED if restarted else asyncio.ALL_COMPLETED
                done, pending = await asyncio.wait(pending, return_when=when)
                if restarted and not all(task.result() for task in done):
                    for task in [task for task in asked if not task.done() or task.result()]:
                        fault = (
                            task.result() if task.done() else "no answer yet to a worker that was restarted"
                        )
                        logger.warning("reward %s: %s is away: %s", self.label, asked[task].url, fault)
                        self._endpoints.doubt(asked[task], fault)
                    return []
            return [problem for task in asked if (problem := task.result())]
        finally:
            for task in asked:
                task.cancel()

    async def score(
        self,
        *,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        references: Sequence[Sequence[Image.Image]],
        metadata: Sequence[Mapping[str, Any]],
        sources: Sequence[Sequence[str]] | None = None,
    ) -> RewardOutput:
        """The answer of whichever service is free. `sources` travel to a reward that asks for them.

        Raises RetryableRewardError, TimeoutError and ServedRewardFailure for what happened to the reward there,
        FatalRewardError for what no other call can mend, or when no service was there for `unavailable_s`.
        """
        call = Call(fingerprint(self._spec.name, self._spec.params), self._spec.timeout_s)
        try:
            body = await asyncio.to_thread(
                encode_request,
                call,
                images=images,
                prompts=prompts,
                references=references,
                metadata=metadata,
                sources=sources if self._takes_sources else None,
                codec=self._service.codec,
            )
        except WireError as error:
            raise FatalRewardError(f"reward {self.label!r} cannot be served: {error}") from error
        return await self._send(body)

    async def _send(self, body: bytes) -> RewardOutput:
        """Ask one endpoint after the other until one answers, or patience ends."""
        patience = self._service.unavailable_s
        away_since: float | None = None
        while True:
            with self._endpoints.borrow() as endpoint:
                if endpoint is not None:
                    try:
                        return await self._ask(endpoint, body)
                    except Away as error:
                        if not endpoint.fault:
                            logger.warning("reward %s: %s is away: %s", self.label, endpoint.url, error)
                        self._endpoints.failed(endpoint, str(error), error.retry_after_s)
            now = time.monotonic()
            away_since = now if away_since is None else away_since
            left = away_since + patience - now
            if left <= 0:
                raise FatalRewardError(
                    f"reward {self.label!r}: no service answered for service.unavailable_s={patience:g} s: "
                    f"{self._endpoints.faults()}"
                )
            await asyncio.sleep(min(self._endpoints.wait_s(), left))

    async def _ask(self, endpoint: Endpoint, body: bytes) -> RewardOutput:
        """One request to one endpoint, which is looked at first if it was away: it may be another service now."""
        if endpoint.fault:
            await self._verify(endpoint)
            self._endpoints.works(endpoint)
        response = await self._post(endpoint, body)
        output, sha256 = read_output(read_answer(response, endpoint.url), endpoint.url)
        self._same_source(endpoint.url, sha256)
        return output

    async def _post(self, endpoint: Endpoint, body: bytes) -> httpx.Response:
        """The answer may take long: the call may wait in a queue. So the service is watched instead of the clock."""
        url = f"{endpoint.url}/v1/score/{quote(self.label, safe='')}"
        headers = {"content-type": MEDIA_TYPE, **self._authorization()}
        sending = asyncio.ensure_future(self._connections.client().post(url, content=body, headers=headers))
        sending.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            while True:
                done, _ = await asyncio.wait({sending}, timeout=WATCH_S)
                if done:
                    return sending.result()
                await self._get(endpoint, "/healthz", ALIVE_S)
        except httpx.RequestError as error:
            raise Away(f"{type(error).__name__}: {error}") from error
        finally:
            sending.cancel()

    async def _get(self, endpoint: Endpoint, path: str, limit_s: float) -> httpx.Response:
        return await self._connections.request("GET", endpoint, path, limit_s, headers=self._authorization())

    async def _verify(self, endpoint: Endpoint) -> None:
        """Raises Away while the reward is not ready there, FatalRewardError when something else is served."""
        response = await self._get(endpoint, "/v1/rewards", ASK_S)
        answer = read_answer(response, endpoint.url)
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, dict) or not all(isinstance(entry, dict) for entry in rewards.values()):
            raise FatalRewardError(f"{endpoint.url} is no reward service: its /v1/rewards lists none")
        found = rewards.get(self.label)
        if found is None:
            raise FatalRewardError(
                f"{endpoint.url} does not serve reward {self.label!r}; it serves {sorted(rewards)}"
            )
        mine = fingerprint(self._spec.name, self._spec.params)
        if found.get("fingerprint") != mine:
            raise FatalRewardError(
                f"{endpoint.url} serves {self.label!r} as {found.get('name')} with params {found.get('params')} "
                f"(hash {str(found.get('fingerprint'))[:12]}), this recipe means {self._spec.name} with params "
                f"{self._spec.params} (hash {mine[:12]})"
            )
        self._same_source(endpoint.url, found.get("sha256"))
        self._takes_sources = bool(found.get("takes_sources"))
        if not found.get("ready"):
            raise Away(f"not ready: {'; '.join(map(str, found.get('problems') or []))}")
        logger.info(
            "reward %s: %s serves %s path=%s sha256=%s",
            self.label, endpoint.url, found.get("name"), found.get("path"), found.get("sha256"),
        )  # fmt: skip

    def _same_source(self, url: str, sha256: str | None) -> None:
        """The scores of a run must not depend on which service gave them, or on when it was restarted."""
        first_url, first = self._source = self._source or (url, sha256)
        if sha256 != first:
            raise FatalRewardError(
                f"reward {self.label!r} is another file at {url} (sha256 {sha256}) than it was at {first_url} "
                f"(sha256 {first}); give every service the same file, and change it between runs only"
            )

    async def _wait_for(self, endpoint: Endpoint) -> str:
        limit_s = self._service.unavailable_s
        error = await wait_until(lambda: self._verify(endpoint), limit_s)
        if isinstance(error, Away):
            return f"{endpoint.url} was not ready within service.unavailable_s={limit_s:g} s: {error}"
        return "" if error is None else str(error)

    def _authorization(self) -> dict[str, str]:
        variable = self._service.token_env
        return {} if variable is None else {"authorization": f"Bearer {read_token(variable)}"}
