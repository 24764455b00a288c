"""The next step's conditioning begins early, and whatever is wrong with it is left to its own turn."""

import time

import pytest
import ray

from core.cluster.dispatch import Dispatcher
from core.failures import DataFailure
from core.progress import Progress
from core.prompts import Prompt
from rl.workers.ahead import HeadStart
from rl.workers.collect import Collector
from rl.workers.requests import RolloutRequest
from rollout.engine import SampleInfo
from rollout.sampler import SamplingSpec
from rollout.worker import Policy


class Encoder:
    """Encodes a prompt to its own text, and knows what it was asked for."""

    def __init__(self):
        self.asked = []

    def ready(self):
        return True

    def encode_apart(self, prompts, size):
        self.asked += [prompt.prompt for prompt in prompts]
        if self.asked[-1] == "bad":
            raise DataFailure("cannot be read")
        return len(prompts), *[f"c {prompt.prompt}" for prompt in prompts]

    def seen(self):
        return self.asked


class Sampler:
    """Draws the text of its conditioning."""

    def ready(self):
        return True

    def sample(self, request, spec, policy, negative, conditioning):
        return (
            SampleInfo(request.group_id, request.first, 1, "a" * 64, 0.0, 0.1, "node:1"),
            conditioning,
            conditioning,
        )


def request_of(number, text):
    return RolloutRequest(number, (Prompt(number, "t2i", text),), (1, 2))


@pytest.fixture(scope="module")
def encoder(ray_session):
    return ray.remote(Encoder).remote()


def wait_for(encoder, text):
    deadline = time.monotonic() + 60
    while text not in ray.get(encoder.seen.remote(), timeout=60):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_is_there_is_taken_once_and_only_for_its_own_request(encoder):
    ahead, good, bad = HeadStart(), request_of(1, "good"), request_of(2, "bad")
    ahead.begin([good, bad], [encoder])
    wait_for(encoder, "bad")
    assert ahead.take(request_of(1, "another of that number")) is None
    assert ray.get(list(ahead.take(good)), timeout=60) == ["c good"]
    assert ahead.take(good) is None
    assert ahead.take(bad) is None, "its own turn tells what is wrong"
    ahead.begin([good], [])
    assert ahead.take(good) is None


def test_a_step_that_was_encoded_ahead_is_sampled_from_that(encoder):
    dispatcher = Dispatcher(call_timeout_s=60, start_timeout_s=60)
    dispatcher.add_pool("encode", [encoder])
    dispatcher.add_pool("rollout", [ray.remote(Sampler).remote()])
    own = Collector(dispatcher, Progress())
    requests = [request_of(10 + k, f"p{k}") for k in range(5)]
    own.encode_ahead(requests)  # two
    wait_for(encoder, "p1")
    assert "p2" not in ray.get(encoder.seen.remote(), timeout=60)
    drawn = list(
        own.sample(requests, SamplingSpec(4, 0.0, 1.0, variant="ode"), Policy(1, "a" * 64, ()), step=1)
    )
    texts = {result.request.id: ray.get(result.chunks[0].images, timeout=60) for result in drawn}
    assert texts == {10 + k: f"c p{k}" for k in range(5)}
    asked = ray.get(encoder.seen.remote(), timeout=60)
    assert [asked.count(f"p{k}") for k in range(5)] == [1] * 5
