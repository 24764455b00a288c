"""Asks the judge: the cache, and one request for questions that are asked twice at once.

ask -> hash -> the same question in flight? wait with it
            -> cache: a hit ends here, and so does `replay`
            -> asking.py: limits, budget, HTTP, attempts -> cache
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import time
from collections.abc import Callable, Collection

from core.logs import relative_path_problems
from rewards.judge.asking import InFlight, MissingKeyError, Sender, read_key
from rewards.judge.budget import NANO, Budget, price_of
from rewards.judge.cache import FileAnswers, Fingerprint, MemoryAnswers, as_cached, identify
from rewards.judge.limits import Clock, RateWindow, shared_window
from rewards.judge.messages import Asker, JudgeReply, JudgeRequest, Outcome
from rewards.judge.settings import JudgeSettings
from rewards.judge.store import StoreBusyError, StoreError

logger = logging.getLogger(__name__)


class JudgeClient:
    """Answers questions from the cache or the endpoint. Every failure is an `Outcome`, never an exception.

    Light to make: nothing is opened or imported before the first question. Works under one event loop after
    another, not under two at once. Close it at the end of each, when nobody asks any more.

    A question that is asked twice at once is sent once. One whose askers were all cancelled (by a reward's time
    limit) is dropped, unless its request is under way: that ends within `timeout_s`, and its answer is kept.
    Whoever did not cause a request gets the reply as `cached`, with no attempts and no tokens.
    """

    def __init__(self, settings: JudgeSettings, *, clock: Clock | None = None) -> None:
        self._settings = settings
        self._clock = clock or Clock()
        self._wrong = settings.problems() or _problems_here(settings)
        self._answers: FileAnswers | MemoryAnswers = MemoryAnswers()
        if settings.cache:
            self._answers = FileAnswers(settings.cache, read_only=settings.mode == "replay")
        self._budget: Budget | None = None
        if settings.has_budget and settings.ledger_path and not self._wrong:
            money = None if settings.max_cost_usd is None else int(settings.max_cost_usd * NANO)
            self._budget = Budget(
                settings.ledger_path, max_nano_usd=money, max_tokens=settings.max_total_tokens
            )
        rates = settings.requests_per_minute, settings.tokens_per_minute
        if clock is None and not self._wrong:
            self._window = shared_window(
                (settings.base_urls, settings.model, settings.api_key_env, *rates), *rates
            )
        else:
            self._window = RateWindow(*rates, self._clock)
        self._compared = False  # the endpoint, with those that the file's answers are of
        self._sender: Sender | None = None  # of one event loop

    def problems(self) -> list[str]:
        """What is known without network: bad settings, a missing key or package, unusable files. Blocks."""
        if self._wrong:
            return list(self._wrong)
        checks: list[Callable[[], object]] = [self._answers.check]
        if self._settings.mode != "replay":
            checks += [lambda: read_key(self._settings)] + ([self._budget.check] if self._budget else [])
        problems = []
        for check in checks:
            try:
                check()
            except (MissingKeyError, StoreError) as error:
                problems.append(str(error))
        return problems

    def share_rates(self, clients: int) -> None:
        """Keep to the n-th part of the limits per minute, and to 1 at least."""
        self._window.share(clients)

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        """Ends within `settings.longest_ask_s`."""
        if self._wrong:
            return JudgeReply(Outcome.FATAL, detail="; ".join(self._wrong))
        sender = self._sender_of_this_loop()
        asked = await asyncio.to_thread(identify, self._settings, request)
        flight = sender.flights.get(asked.key)
        joined = flight is not None
        if flight is None:
            flight = sender.flights[asked.key] = InFlight()
            flight.task = asyncio.create_task(self._fly(sender, flight, asked, request))
        flight.waiters += 1
        try:
            reply = await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.sending:
                flight.task.cancel()
                sender.forget(asked.key, flight)
        return as_cached(reply) if joined else reply

    async def close(self) -> None:
        """Drop what is in flight; close this event loop's connections, and the files. `ask` opens them again."""
        sender, self._sender = self._sender, None
        if sender is not None and sender.loop is asyncio.get_running_loop():
            await sender.close()
        await asyncio.to_thread(self._answers.close)
        if self._budget is not None:
            await asyncio.to_thread(self._budget.close)

    def _sender_of_this_loop(self) -> Sender:
        if self._sender is None or self._sender.loop is not asyncio.get_running_loop():
            self._sender = Sender(self._settings, window=self._window, budget=self._budget, clock=self._clock)
        return self._sender

    async def _fly(
        self, sender: Sender, flight: InFlight, asked: Fingerprint, request: JudgeRequest
    ) -> JudgeReply:
        """One question to its end, whatever that is."""
        limit_s = self._settings.longest_ask_s
        try:
            async with asyncio.timeout(limit_s):
                return await self._answer(sender, flight, asked, request)
        except TimeoutError:
            failed = JudgeReply(Outcome.TIMEOUT, detail=f"no answer within {limit_s:g} s, waits included")
        except StoreBusyError as error:
            failed = JudgeReply(Outcome.UNAVAILABLE, detail=str(error))
        except StoreError as error:
            failed = JudgeReply(Outcome.FATAL, detail=str(error))
        finally:
            sender.forget(asked.key, flight)
        return flight.finish(failed, self._settings)

    async def _answer(
        self, sender: Sender, flight: InFlight, asked: Fingerprint, request: JudgeRequest
    ) -> JudgeReply:
        """From the cache, else from the endpoint. In live and record only an answer saves a request."""
        mode = self._settings.mode
        if isinstance(self._answers, FileAnswers) and mode != "replay" and not self._compared:
            self._compared = True
            await asyncio.to_thread(self._warn_of_others, self._answers)
        found = await asyncio.to_thread(self._answers.get, asked)
        if found is not None and (found.readable or mode == "replay"):
            return as_cached(found)
        if mode == "replay":
            detail = (
                f"mode is replay, and {self._settings.cache} has no answer to this question: "
                f"{asked.describe()}; record it with mode record, or go back to the settings, templates and "
                "samples of the recording"
            )
            return JudgeReply(Outcome.FATAL, detail=detail)
        reply = await sender.ask(request, flight)
        if reply.readable or (mode == "record" and reply.outcome is not Outcome.FATAL):
            await asyncio.to_thread(self._answers.put, asked, reply)
        return reply

    def _warn_of_others(self, answers: FileAnswers) -> None:
        model, urls = self._settings.model, self._settings.base_urls
        first = answers.endpoints(model, urls)
        if not set(first) & set(urls):
            logger.warning(
                "judge %s at %s: the answers in %s are of %s, and count as this judge's; if it has other weights, give "
                "it another model name or another cache",
                model, ", ".join(urls), answers.path, ", ".join(first),
            )  # fmt: skip


class Silence:
    """An asker around another that keeps count of how long its endpoint has not answered anything.

    Silence begins with the first failed or cancelled question since the last answer, at the time that question
    was put: time in which nothing was asked is not counted. Answers from the cache say nothing about the endpoint.
    """

    def __init__(
        self, asker: Asker, failures: Collection[Outcome], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._asker, self._failures, self._clock = asker, failures, clock
        self._heard = -float("inf")
        self._since: float | None = None
        self.detail = "none"

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        """The other asker's reply."""
        began = self._clock()
        try:
            reply = await self._asker.ask(request)
        except asyncio.CancelledError:
            self._unheard(began, "cancelled before it was answered")
            raise
        if reply.outcome in self._failures:
            self._unheard(began, f"{reply.outcome}: {reply.detail}")
        elif not reply.cached:
            self._heard, self._since = self._clock(), None
        return reply

    def seconds(self) -> float:
        """Seconds of silence up to now; 0 after an answer."""
        return 0.0 if self._since is None else self._clock() - self._since

    def _unheard(self, began: float, detail: str) -> None:
        self.detail = detail
        if self._since is None:
            self._since = max(began, self._heard)


def _problems_here(settings: JudgeSettings) -> list[str]:
    """What is wrong with sound settings for this model and in this process."""
    problems = []
    if settings.max_cost_usd is not None and price_of(settings) is None:
        problems.append(
            f"max_cost_usd is set, but the price of model {settings.model!r} is not known; set "
            "price_per_million_input and price_per_million_output"
        )
    if settings.mode != "replay" and importlib.util.find_spec("openai") is None:
        problems.append("the package openai is not installed; install unipic-rl[judge]")
    # Ray unpacks a submitted job into a temporary folder, where paid answers and their count would be lost.
    paths = {"cache": settings.cache, "ledger": settings.ledger}
    return problems + relative_path_problems({f"{key} {path!r}": path or None for key, path in paths.items()})
