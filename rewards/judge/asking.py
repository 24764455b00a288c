"""One question to the endpoint: a turn under the limits, a hold in the budget, HTTP, settlement, and again."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

import tenacity

from rewards.judge.budget import Budget, BudgetExhausted
from rewards.judge.encoding import chat_arguments
from rewards.judge.endpoint import Endpoint, MissingKeyError, read_key, scrub
from rewards.judge.estimate import bill, most_of, price_of
from rewards.judge.limits import Clock, RateWindow, Turnstile, TurnTimeout
from rewards.judge.messages import JudgeReply, JudgeRequest, Outcome
from rewards.judge.settings import JudgeSettings
from rewards.judge.wire import NOT_BILLED, Attempt

logger = logging.getLogger(__name__)

_exponential = tenacity.wait_exponential_jitter(initial=1, max=30, jitter=1)


@dataclass
class Errand:
    """One question on its way, as those who wait for it and the asker see it.

    waiters: how many want the answer. sending: a request is held for, sent or settled, so let it end.
    turn: the replica it starts with; each further attempt goes to the next one.
    The rest counts over its attempts: HTTP requests, tokens billed, seconds in the queue.
    """

    waiters: int = 0
    sending: bool = False
    turn: int = 0
    attempts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    queued_s: float = 0.0

    def reply(self, attempt: Attempt, settings: JudgeSettings) -> JudgeReply:
        """The last attempt as the reply to the question."""
        tried = f" (attempt {self.attempts} of {settings.attempts})" if self.attempts > 1 else ""
        return JudgeReply(
            attempt.outcome,
            attempt.text,
            scrub(attempt.detail, settings) + tried if attempt.detail else "",
            attempt.choices,
            attempt.model,
            self.prompt_tokens,
            self.completion_tokens,
            self.attempts,
        )


class Asker:
    """Asks under one event loop. `window` and `budget` outlive it."""

    def __init__(
        self, settings: JudgeSettings, *, window: RateWindow, budget: Budget | None, clock: Clock
    ) -> None:
        self._settings, self._window, self._budget, self._clock = settings, window, budget, clock
        self._price = price_of(settings)
        self._turnstile = Turnstile(settings.concurrency, window, clock)
        self._turn = 0
        self._opening = asyncio.Lock()
        self._endpoint: Endpoint | None = None

    async def ask(self, request: JudgeRequest, errand: Errand) -> JudgeReply:
        """HTTP requests until one settles the question, `attempts` at most, with waits in between.

        The wait grows 1, 2, 4 ... 30 s plus up to 1 of jitter, is at most `longest_wait_s` and at least what the
        endpoint asked for; when that is more than `longest_wait_s` there is no further attempt.
        Raises StoreError when the budget's ledger cannot be used.
        """
        settings = self._settings
        try:
            read_key(settings)
        except MissingKeyError as error:
            return errand.reply(Attempt(Outcome.FATAL, detail=str(error)), settings)
        errand.turn, self._turn = self._turn, self._turn + 1
        arguments = await asyncio.to_thread(chat_arguments, settings, request)
        retrying = tenacity.AsyncRetrying(
            stop=lambda state: self._last_one(state, errand),
            wait=lambda state: max(
                min(_exponential(state), settings.longest_wait_s), _attempt(state).retry_after_s
            ),
            retry=tenacity.retry_if_result(lambda attempt: attempt.again),
            before_sleep=self._log,
            sleep=self._clock.sleep,
            retry_error_callback=_attempt,
        )
        return errand.reply(await retrying(self._attempt, request, arguments, errand), settings)

    async def close(self) -> None:
        """Close the connections."""
        if self._endpoint is not None:
            await self._endpoint.close()

    async def _connected(self) -> Endpoint:
        async with self._opening:
            if self._endpoint is None:
                self._endpoint = await asyncio.to_thread(Endpoint, self._settings)
            return self._endpoint

    def _last_one(self, state: tenacity.RetryCallState, errand: Errand) -> bool:
        too_long = _attempt(state).retry_after_s > self._settings.longest_wait_s
        return state.attempt_number >= self._settings.attempts or too_long or not errand.waiters

    async def _attempt(self, request: JudgeRequest, arguments: dict[str, Any], errand: Errand) -> Attempt:
        """One HTTP request in its turn."""
        asked_at = self._clock.now()
        most = most_of(self._settings, request)
        try:
            ticket = await self._turnstile.enter(sum(most), self._settings.queue_timeout_s - errand.queued_s)
        except TurnTimeout as error:
            return Attempt(Outcome.RATE_LIMITED, detail=self._describe(error))
        finally:
            errand.queued_s += self._clock.now() - asked_at
        billed = None
        errand.sending = True
        try:
            attempt = await self._pay(arguments, most, request.top_logprobs, errand)
            if attempt.usage not in (None, NOT_BILLED):
                billed = sum(attempt.usage or NOT_BILLED)
            if attempt.paused:
                self._window.pause(attempt.retry_after_s)
            return attempt
        finally:
            errand.sending = False
            self._turnstile.leave(ticket, billed)

    async def _pay(
        self, arguments: dict[str, Any], most: tuple[int, int], top_logprobs: int, errand: Errand
    ) -> Attempt:
        """Hold, send, settle. Whatever goes wrong in between, the whole hold counts as spent."""
        endpoint = await self._connected()
        held = used = bill(self._price, *most)
        if self._budget is not None:
            try:
                await asyncio.to_thread(self._budget.hold, held)
            except BudgetExhausted as error:
                return Attempt(Outcome.FATAL, detail=str(error))
        try:
            turn = errand.turn + errand.attempts
            errand.attempts += 1
            attempt = await endpoint.send(arguments, turn=turn, top_logprobs=top_logprobs)
            if attempt.usage is not None:
                used = bill(self._price, *attempt.usage)
                errand.prompt_tokens += attempt.usage[0]
                errand.completion_tokens += attempt.usage[1]
            return attempt
        finally:
            if self._budget is not None:
                await asyncio.shield(asyncio.to_thread(self._budget.settle, held, used))

    def _describe(self, error: TurnTimeout) -> str:
        still = f"; the endpoint or the limits ask for {error.wait_s:.0f} s more" if error.wait_s else ""
        return (
            f"no turn within queue_timeout_s {self._settings.queue_timeout_s:g} under concurrency, "
            f"requests_per_minute and tokens_per_minute{still}"
        )

    def _log(self, state: tenacity.RetryCallState) -> None:
        attempt = _attempt(state)
        logger.warning(
            "judge %s: attempt %d of %d: %s: %s; again in %.1f s",
            self._settings.model,
            state.attempt_number,
            self._settings.attempts,
            attempt.outcome,
            scrub(attempt.detail, self._settings),
            state.upcoming_sleep,
        )


def _attempt(state: tenacity.RetryCallState) -> Attempt:
    assert state.outcome is not None
    return state.outcome.result()
