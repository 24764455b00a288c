"""The budget: bounds by hand, a count that two processes share, and a stop that can be gone on from."""

import math
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rewards.judge.budget import (
    NANO,
    Amount,
    Budget,
    BudgetExhausted,
    Price,
    bill,
    cost_lines,
    image_tokens,
    most_of,
    price_of,
)
from rewards.judge.client import JudgeClient
from rewards.judge.messages import Outcome
from rewards.judge.settings import JudgeSettings
from tests.fakes.judge_plays import COMPLETION_TOKENS, PROMPT_TOKENS, Play
from tests.fakes.judge_questions import ask, picture, question, settings_for
from tests.fakes.judge_server import JudgeServer


def ledger_of(path) -> SimpleNamespace:
    """What a ledger file says."""
    row = sqlite3.connect(path).execute("SELECT * FROM ledger").fetchone() or (1, 0, 0, 0, 0, 0)
    return SimpleNamespace(spent=Amount(*row[1:3]), held=Amount(*row[3:5]), requests=row[5])


ROOT = Path(__file__).resolve().parents[3]
BILLED = PROMPT_TOKENS + COMPLETION_TOKENS
MOST = sum(most_of(JudgeSettings("judge"), question()))


@pytest.mark.parametrize(
    ("size", "detail", "tokens"),
    [
        ((512, 512), "high", 85 + 170),
        ((512, 513), "high", 85 + 2 * 170),
        ((1024, 1024), "high", 85 + 4 * 170),  # 768 x 768
        ((2048, 4096), "high", 85 + 6 * 170),  # 1024 x 2048, then 768 x 1536
        ((4096, 512), "high", 85 + 4 * 170),  # 2048 x 256
        ((1024, 1024), "auto", 85 + 4 * 170),
        ((4096, 8192), "low", 85),
    ],
)
def test_the_tile_rule_by_hand(size, detail, tokens) -> None:
    assert image_tokens("gpt-4.1", size, detail) == tokens
    assert image_tokens("gpt-4.1-2025-04-14", size, detail) == tokens


def test_an_unknown_model_is_bounded_by_small_patches() -> None:
    assert image_tokens("qwen", (512, 512), "high") == 37 * 37
    assert image_tokens("qwen", (28, 28), "high") == 85 + 170
    # the mini models cost 1.62 and 2.46 per patch of 32 x 32, at most 1536 patches
    for side in (32, 512, 768, 1024, 2048):
        patches = min(1536, math.ceil(side / 32) ** 2)
        assert image_tokens("gpt-4.1-nano", (side, side), "high") >= math.ceil(2.46 * patches)


def lines_of(settings: JudgeSettings, count: int, **changes) -> str:
    """The estimate for `count` samples that are each asked one question."""
    asked = SimpleNamespace(request=lambda ask: question(**changes))
    return "\n".join(cost_lines(settings, [asked], images=count, max_asks=1))


def test_an_estimate_by_hand() -> None:
    shape = {"system": "s" * 400, "parts": ("t" * 600, *[picture(size=(512, 512))] * 2), "max_tokens": 300}
    prompt = 10 * (32 + 1000 + 2 * 255)
    lines = lines_of(JudgeSettings("gpt-4.1"), 10, **shape)
    assert f"10 calls (1 per image); at most {prompt:,} prompt and 3,000 completion tokens, $" in lines
    assert f"${(prompt * 2 + 3000 * 8) / 1e6:,.2f} (list prices" in lines
    assert price_of(JudgeSettings("qwen")) is None
    assert "cost unknown" in lines_of(JudgeSettings("qwen"), 1, **shape)
    priced = JudgeSettings("qwen", price_per_million_input=1.0, price_per_million_output=0.0)
    prompt, completion = most_of(priced, question(system="s" * 8, parts=("t" * 60,), max_tokens=9))
    assert (prompt, completion) == (100, 9)
    assert bill(price_of(priced), prompt, completion).nano_usd / NANO == 1e-4
    assert price_of(JudgeSettings("gpt-4.1-2025-04-14")) == Price(2.0, 8.0)
    assert price_of(JudgeSettings("gpt-4.1-x")) is None


def test_a_bound_counts_text_by_bytes_with_the_schema() -> None:
    asked = question("Größe", system="é", response_schema={"a": 1})
    prompt, completion = most_of(JudgeSettings("gpt-4.1"), asked)
    assert prompt == 32 + len("Größe".encode()) + 2 + len('{"a": 1}') + 255
    assert completion == asked.max_tokens
    assert bill(Price(0.1, 0.4), 3, 2) == Amount(3 * 100 + 2 * 400, 5)


@pytest.mark.parametrize(
    ("limits", "key"),
    [
        ({"max_nano_usd": 100, "max_tokens": None}, "max_cost_usd"),
        ({"max_nano_usd": None, "max_tokens": 100}, "max_total_tokens"),
    ],
)
def test_holds_count_until_they_are_settled(tmp_path, limits, key) -> None:
    budget = Budget(str(tmp_path / "ledger"), **limits)
    budget.hold(Amount(60, 60))
    with pytest.raises(BudgetExhausted, match=f"raise {key} and resume"):
        budget.hold(Amount(41, 41))
    budget.settle(Amount(60, 60), Amount(10, 10))
    budget.hold(Amount(90, 90))
    ledger = ledger_of(tmp_path / "ledger")
    assert (ledger.spent, ledger.held, ledger.requests) == (Amount(10, 10), Amount(90, 90), 2)
    with pytest.raises(BudgetExhausted):  # the hold of a worker that died stays
        budget.hold(Amount(1, 1))


SPEND = """
import random, sys
from rewards.judge.budget import Amount, Budget, BudgetExhausted
budget, sent = Budget(sys.argv[1], max_nano_usd=None, max_tokens=400), 0
try:
    while True:
        budget.hold(Amount(0, 7))
        sent += 1
        budget.settle(Amount(0, 7), Amount(0, random.randint(3, 7)))
except BudgetExhausted:
    print(sent)
"""


def test_two_processes_spend_from_one_budget(tmp_path) -> None:
    path = str(tmp_path / "ledger")
    workers = [
        subprocess.Popen([sys.executable, "-c", SPEND, path], cwd=ROOT, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    sent = [int(worker.communicate(timeout=120)[0]) for worker in workers]
    ledger = ledger_of(path)
    assert ledger.held == Amount(0, 0)
    assert 400 - 2 * 7 < ledger.spent.tokens <= 400
    assert ledger.requests == sum(sent) >= 400 / 7


def test_an_exhausted_budget_sends_nothing_and_the_run_can_go_on(tmp_path) -> None:
    """Two clients share the ledger; the second finds it used up by the first."""
    texts = [f"content - how {number}" for number in range(6)]
    cache = str(tmp_path / "answers.sqlite")
    limit = 3 * BILLED + MOST
    with JudgeServer() as server:
        settings = settings_for(server, cache=cache, max_total_tokens=limit, concurrency=1)
        first = ask(settings, *map(question, texts[:3]))
        assert [reply.outcome for reply in first] == [Outcome.OK] * 3
        rest = ask(settings, *map(question, texts))
        assert [reply.cached for reply in rest[:3]] == [True] * 3
        assert sorted(reply.outcome for reply in rest[3:]) == [Outcome.FATAL, Outcome.FATAL, Outcome.OK]
        for stopped in (reply for reply in rest if reply.outcome is Outcome.FATAL):
            assert stopped.attempts == 0
            assert f"max_total_tokens {limit}" in stopped.detail and str(4 * BILLED) in stopped.detail
        assert len(server.records) == 4
        settings = settings_for(server, cache=cache, max_total_tokens=limit + 2 * BILLED, concurrency=1)
        resumed = ask(settings, *map(question, texts))
        assert [reply.outcome for reply in resumed] == [Outcome.OK] * 6
        assert len(server.records) == 6


ASK = """
import sys
from tests.fakes.judge_questions import ask, question, settings_for
from types import SimpleNamespace
url, ledger, limit, name = sys.argv[1:]
settings = settings_for(SimpleNamespace(base_url=url), ledger=ledger, max_total_tokens=int(limit), concurrency=2)
print(*(r.outcome for r in ask(settings, *(question(f"content - how {name} {n}") for n in range(12)))))
"""


def test_two_workers_stop_at_one_budget(tmp_path) -> None:
    """Each could ask twelve questions; together they get as many answers as the budget holds, and ask no more."""
    ledger, limit = str(tmp_path / "ledger"), 8 * BILLED + MOST
    with JudgeServer([Play("slow", times=0, seconds=0.05)]) as server:
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", ASK, server.base_url, ledger, str(limit), name],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )  # fmt: skip
            for name in ("one", "two")
        ]
        outcomes = " ".join(worker.communicate(timeout=120)[0] for worker in workers).split()
        asked = len(server.records)
    assert len(outcomes) == 24 and set(outcomes) == {"ok", "fatal"}
    assert outcomes.count("ok") == asked
    # at most the four in flight keep the last requests out until they are settled
    assert limit - 4 * MOST < asked * BILLED <= limit
    found = ledger_of(ledger)
    assert (found.spent.tokens, found.requests) == (asked * BILLED, asked)


def test_money_is_spent_as_billed_at_the_known_price(tmp_path) -> None:
    ledger = str(tmp_path / "ledger")
    with JudgeServer() as server:
        settings = settings_for(server, model="gpt-4.1", ledger=ledger, max_cost_usd=1.0)
        ask(settings, question())
    spent = ledger_of(ledger).spent
    assert spent.nano_usd / NANO == pytest.approx((PROMPT_TOKENS * 2 + COMPLETION_TOKENS * 8) / 1e6)


@pytest.mark.parametrize(
    ("kind", "spent_holds"),
    [("error_500", 0), ("rate_limited", 0), ("unauthorized", 0), ("reset", 2), ("request_timeout", 2)],
)
def test_a_failure_is_paid_where_the_endpoint_may_have_billed_it(tmp_path, kind, spent_holds) -> None:
    ledger = str(tmp_path / "ledger")
    with JudgeServer([Play(kind, times=0)]) as server:
        ask(settings_for(server, ledger=ledger, max_total_tokens=10**6, attempts=2), question())
    found = ledger_of(ledger)
    assert found.spent.tokens == spent_holds * MOST and found.held == Amount(0, 0)


def test_an_endpoint_that_is_down_costs_nothing(tmp_path) -> None:
    ledger = str(tmp_path / "ledger")
    settings = JudgeSettings(
        "judge",
        "http://127.0.0.1:9/v1",
        None,
        ledger=ledger,
        max_total_tokens=10**6,
        attempts=4,
        longest_wait_s=0.01,
    )
    (reply,) = ask(settings, question())
    assert (reply.outcome, reply.attempts) == (Outcome.UNAVAILABLE, 4)
    assert ledger_of(ledger).spent == Amount(0, 0)


def test_a_question_too_large_for_the_budget_is_never_sent(tmp_path) -> None:
    large = question(parts=("x", picture(size=(1024, 1024))))
    with JudgeServer() as server:
        settings = settings_for(server, ledger=str(tmp_path / "ledger"), max_total_tokens=1000)
        (reply,) = ask(settings, large)
        assert reply.outcome is Outcome.FATAL and not server.records


def test_settings_name_what_a_budget_lacks() -> None:
    lost = JudgeSettings("gpt-4.1", max_cost_usd=1.0).problems()
    assert len(lost) == 1 and "ledger" in lost[0]
    unpriced = JudgeClient(JudgeSettings("qwen", api_key_env=None, cache="a", max_cost_usd=1.0)).problems()
    assert len(unpriced) == 1 and "price_per_million_input" in unpriced[0]
    assert not JudgeSettings("qwen", cache="a", max_total_tokens=1).problems()
