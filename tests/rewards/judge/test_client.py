"""Asking under load, through outages, across event loops, after cancellation; and the key that stays secret."""

import asyncio
import dataclasses
import hashlib
import importlib.util
import json
import logging
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rewards.judge.client import JudgeClient
from rewards.judge.messages import Outcome
from rewards.judge.settings import JudgeSettings
from tests.fakes.judge_plays import COMPLETION_TOKENS, PROMPT_TOKENS, Play
from tests.fakes.judge_questions import TurnedClock, ask, question, settings_for
from tests.fakes.judge_server import JudgeServer

ROOT = Path(__file__).resolve().parents[3]
CANARY = "sk-canary-9f8e7d6c5b4a"
LIMITED = Play("rate_limited", headers={"retry-after": "30"})


def questions(count: int) -> list:
    return [question(f"content - how {number}") for number in range(count)]


async def until(condition) -> None:
    """Wait for something to become true, for ten seconds at most."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def test_concurrency_is_bounded_and_reached() -> None:
    with JudgeServer([Play("slow", times=0, seconds=0.15)]) as server:
        replies = ask(settings_for(server, concurrency=3), *questions(12))
        assert [reply.outcome for reply in replies] == [Outcome.OK] * 12
        assert server.high_water == 3


def test_a_failure_that_passes_is_asked_again_and_all_attempts_are_counted() -> None:
    plays = [Play("error_500"), Play("reset"), Play("rate_limited"), Play("ok")]
    with JudgeServer(plays) as server:
        (reply,) = ask(settings_for(server, attempts=4), question())
        assert (reply.outcome, reply.attempts) == (Outcome.OK, 4)
        assert (reply.prompt_tokens, reply.completion_tokens) == (PROMPT_TOKENS, COMPLETION_TOKENS)
        assert [record.play for record in server.records] == [play.kind for play in plays]
        assert [record.attempt for record in server.records] == [1, 2, 3, 4]


def test_retry_after_is_waited_for() -> None:
    time = TurnedClock()
    with JudgeServer([LIMITED]) as server:
        (reply,) = ask(settings_for(server, longest_wait_s=60.0), question(), clock=time.clock)
    assert (reply.outcome, reply.attempts) == (Outcome.OK, 2)
    assert 1030 <= time.time < 1032


def test_retry_after_pauses_every_question() -> None:
    """One question is told to wait longer than it may and gives up; the next one waits in its place."""
    time = TurnedClock()

    async def go() -> None:
        client = JudgeClient(
            settings_for(server, longest_wait_s=20.0, queue_timeout_s=100.0), clock=time.clock
        )
        first = await client.ask(question("content - how a"))
        assert (first.outcome, first.attempts, time.time) == (Outcome.RATE_LIMITED, 1, 1000.0)
        second = await client.ask(question("content - how b"))
        assert (second.outcome, second.attempts, time.time) == (Outcome.OK, 1, 1030.0)
        await client.close()

    with JudgeServer([LIMITED]) as server:
        asyncio.run(go())


def test_a_pause_longer_than_the_queue_may_last_ends_at_once_without_a_request() -> None:
    time = TurnedClock()

    async def go() -> None:
        client = JudgeClient(settings_for(server, queue_timeout_s=10.0), clock=time.clock)
        await client.ask(question("content - how a"))
        reply = await client.ask(question("content - how b"))
        assert (reply.outcome, reply.attempts, time.time) == (Outcome.RATE_LIMITED, 0, 1000.0)
        assert "queue_timeout_s" in reply.detail
        await client.close()

    with JudgeServer([LIMITED]) as server:
        asyncio.run(go())
        assert len(server.records) == 1


def test_requests_per_minute_hold_over_http() -> None:
    time = TurnedClock()
    with JudgeServer() as server:
        settings = settings_for(server, requests_per_minute=2, queue_timeout_s=1000.0)
        replies = ask(settings, *questions(5), clock=time.clock)
    assert [reply.outcome for reply in replies] == [Outcome.OK] * 5
    assert time.time == pytest.approx(1120.0), "two at once, two after a minute, one after two"


def test_equal_questions_at_once_are_one_request() -> None:
    with JudgeServer([Play("slow", times=0, seconds=0.05)]) as server:
        replies = ask(settings_for(server), *[question()] * 5, question("content - how else"))
        assert len(server.records) == 2
    assert len({reply.text for reply in replies[:5]}) == 1
    assert sorted(reply.cached for reply in replies) == [False, False, True, True, True, True]
    assert sum(reply.prompt_tokens for reply in replies) == 2 * PROMPT_TOKENS


def test_an_answer_stays_with_the_client_without_a_file() -> None:
    async def go() -> None:
        client = JudgeClient(settings_for(server))
        first, second = [await client.ask(question()) for _ in range(2)]
        assert (first.cached, second.cached, first.text) == (False, True, second.text)
        await client.close()

    with JudgeServer() as server:
        asyncio.run(go())
        assert len(server.records) == 1


def test_replicas_take_turns_and_stand_in_for_each_other() -> None:
    with JudgeServer() as one, JudgeServer() as two:
        both = settings_for(one, base_url=[one.base_url, two.base_url], concurrency=1)
        ask(both, *questions(4))
        assert len(one.records) == len(two.records) == 2
        two.stop()
        replies = ask(both, *questions(4))
        assert [reply.outcome for reply in replies] == [Outcome.OK] * 4
        assert sorted(reply.attempts for reply in replies) == [1, 1, 2, 2]


def test_an_outage_in_the_middle_is_survived_on_the_same_client() -> None:
    async def go() -> None:
        client = JudgeClient(settings_for(server, attempts=2))
        assert (await client.ask(question("content - how a"))).outcome is Outcome.OK
        await asyncio.to_thread(server.stop)
        down = await client.ask(question("content - how b"))
        assert (down.outcome, server.base_url in down.detail) == (Outcome.UNAVAILABLE, True)
        await asyncio.to_thread(server.start)
        assert (await client.ask(question("content - how b"))).outcome is Outcome.OK
        await client.close()

    with JudgeServer() as server:
        asyncio.run(go())


def test_a_server_that_is_killed_and_started_again_is_found_by_the_same_client(tmp_path) -> None:
    """As its own process, with scripted plays and a grade of its own."""
    script, grade = tmp_path / "plays.json", tmp_path / "grades.py"
    script.write_text(json.dumps(["error_500", {"kind": "slow", "when": "how a", "seconds": 0.01}]))
    grade.write_text("def grade(images, text):\n    return images[0].getpixel((0, 0))[0] / 255\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = JudgeSettings("judge", f"http://127.0.0.1:{port}/v1", None, attempts=100, longest_wait_s=0.5)
    words = [
        "-m",
        "tests.fakes.judge_server",
        "--port",
        str(port),
        "--script",
        str(script),
        "--grade",
        f"{grade}:grade",
    ]

    async def go() -> None:
        client = JudgeClient(settings)
        for text in ("content - how a", "content - how b"):
            server = subprocess.Popen([sys.executable, *words], cwd=ROOT)
            try:
                reply = await client.ask(question(text))
            finally:
                server.kill()
                server.wait(timeout=10)
            assert reply.outcome is Outcome.OK and reply.attempts >= 2, "the first answer is the scripted 500"
            assert json.loads(reply.text)["content"] == 5, "128 of 255, in tenths"
        await client.close()

    asyncio.run(go())


def test_one_event_loop_after_another_closed_or_not() -> None:
    with JudgeServer() as server:
        client = JudgeClient(settings_for(server, concurrency=1))

        async def go(number: int, close: bool) -> None:
            asked = questions(3 * number + 3)[-3:]
            replies = await asyncio.gather(*(client.ask(one) for one in asked))
            assert [reply.outcome for reply in replies] == [Outcome.OK] * 3
            if close:
                await client.close()

        for number, close in enumerate([True, False, True]):
            asyncio.run(go(number, close))
        assert len(server.records) == 9


def test_a_cancelled_question_under_way_is_not_paid_twice() -> None:
    async def go() -> None:
        client = JudgeClient(settings_for(server))
        asking = asyncio.create_task(client.ask(question()))
        await until(lambda: server.records)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        reply = await client.ask(question())
        assert (reply.outcome, reply.cached, reply.attempts) == (Outcome.OK, True, 0)
        await client.close()

    with JudgeServer([Play("slow", seconds=0.2)]) as server:
        asyncio.run(go())
        assert len(server.records) == 1


def test_a_cancelled_question_in_the_queue_is_never_sent() -> None:
    async def go() -> None:
        client = JudgeClient(settings_for(server, concurrency=1))
        first = asyncio.create_task(client.ask(question("content - how a")))
        await until(lambda: server.records)
        second = asyncio.create_task(client.ask(question("content - how b")))
        await asyncio.sleep(0.05)
        second.cancel()
        assert (await first).outcome is Outcome.OK
        assert (await client.ask(question("content - how c"))).outcome is Outcome.OK
        await client.close()

    with JudgeServer([Play("slow", seconds=0.3)]) as server:
        asyncio.run(go())
        assert [record.text for record in server.records] == ["content - how a", "content - how c"]


def test_nobody_waiting_means_no_further_attempt() -> None:
    async def go() -> None:
        client = JudgeClient(settings_for(server, attempts=5))
        asking = asyncio.create_task(client.ask(question()))
        await until(lambda: server.records)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await asyncio.sleep(0.4)
        await client.close()

    with JudgeServer([Play("error_500", seconds=0.1, times=0)]) as server:
        asyncio.run(go())
        assert len(server.records) == 1


def test_a_question_ends_within_the_stated_time() -> None:
    settings = JudgeSettings(
        "judge", "http://127.0.0.1:9/v1", None, attempts=3, timeout_s=5, longest_wait_s=7, queue_timeout_s=11
    )
    assert settings.longest_ask_s == 11 + 3 * 5 + 2 * 7
    assert ask(settings, question(), clock=TurnedClock().clock)[0].outcome is Outcome.UNAVAILABLE


def test_bad_settings_are_told_all_at_once_and_ask_nothing() -> None:
    settings = JudgeSettings(
        "", base_url=["http://user:secret@host/v1", "host"], mode="dry", concurrency=0, attempts=True,
        timeout_s=float("nan"), seed=-1, image_format="gif", cache=3, requests_per_minute=0.5,
    )  # type: ignore[arg-type]  # fmt: skip
    problems = settings.problems()
    for key in ("model", "base_url number 1", "base_url number 2", "mode", "concurrency", "attempts", "timeout_s",
                "seed", "image_format", "cache", "requests_per_minute"):  # fmt: skip
        assert sum(problem.startswith(f"{key} ") for problem in problems) == 1, key
    assert "secret" not in " ".join(problems)
    (reply,) = ask(settings, question())
    assert (reply.outcome, reply.attempts) == (Outcome.FATAL, 0)
    assert JudgeClient(settings).problems() == problems


def test_a_submitted_job_keeps_its_answers_where_they_last(monkeypatch, tmp_path) -> None:
    relative = JudgeSettings("judge", "http://127.0.0.1:9/v1", None, cache="a.sqlite", ledger="b.sqlite")
    absolute = dataclasses.replace(relative, cache=str(tmp_path / "a"), ledger=str(tmp_path / "b"))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    cache, ledger = JudgeClient(relative).problems()
    assert "cache 'a.sqlite' is relative" in cache and "ledger 'b.sqlite' is relative" in ledger
    assert JudgeClient(absolute).problems() == []


def test_a_missing_package_is_named(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    settings = JudgeSettings("judge", "http://127.0.0.1:9/v1", None)
    (problem,) = JudgeClient(settings).problems()
    assert "unipic-rl[judge]" in problem
    assert ask(settings, question())[0].outcome is Outcome.FATAL


def test_a_key_that_is_not_set_is_named(monkeypatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with JudgeServer() as server:
        settings = settings_for(server, api_key_env="JUDGE_KEY")
        (problem,) = JudgeClient(settings).problems()
        (reply,) = ask(settings, question())
        assert "JUDGE_KEY" in problem and "JUDGE_KEY" in reply.detail
        assert (reply.outcome, reply.attempts, server.records) == (Outcome.FATAL, 0, [])


def test_without_a_key_no_other_key_is_sent(monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    with JudgeServer() as server:
        ask(settings_for(server, api_key_env=None), question())
        assert server.records[0].token_sha256 is None


@pytest.mark.parametrize("ends", ["", "\n"])
def test_the_key_arrives_and_is_seen_nowhere_else(monkeypatch, caplog, tmp_path, ends) -> None:
    """In no log at any level, detail, repr or file, also when the endpoint sends it back or refuses it."""
    monkeypatch.setenv("JUDGE_KEY", CANARY + ends)
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx", "httpcore", "httpx2", "httpcore2"):
        caplog.set_level(logging.DEBUG, logger=name)
    cache = tmp_path / "answers.sqlite"
    seen = []
    plays = [Play("ok"), Play("reset"), Play("error_500"), Play("ok"), Play("unauthorized")]
    with JudgeServer(plays, token=CANARY) as server:
        settings = settings_for(
            server, api_key_env="JUDGE_KEY", cache=str(cache), mode="record", max_total_tokens=10**6
        )
        client = JudgeClient(settings)

        async def go() -> None:
            for one in questions(3):
                seen.append(await client.ask(one))
            server.token = "another"
            seen.append(await client.ask(question("content - how wrong")))
            seen.append(repr(vars(client)))
            await client.close()

        asyncio.run(go())
        assert server.records[0].token_sha256 == hashlib.sha256(f"Bearer {CANARY}".encode()).hexdigest()
    assert [reply.outcome for reply in seen[:4]] == [Outcome.OK, Outcome.OK, Outcome.FATAL, Outcome.FATAL]
    assert "Incorrect API key provided: <key>" in seen[3].detail
    everything = caplog.text + repr(seen) + repr(settings) + "".join(map(repr, caplog.records))
    everything += "".join(path.read_bytes().decode("latin-1") for path in tmp_path.iterdir())
    assert CANARY not in everything and len(caplog.records) > 20


def test_a_key_that_no_header_can_hold_is_refused_without_being_shown(monkeypatch, caplog) -> None:
    monkeypatch.setenv("JUDGE_KEY", f"{CANARY}\n…")
    caplog.set_level(logging.DEBUG)
    with JudgeServer() as server:
        (reply,) = ask(settings_for(server, api_key_env="JUDGE_KEY"), question())
        assert reply.outcome is Outcome.FATAL and not server.records
    assert CANARY not in reply.detail + caplog.text
