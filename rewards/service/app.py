"""The HTTP face of a reward service: routes, token, size limit; what a request is worth is decided elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from rewards.base import RewardOutput
from rewards.service.bodies import Bodies
from rewards.service.faults import Fault, fault_of
from rewards.service.hosting import HostedReward, get_ready
from rewards.service.metrics import ServiceMetrics
from rewards.service.request import decode_request
from rewards.service.wire import Cause, encode_scores, read_token

logger = logging.getLogger(__name__)

_Scored = tuple[RewardOutput, float]  # with the seconds of the call


@dataclass(frozen=True)
class ServiceSettings:
    """max_request_bytes: of a body, and of its pictures once decoded. token_env: variable with the token, or None."""

    max_request_bytes: int
    token_env: str | None = None


def build_app(rewards: Sequence[HostedReward], settings: ServiceSettings) -> FastAPI:
    """The application; its rewards are tried as soon as it runs."""
    service = RewardService(rewards, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        trying = asyncio.create_task(get_ready(rewards))
        yield
        trying.cancel()

    app = FastAPI(title="rewards", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    for path, method, handler in (
        ("/healthz", "GET", service.healthz),
        ("/readyz", "GET", service.readyz),
        ("/metrics", "GET", service.metrics_text),
        ("/v1/rewards", "GET", service.list_rewards),
        ("/v1/score/{label}", "POST", service.score),
    ):
        app.add_api_route(path, handler, methods=[method], response_model=None)
    app.add_exception_handler(Fault, _answer)
    return app


class RewardService:
    """The handlers. `/healthz` and `/readyz` are open, for probes carry no token; all else asks for it."""

    def __init__(self, rewards: Sequence[HostedReward], settings: ServiceSettings) -> None:
        self._rewards = {reward.label: reward for reward in rewards}
        self._settings = settings
        slots = sum(reward.concurrency for reward in rewards)
        self._bodies = Bodies(settings.max_request_bytes, slots * settings.max_request_bytes)
        self._metrics = ServiceMetrics()

    async def healthz(self) -> Response:
        """The process lives and its event loop turns."""
        return JSONResponse({"status": "alive"})

    async def readyz(self, request: Request) -> Response:
        """200 once every reward has passed its trial, else 503; the reasons go to who has the token."""
        reasons = {label: reward.problems for label, reward in self._rewards.items() if reward.problems}
        if not reasons:
            return JSONResponse({"ready": True})
        shown: Any = reasons if self._authorized(request) else sorted(reasons)
        return JSONResponse({"ready": False, "not_ready": shown}, 503)

    async def metrics_text(self, request: Request) -> Response:
        """Prometheus' text format."""
        self._authorize(request)
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def list_rewards(self, request: Request) -> Response:
        """What is served, by label: its name, params and their hash, file and sha256, and whether it is ready."""
        self._authorize(request)
        listed = {label: _describe(reward) for label, reward in self._rewards.items()}
        return JSONResponse({"rewards": listed, "max_request_bytes": self._settings.max_request_bytes})

    async def score(self, label: str, request: Request) -> Response:
        """Score one batch: 200 with scores, or an error with its cause."""
        known = label if label in self._rewards else ""
        self._metrics.requests.labels(known).inc()
        with self._metrics.in_flight.labels(known).track_inprogress():
            try:
                self._authorize(request)
                return JSONResponse(await self._score(label, request))
            except asyncio.CancelledError:  # the grace period after SIGTERM is over
                fault = Fault(Cause.UNAVAILABLE, "the service is stopping", 1.0)
            except ClientDisconnect:
                fault = Fault(Cause.INFRASTRUCTURE, "the caller hung up")
            except Fault as error:
                fault = error.with_traceback(None)  # which would keep the body until the next collection
        logger.warning("reward %s: not scored (%s): %s", known or "unknown", fault.cause.value, fault)
        self._metrics.failures.labels(known, fault.cause.value).inc()
        return await _answer(request, fault)

    async def _score(self, label: str, request: Request) -> dict[str, Any]:
        reward = self._rewards.get(label)
        if reward is None:
            raise Fault(
                Cause.UNKNOWN_REWARD, f"reward {label!r} is not served here; served: {sorted(self._rewards)}"
            )
        if reward.problems:
            raise Fault(Cause.UNAVAILABLE, f"not ready: {'; '.join(reward.problems)}", 1.0)
        try:
            async with self._bodies.read(request) as body:
                output, seconds = await _while_wanted(request, self._in_turn(reward, body))
        except (ClientDisconnect, Fault):
            raise
        except Exception as error:
            raise fault_of(error, reward.loaded.spec.timeout_s) from error
        self._metrics.answered(label, output.scores, seconds)
        return {
            "scores": encode_scores(output.scores),
            "components": {str(name): encode_scores(v) for name, v in output.components.items()},
            "sha256": reward.loaded.source.sha256,
        }

    async def _in_turn(self, reward: HostedReward, body: bytearray) -> _Scored:
        async with reward.slot():
            call, batch = await asyncio.to_thread(decode_request, body, self._settings.max_request_bytes)
            if call.fingerprint != reward.fingerprint:
                raise Fault(Cause.OTHER_REWARD, f"the service scores with {_identity(reward)}")
            start = time.monotonic()
            try:
                return await reward.score(batch, call.timeout_s), time.monotonic() - start
            except Exception as error:  # a reward is foreign code and may raise anything
                raise fault_of(error, call.timeout_s) from error

    def _authorize(self, request: Request) -> None:
        if not self._authorized(request):
            raise Fault(Cause.UNAUTHORIZED, "the bearer token is missing or wrong")

    def _authorized(self, request: Request) -> bool:
        if self._settings.token_env is None:
            return True
        expected = f"Bearer {read_token(self._settings.token_env)}"
        given = request.headers.get("authorization", "")
        return hmac.compare_digest(given.encode(), expected.encode())


async def _answer(_: Request, fault: Any) -> Response:
    return JSONResponse(fault.content(), fault.status, fault.headers())


def _describe(reward: HostedReward) -> dict[str, Any]:
    spec, source = reward.loaded.spec, reward.loaded.source
    return {
        "name": spec.name,
        "params": spec.params,
        "fingerprint": reward.fingerprint,
        "takes_sources": reward.loaded.takes_sources,
        "path": source.path,
        "sha256": source.sha256,
        "ready": not reward.problems,
        "problems": reward.problems,
    }


def _identity(reward: HostedReward) -> str:
    spec = reward.loaded.spec
    return f"{spec.name} {spec.params} (hash {reward.fingerprint[:12]})"


async def _while_wanted(request: Request, scoring: Coroutine[Any, Any, _Scored]) -> _Scored:
    """The result of `scoring`, which is cancelled when the caller hangs up: then it does not begin where it still waits
    for its turn. Raises ClientDisconnect."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, gone = asyncio.ensure_future(scoring), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        work.cancel()
        gone.cancel()
