"""Asks the judge: the cache, and one request for questions that are asked twice at once.

ask -> hash -> the same question in flight? wait with it
            -> cache: a hit ends here, and so does `replay`
            -> asking.py: limits, budget, HTTP, attempts -> cache
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rewards.judge.asking import Asker, Errand
from rewards.judge.budget import Budget
from rewards.judge.cache import Answers, FileAnswers, MemoryAnswers, Question, as_cached, identify, is_answer
from rewards.judge.endpoint import MissingKeyError, read_key
from rewards.judge.estimate import NANO
from rewards.judge.limits import Clock, RateWindow
from rewards.judge.messages import JudgeReply, JudgeRequest, Outcome
from rewards.judge.settings import JudgeSettings
from rewards.judge.store import StoreBusyError, StoreError
from rewards.judge.wire import Attempt


@dataclass
class _Flight:
    """A question on its way."""

    errand: Errand
    task: asyncio.Task[JudgeReply]


@dataclass
class _Session:
    """What belongs to one event loop. asker: None in replay, which has nobody to ask."""

    loop: asyncio.AbstractEventLoop
    asker: Asker | None
    flights: dict[str, _Flight] = field(default_factory=dict)


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
        self._wrong = settings.problems() or _place_problems(settings)
        self._answers = _answers(settings)
        self._budget = None if self._wrong else _budget(settings)
        self._window = RateWindow(settings.requests_per_minute, settings.tokens_per_minute, self._clock)
        self._session: _Session | None = None

    def problems(self) -> list[str]:
        """What is known without network: bad settings, a missing key or package, unusable files. Blocks."""
        if self._wrong:
            return list(self._wrong)
        checks: list[Callable[[], object]] = [self._answers.check]
        if self._settings.mode != "replay":
            checks += [lambda: read_key(self._settings)] + ([self._budget.check] if self._budget else [])
        return [problem for check in checks for problem in _problems(check)]

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        """Ends within `settings.longest_ask_s`."""
        if self._wrong:
            return JudgeReply(Outcome.FATAL, detail="; ".join(self._wrong))
        session = self._current_session()
        question = await asyncio.to_thread(identify, self._settings, request)
        flight = session.flights.get(question.key)
        joined = flight is not None
        if flight is None:
            errand = Errand()
            task = asyncio.create_task(self._fly(session, errand, question, request))
            flight = session.flights[question.key] = _Flight(errand, task)
            task.add_done_callback(lambda _: _land(session, question, flight))
        flight.errand.waiters += 1
        try:
            reply = await asyncio.shield(flight.task)
        finally:
            flight.errand.waiters -= 1
            if not flight.errand.waiters and not flight.errand.sending:
                flight.task.cancel()
                _land(session, question, flight)
        return as_cached(reply) if joined else reply

    async def close(self) -> None:
        """Drop what is in flight; close this event loop's connections, and the files. `ask` opens them again."""
        session, self._session = self._session, None
        if session is not None and session.loop is asyncio.get_running_loop():
            tasks = [flight.task for flight in session.flights.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if session.asker is not None:
                await session.asker.close()
        await asyncio.to_thread(self._answers.close)
        if self._budget is not None:
            await asyncio.to_thread(self._budget.close)

    def _current_session(self) -> _Session:
        loop = asyncio.get_running_loop()
        if self._session is None or self._session.loop is not loop:
            replay = self._settings.mode == "replay"
            asker = (
                None
                if replay
                else Asker(self._settings, window=self._window, budget=self._budget, clock=self._clock)
            )
            self._session = _Session(loop, asker)
        return self._session

    async def _fly(
        self, session: _Session, errand: Errand, question: Question, request: JudgeRequest
    ) -> JudgeReply:
        """One question to its end, whatever that is."""
        limit_s = self._settings.longest_ask_s
        try:
            async with asyncio.timeout(limit_s):
                return await self._answer(session, errand, question, request)
        except TimeoutError:
            failed = Attempt(Outcome.TIMEOUT, detail=f"no answer within {limit_s:g} s, waits included")
        except StoreBusyError as error:
            failed = Attempt(Outcome.UNAVAILABLE, detail=str(error))
        except StoreError as error:
            failed = Attempt(Outcome.FATAL, detail=str(error))
        return errand.reply(failed, self._settings)

    async def _answer(
        self, session: _Session, errand: Errand, question: Question, request: JudgeRequest
    ) -> JudgeReply:
        """From the cache, else from the endpoint. In live and record only an answer saves a request."""
        mode = self._settings.mode
        found = await asyncio.to_thread(self._answers.get, question)
        if found is not None and (is_answer(found) or mode == "replay"):
            return as_cached(found)
        if session.asker is None:
            detail = (
                f"mode is replay, and {self._settings.cache} has no answer to this question: "
                f"{question.describe()}; record it with mode record, or go back to the settings, templates and "
                "samples of the recording"
            )
            return JudgeReply(Outcome.FATAL, detail=detail)
        reply = await session.asker.ask(request, errand)
        if is_answer(reply) or (mode == "record" and reply.outcome is not Outcome.FATAL):
            await asyncio.to_thread(self._answers.put, question, reply)
        return reply


def _land(session: _Session, question: Question, flight: _Flight | None) -> None:
    if session.flights.get(question.key) is flight:
        del session.flights[question.key]


def _answers(settings: JudgeSettings) -> Answers:
    if not settings.cache:
        return MemoryAnswers()
    return FileAnswers(settings.cache, read_only=settings.mode == "replay")


def _budget(settings: JudgeSettings) -> Budget | None:
    """The budget, if the recipe sets one. Its settings have been checked."""
    if not settings.has_budget or settings.ledger_path is None:
        return None
    money = None if settings.max_cost_usd is None else int(settings.max_cost_usd * NANO)
    return Budget(settings.ledger_path, max_nano_usd=money, max_tokens=settings.max_total_tokens)


def _place_problems(settings: JudgeSettings) -> list[str]:
    """What is wrong with running these settings here."""
    problems = []
    if settings.mode != "replay" and importlib.util.find_spec("openai") is None:
        problems.append("the package openai is not installed; install unipic-rl[judge]")
    # Ray unpacks a submitted job into a temporary folder, where paid answers and their count would be lost.
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        problems += [
            f"{key} {path!r} is relative, and a submitted job runs in a temporary copy of the working directory; "
            "give an absolute path that every node sees"
            for key, path in (("cache", settings.cache), ("ledger", settings.ledger))
            if path and not Path(path).is_absolute()
        ]
    return problems


def _problems(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except (MissingKeyError, StoreError) as error:
        return [str(error)]
    return []
