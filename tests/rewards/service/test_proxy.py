"""What a proxy between a run and its reward service says of the moment is waited out; the scores stay the service's."""

import asyncio
import json
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from PIL import Image

from rewards.base import FatalRewardError, RewardSpec, ServiceSpec
from rewards.service import endpoints
from rewards.service.client import ServedReward
from rewards.service.wire import fingerprint

NAME = "x.py:bright"
GOOD = json.dumps({"scores": [0.25, 0.75], "components": {}, "sha256": "s"}).encode()
LISTED = {"fingerprint": fingerprint(NAME, {}), "ready": True, "name": NAME, "sha256": "s"}
PAGE = b"<html>busy</html>"


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(endpoints, "DOWN_S", 0.01)
    monkeypatch.setattr(endpoints, "POLL_S", 0.01)


@contextmanager
def proxy(*plays, listing=()):
    """A service behind a proxy that answers the first requests itself, by `plays`: (status, body, headers).

    listing: the same for the list of rewards. Yields its URL and the times at which it was asked to score.
    """
    asked, scoring, looking = [], list(plays), list(listing)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            asked.append(time.monotonic())
            self.reply(*(scoring.pop(0) if scoring else (200, GOOD)))

        def do_GET(self):
            good = json.dumps({"rewards": {"bright": LISTED}}).encode()
            self.reply(*(looking.pop(0) if looking else (200, good)))

        def reply(self, status, body, headers=()):
            self.send_response(status)
            for name, value in [*headers, ("content-length", str(len(body)))]:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join(timeout=10)


def served(url, unavailable_s=30.0):
    return ServedReward(
        RewardSpec(NAME, timeout_s=10, service=ServiceSpec((url,), unavailable_s=unavailable_s))
    )


def score(reward):
    images = [Image.new("RGB", (8, 8))] * 2
    call = reward.score(images=images, prompts=["a"] * 2, references=[[]] * 2, metadata=[{}] * 2)
    return asyncio.run(call).scores


@pytest.mark.parametrize(
    "play",
    [(408, PAGE), (425, PAGE), (429, PAGE), (502, PAGE), (200, PAGE), (200, b""), (200, GOOD[:10])],
    ids=["408", "425", "429", "502", "page", "empty", "half"],
)
def test_a_fault_of_the_moment_costs_no_sample(play):
    with proxy(play, listing=[play]) as (url, asked):
        assert score(served(url)) == [0.25, 0.75]
    assert len(asked) == 2


def test_retry_after_is_honoured():
    with proxy((429, PAGE, [("retry-after", "0.3")])) as (url, asked):
        assert score(served(url)) == [0.25, 0.75]
    assert asked[1] - asked[0] >= 0.3


def test_readiness_waits_as_long_as_it_was_asked_to():
    start = time.monotonic()
    with proxy(listing=[(429, PAGE, [("retry-after", "0.3")])]) as (url, _):
        assert asyncio.run(served(url).readiness()) == []
    assert time.monotonic() - start >= 0.3


def test_a_limit_that_is_never_lifted_stops_the_run_by_name():
    said = r"no service answered for service.unavailable_s=0.3 s: .*HTTP 429"
    with (
        proxy(*[(429, PAGE)] * 99, listing=[(429, PAGE)] * 99) as (url, _),
        pytest.raises(FatalRewardError, match=said),
    ):
        score(served(url, unavailable_s=0.3))


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_wrong_address_stops_the_run_at_once(status):
    with (
        proxy((status, PAGE)) as (url, asked),
        pytest.raises(FatalRewardError, match=f"HTTP {status}, which no"),
    ):
        score(served(url))
    assert len(asked) == 1
