"""A judge's endpoint that means harm: the question ends in time, with bounded memory and a reason, unanswered."""

import time

import pytest

from rewards.answers import MOST_BYTES
from rewards.judge.messages import Outcome
from tests.fakes.hostile_endpoint import HostileEndpoint
from tests.fakes.judge_questions import ask, question, settings_for

SPARE = 16 * 2**20  # what the kernel holds of a connection


@pytest.mark.parametrize(
    ("kind", "outcome", "text"),
    [
        ("endless", Outcome.UNAVAILABLE, f"larger than {MOST_BYTES} bytes"),
        ("dripping", Outcome.TIMEOUT, "no answer within timeout_s"),
        ("gzip bomb", Outcome.UNAVAILABLE, "content-encoding 'gzip', which was not asked for"),
        ("nested", Outcome.UNAVAILABLE, "no JSON"),
        ("redirect for ever", Outcome.FATAL, "HTTP 307 to http://127.0.0.1:"),
    ],
)
def test_a_hostile_endpoint(kind, outcome, text) -> None:
    with HostileEndpoint(kind) as endpoint:
        start = time.monotonic()
        timeout_s = 0.5 if kind == "dripping" else 10.0
        (reply,) = ask(settings_for(endpoint, attempts=1, timeout_s=timeout_s), question())
        assert (reply.outcome, reply.text) == (outcome, "") and text in reply.detail
        assert time.monotonic() - start < 10 and endpoint.sent < MOST_BYTES + SPARE
        assert len(endpoint.asked) == 1


def test_neither_key_nor_pictures_follow_a_redirect(monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    with HostileEndpoint("nested") as other, HostileEndpoint("redirect", other.url) as endpoint:
        (reply,) = ask(settings_for(endpoint, api_key_env="JUDGE_KEY"), question())
    assert reply.outcome is Outcome.FATAL and f"{other.url}/further" in reply.detail
    assert other.asked == [] and len(endpoint.asked) == 1
