"""What goes over the wire and what each answer comes to, against a server that speaks real HTTP."""

import pytest
from PIL import Image

from rewards.judge.messages import Outcome
from rewards.judge.wire import retry_after
from tests.fakes.judge_plays import COMPLETION_TOKENS, PLAYS, PROMPT_TOKENS, SNAPSHOT, Play
from tests.fakes.judge_questions import ask, picture, question, settings_for
from tests.fakes.judge_server import JudgeServer, pixels_sha256

ATTEMPTS = 3

SAID = {
    "ok", "slow", "fenced", "prose", "single_quotes", "trailing_comma", "out_of_range", "nan", "nonsense",
}  # fmt: skip
"""Finished answers: whether they hold a grade is for the protocols to say."""

FAILED = {
    "empty": (Outcome.MALFORMED, 1),
    "tool_calls": (Outcome.MALFORMED, 1),
    "refusal": (Outcome.REFUSED, 1),
    "filtered": (Outcome.FILTERED, 1),
    "filtered_400": (Outcome.FILTERED, 1),
    "azure_400": (Outcome.FILTERED, 1),
    "truncated": (Outcome.TRUNCATED, 1),
    "truncated_whole": (Outcome.TRUNCATED, 1),
    "bad_request": (Outcome.FATAL, 1),
    "unauthorized": (Outcome.FATAL, 1),
    "forbidden": (Outcome.FATAL, 1),
    "not_found": (Outcome.FATAL, 1),
    "too_large": (Outcome.REJECTED, 1),
    "bad_image": (Outcome.REJECTED, 1),
    "unprocessable": (Outcome.REJECTED, 1),
    "quota": (Outcome.FATAL, 1),
    "rate_limited": (Outcome.RATE_LIMITED, ATTEMPTS),
    "request_timeout": (Outcome.TIMEOUT, ATTEMPTS),
    "too_early": (Outcome.UNAVAILABLE, ATTEMPTS),
    "error_500": (Outcome.UNAVAILABLE, ATTEMPTS),
    "overloaded": (Outcome.UNAVAILABLE, ATTEMPTS),
    "no_choices": (Outcome.UNAVAILABLE, ATTEMPTS),
    "error_200": (Outcome.UNAVAILABLE, ATTEMPTS),
    "not_json": (Outcome.UNAVAILABLE, ATTEMPTS),
    "web_page": (Outcome.UNAVAILABLE, ATTEMPTS),
    "reset": (Outcome.UNAVAILABLE, ATTEMPTS),
    "reset_in_body": (Outcome.UNAVAILABLE, ATTEMPTS),
}
"""By play, the outcome and the number of requests it takes."""


@pytest.fixture(scope="module")
def server():
    with JudgeServer() as started:
        yield started


@pytest.fixture
def play(server):
    """Makes the server answer every request with one play; returns the requests it gets from then on."""

    def set_play(kind: str, **details) -> list:
        server.plays = [[Play(kind, times=0, **details), 0]]
        server.records.clear()
        return server.records

    yield set_play
    server.plays = []


def test_every_play_is_accounted_for() -> None:
    assert SAID | set(FAILED) == set(PLAYS) | {"reset", "reset_in_body"}


@pytest.mark.parametrize("kind", sorted(SAID))
def test_a_finished_answer_is_ok_as_it_was_said(server, play, kind) -> None:
    records = play(kind)
    (reply,) = ask(settings_for(server), question())
    assert reply.outcome is Outcome.OK
    assert reply.text and reply.detail == ""
    assert (reply.prompt_tokens, reply.completion_tokens) == (PROMPT_TOKENS, COMPLETION_TOKENS)
    assert (reply.model, reply.attempts, reply.cached) == (SNAPSHOT, 1, False)
    assert len(records) == 1


@pytest.mark.parametrize("kind", sorted(FAILED))
def test_a_failure_has_its_outcome_and_no_text(server, play, kind) -> None:
    records = play(kind)
    (reply,) = ask(settings_for(server, attempts=ATTEMPTS), question())
    outcome, requests = FAILED[kind]
    assert reply.outcome is outcome
    assert reply.text == "" and reply.choices == ()
    assert server.base_url in reply.detail
    assert reply.attempts == requests
    assert [record.attempt - records[0].attempt for record in records] == list(range(requests))


def test_a_slow_answer_is_a_timeout(server, play) -> None:
    records = play("slow", seconds=5.0)
    (reply,) = ask(settings_for(server, attempts=2, timeout_s=0.5), question())
    assert (reply.outcome, reply.text, reply.attempts) == (Outcome.TIMEOUT, "", 2)
    assert len(records) == 2


def test_a_dead_endpoint_is_unavailable_by_name(server) -> None:
    (reply,) = ask(settings_for(server, base_url="http://127.0.0.1:9/v1"), question())
    assert (reply.outcome, reply.attempts) == (Outcome.UNAVAILABLE, 3)
    assert "http://127.0.0.1:9/v1" in reply.detail


@pytest.mark.parametrize("image_format", ["png", "jpeg"])
def test_the_request_says_what_the_question_says(server, play, image_format) -> None:
    records = play("ok")
    source, result = picture(10, (16, 12)), picture(200, (8, 20))
    schema = {"type": "object", "properties": {"reasoning": {"type": "string"}}}
    asked = question(
        parts=("before", source, "after", result, "grade"), system="Be exact.", response_schema=schema,
        max_tokens=77, top_logprobs=5, ask=2,
    )  # fmt: skip
    ask(settings_for(server, image_format=image_format, temperature=0.5, seed=40), asked)
    (record,) = records
    assert record.model == "judge"
    assert record.system == "Be exact."
    assert record.parts == ("text", "image", "text", "image", "text")
    assert record.text == "before\nafter\ngrade"
    assert record.mimes == record.magics == (f"image/{image_format}",) * 2
    if image_format == "png":
        assert record.images == (pixels_sha256(source), pixels_sha256(result)), "the pixels arrive, in order"
    form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    assert record.arguments == {
        "max_completion_tokens": 77, "temperature": 0.5, "seed": 42, "response_format": form, "logprobs": True,
        "top_logprobs": 5,
    }  # fmt: skip


def test_what_is_not_set_is_not_sent(server, play) -> None:
    records = play("ok")
    ask(settings_for(server, temperature=None, seed=None), question(system=""))
    assert records[0].arguments == {"max_completion_tokens": 64}
    assert records[0].system == "" and records[0].token_sha256 is None


def test_a_grey_picture_travels_as_rgb(server, play) -> None:
    records = play("ok")
    grey = Image.new("L", (5, 4), 90)
    ask(settings_for(server), question(parts=("x", grey)))
    assert records[0].images == (pixels_sha256(grey.convert("RGB")),)


def test_log_probabilities_come_best_first(server, play) -> None:
    play("ok", content="8\n", top=((("7", -1.5), ("8", -0.4)), (("\n", 0.0),)))
    (reply,) = ask(settings_for(server), question(top_logprobs=3))
    assert [choice.token for choice in reply.choices] == ["8", "\n"]
    assert reply.choices[0].alternatives == (("8", -0.4), ("7", -1.5))


def test_log_probabilities_survive_the_token_limit_but_the_text_does_not(server, play) -> None:
    play("truncated_whole", content="8x")
    (reply,) = ask(settings_for(server), question(top_logprobs=3))
    assert (reply.outcome, reply.text) == (Outcome.TRUNCATED, "")
    assert [choice.token for choice in reply.choices] == ["8", "x"]


def test_an_answer_without_the_log_probabilities_is_malformed(server, play) -> None:
    play("ok", content="8", top=())
    (reply,) = ask(settings_for(server), question(top_logprobs=3))
    assert (reply.outcome, reply.text) == (Outcome.MALFORMED, "")
    assert "viescore" in reply.detail


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0.0),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after": "soon"}, 0.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "nan"}, 0.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 60.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:10 GMT"}, 0.0),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m2.5s"}, 62.5),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "20ms"}, 0.02),
        ({"x-ratelimit-remaining-tokens": "9", "x-ratelimit-reset-tokens": "9s"}, 0.0),
    ],
)
def test_how_long_an_endpoint_asks_to_wait(headers, seconds) -> None:
    assert retry_after(headers, now=40.0) == pytest.approx(seconds)
