"""One question to the endpoint: its turn under the limits, a hold in the budget, HTTP, settlement, and again."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import os
from dataclasses import dataclass, field
from typing import Any

import tenacity

from rewards.answers import PLAIN, limit_answer
from rewards.judge.budget import Budget, BudgetExhausted, bill, most_of, price_of
from rewards.judge.limits import Clock, QueueTimeout, RateWindow, Throttle
from rewards.judge.messages import INFRASTRUCTURE, JudgeReply, JudgeRequest, Outcome
from rewards.judge.settings import JudgeSettings
from rewards.judge.wire import NOT_BILLED, Attempt, chat_arguments, read_completion, read_error

logger = logging.getLogger(__name__)

HIDDEN = "<key>"
DETAIL_LENGTH = 400


class MissingKeyError(Exception):
    """The environment variable that the recipe names is not set."""


@dataclass
class InFlight:
    """One question on its way, shared by all who ask it at once.

    task: what answers it. waiters: how many want the answer. sending: a request is held for, sent or settled, so let
    it end. replica: of the next request. The rest counts over the attempts: requests, tokens billed, seconds queued.
    """

    waiters: int = 0
    sending: bool = False
    replica: int = 0
    attempts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    queued_s: float = 0.0
    task: asyncio.Future[JudgeReply] = field(default_factory=asyncio.Future)

    def finish(self, reply: JudgeReply, settings: JudgeSettings) -> JudgeReply:
        """The reply to the last attempt as the reply to the question."""
        tried = f" (attempt {self.attempts} of {settings.attempts})" if self.attempts > 1 else ""
        return dataclasses.replace(
            reply,
            detail=scrub(reply.detail, settings) + tried if reply.detail else "",
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            attempts=self.attempts,
        )


class Sender:
    """Asks under one event loop, over one `openai` client per replica. `window` and `budget` outlive it.

    flights: what is under way, by the key of the question.
    """

    def __init__(
        self, settings: JudgeSettings, *, window: RateWindow, budget: Budget | None, clock: Clock
    ) -> None:
        self._settings, self._window, self._budget, self._clock = settings, window, budget, clock
        self.loop = asyncio.get_running_loop()
        self.flights: dict[str, InFlight] = {}
        self._throttle = Throttle(settings.concurrency, window, clock)
        self._first_replicas = itertools.count()
        self._opening = asyncio.Lock()
        self._clients: list[Any] = []

    async def ask(self, request: JudgeRequest, flight: InFlight) -> JudgeReply:
        """HTTP requests until one settles the question, `attempts` at most, with waits in between.

        The wait grows 1, 2, 4 ... 30 s plus up to 1 of jitter, is at most `longest_wait_s` and at least what the
        endpoint asked for; when that is more than `longest_wait_s` there is no further attempt. Questions start with
        the replicas in turn; a further attempt goes to the next one. Raises StoreError when the budget's ledger
        cannot be used.
        """
        settings = self._settings
        backoff = tenacity.wait_exponential_jitter(initial=1, max=min(30, settings.longest_wait_s), jitter=1)

        def is_worth_another(attempt: Attempt) -> bool:
            in_time = attempt.retry_after_s <= settings.longest_wait_s
            return attempt.reply.outcome in INFRASTRUCTURE and in_time and flight.waiters > 0

        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(settings.attempts),
            wait=lambda state: max(backoff(state), _result(state).retry_after_s),
            retry=tenacity.retry_if_result(is_worth_another),
            before_sleep=self._log,
            sleep=self._clock.sleep,
            retry_error_callback=_result,
        )
        try:
            read_key(settings)
            flight.replica = next(self._first_replicas)
            arguments = await asyncio.to_thread(chat_arguments, settings, request)
            attempt: Attempt = await retrying(self._attempt, request, arguments, flight)
            reply = attempt.reply
        except (MissingKeyError, BudgetExhausted) as error:
            reply = JudgeReply(Outcome.FATAL, detail=str(error))
        except QueueTimeout as error:
            (wait_s,) = error.args
            still = f"; the endpoint or the limits ask for {wait_s:.0f} s more" if wait_s else ""
            detail = (
                f"not sent within queue_timeout_s {settings.queue_timeout_s:g} under concurrency, "
                f"requests_per_minute and tokens_per_minute{still}"
            )
            reply = JudgeReply(Outcome.RATE_LIMITED, detail=detail)
        return flight.finish(reply, settings)

    def forget(self, key: str, flight: InFlight) -> None:
        """A question has ended; the next one like it is a new one."""
        if self.flights.get(key) is flight:
            del self.flights[key]

    async def close(self) -> None:
        """Drop what is in flight and close the connections."""
        tasks = [flight.task for flight in self.flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for client in self._clients:
            await client.close()

    async def _attempt(self, request: JudgeRequest, arguments: dict[str, Any], flight: InFlight) -> Attempt:
        """One HTTP request in its turn. Raises QueueTimeout, BudgetExhausted, StoreError."""
        queued_at = self._clock.now()
        most = most_of(self._settings, request)
        async with self._throttle.slot(sum(most), self._settings.queue_timeout_s - flight.queued_s) as sent:
            flight.queued_s += self._clock.now() - queued_at
            flight.sending = True
            try:
                attempt = await self._pay(arguments, most, request.top_logprobs, flight)
            finally:
                flight.sending = False
            if attempt.usage not in (None, NOT_BILLED):
                sent.tokens = sum(attempt.usage)
            if attempt.reply.outcome is Outcome.RATE_LIMITED:
                self._window.pause(attempt.retry_after_s)
            return attempt

    async def _pay(
        self, arguments: dict[str, Any], most: tuple[int, int], top_logprobs: int, flight: InFlight
    ) -> Attempt:
        """Hold, send, settle. Whatever goes wrong in between, the whole hold counts as spent."""
        await self._connect()
        price = price_of(self._settings)
        held = used = bill(price, *most)
        if self._budget is not None:
            await asyncio.to_thread(self._budget.hold, held)
        try:
            attempt = await self._send(arguments, top_logprobs, flight)
            if attempt.usage is not None:
                used = bill(price, *attempt.usage)
                flight.prompt_tokens += attempt.usage[0]
                flight.completion_tokens += attempt.usage[1]
            return attempt
        finally:
            if self._budget is not None:
                await asyncio.shield(asyncio.to_thread(self._budget.settle, held, used))

    async def _send(self, arguments: dict[str, Any], top_logprobs: int, flight: InFlight) -> Attempt:
        """One HTTP request within `timeout_s`, body included. Raises nothing but cancellation."""
        import openai

        # Without a key the header is left out, also where an OPENAI_API_KEY happens to be set.
        headers: Any = None if self._settings.api_key_env else {"Authorization": openai.Omit()}
        number = flight.replica % len(self._clients)
        flight.replica, flight.attempts = flight.replica + 1, flight.attempts + 1
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                completion = await self._clients[number].chat.completions.create(
                    **arguments, extra_headers=headers
                )
            attempt = read_completion(completion, top_logprobs=top_logprobs)
        except Exception as error:  # the library and its transport may raise anything
            attempt = read_error(error)
        reply = attempt.reply
        if reply.outcome is Outcome.OK:
            return attempt
        detail = f"{self._settings.base_urls[number]}: {reply.detail}"
        return attempt._replace(reply=dataclasses.replace(reply, detail=detail))

    async def _connect(self) -> None:
        async with self._opening:
            if not self._clients:
                self._clients = await asyncio.to_thread(_open_clients, self._settings)

    def _log(self, state: tenacity.RetryCallState) -> None:
        reply, settings = _result(state).reply, self._settings
        logger.warning(
            "judge %s: attempt %d of %d: %s: %s; again in %.1f s", settings.model, state.attempt_number,
            settings.attempts, reply.outcome, scrub(reply.detail, settings), state.upcoming_sleep,
        )  # fmt: skip


def _result(state: tenacity.RetryCallState) -> Attempt:
    assert state.outcome is not None
    return state.outcome.result()


def _open_clients(settings: JudgeSettings) -> list[Any]:
    """One client per replica. Takes about a second the first time, since it imports `openai`."""
    import httpx
    import openai
    import openai.resources.chat  # noqa: F401  (else the first request would wait for it)

    async def key() -> str:
        return read_key(settings)

    def http() -> Any:
        """No redirects: the library follows them, and would send prompts and pictures to whoever is named there."""
        limits = httpx.Limits(max_connections=1000, max_keepalive_connections=100)
        return httpx.AsyncClient(
            limits=limits, headers=PLAIN, event_hooks={"response": [limit_answer]}, follow_redirects=False
        )

    return [
        openai.AsyncOpenAI(
            api_key=key if settings.api_key_env else "none",
            base_url=url,
            max_retries=0,
            timeout=settings.timeout_s,
            http_client=http(),
        )
        for url in settings.base_urls
    ]


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
    text = " ".join((text.replace(key, HIDDEN) if key else text).split())
    return text if len(text) <= DETAIL_LENGTH else f"{text[:DETAIL_LENGTH]} ..."
