"""Calls of one reward that take turns: the clock of each begins with its work, and who has gone does not work."""

import asyncio
import time

import pytest

from rewards.base import RewardSpec
from rewards.loading import load_reward
from rewards.overlap import OverlappingCalls
from rewards.scoring import score_group
from tests.rewards.test_reward_scoring import KEYWORDS

TURNS = f"""
passes = []

def work(count):
    passes.append(1)
    time.sleep(0.25)
    return [1.0] * count

class Locked:
    def __init__(self):
        self.lock = asyncio.Lock()
    async def score(self, {KEYWORDS}):
        async with self.lock:
            return await asyncio.to_thread(work, len(images))

class Held:
    def __init__(self):
        self.lock = threading.Lock()
    async def score(self, {KEYWORDS}):
        def held():
            with self.lock:
                return work(len(images))
        return await asyncio.to_thread(held)

def plain({KEYWORDS}):
    return work(len(images))
"""


@pytest.mark.parametrize("form", ["Locked", "Held", "plain"])
def test_no_group_is_unscored_because_it_queued(load, batch, form):
    """Four groups at once take .25 s each, one after the other, and the limit is .6 s."""
    loaded = load(TURNS, form, timeout_s=0.6)

    async def four():
        return await asyncio.gather(*(score_group(k, [loaded], batch) for k in range(4)))

    groups = asyncio.run(four())
    assert [group.rewards for group in groups] == [[1.0] * 4] * 4
    assert [group.attempts for group in groups] == [{"own": 1}] * 4
    state = loaded.function.__globals__ if form == "plain" else type(loaded.owner).score.__globals__
    assert len(state["passes"]) == 4


def test_a_call_that_gave_up_its_turn_does_not_work(load, batch):
    loaded = load(TURNS, "plain", timeout_s=60.0)

    async def leave():
        first, second = (asyncio.ensure_future(score_group(k, [loaded], batch)) for k in range(2))
        await asyncio.sleep(0.05)
        second.cancel()
        await first

    asyncio.run(leave())
    time.sleep(0.1)
    assert len(loaded.function.__globals__["passes"]) == 1


def test_what_the_calls_before_leave_of_their_time_is_given_back():
    async def run():
        calls, ends = OverlappingCalls(), [asyncio.Event() for _ in range(3)]
        running = [asyncio.ensure_future(calls.run(event.wait, 60.0)) for event in ends]
        await asyncio.sleep(0)

        def left():
            now = asyncio.get_running_loop().time()
            return [
                round((call.limit.when() - now) / 60.0, 1) for own in calls._of_loop.values() for call in own
            ]

        seen = [left()]
        for k in (1, 0, 2):
            ends[k].set()
            await running[k]
            seen.append(left())
        return seen

    assert asyncio.run(run()) == [[1.0, 2.0, 3.0], [1.0, 2.0], [1.0], []]


def test_calls_that_hang_all_end_one_limit_after_the_other():
    async def run():
        calls, started = OverlappingCalls(), time.monotonic()

        async def hang():
            with pytest.raises(TimeoutError):
                await calls.run(lambda: asyncio.sleep(60), 0.1)
            return time.monotonic() - started

        return await asyncio.gather(*(hang() for _ in range(3)))

    assert [took >= (k + 1) * 0.1 for k, took in enumerate(asyncio.run(run()))] == [True] * 3


def test_rewards_of_one_detector_share_their_turn():
    params = {"detector": "shapes", "colors": "detector"}
    one, other = (load_reward(RewardSpec(name, params=params)) for name in ("geneval", "geneval_strict"))
    another = load_reward(RewardSpec("geneval", params=params | {"batch_size": 3}))
    assert one.thread is other.thread and another.thread is not one.thread
