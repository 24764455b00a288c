"""Limits against a brute-force count over every window of 60 seconds, on a clock that the test turns."""

import asyncio
import random

import pytest

from rewards.judge.limits import QueueTimeout, RateWindow, Sent, Throttle
from tests.fakes.judge_questions import TurnedClock

LONG = 1e9


def throttle(time: TurnedClock, *, concurrency=4, requests=None, tokens=None) -> tuple[Throttle, RateWindow]:
    window = RateWindow(requests, tokens, time.clock)
    return Throttle(concurrency, window, time.clock), window


def busiest(sent: list[tuple[float, int]]) -> tuple[int, int]:
    """Most requests and most tokens in any window [t, t + 60)."""
    windows = [[tokens for at, tokens in sent if start <= at < start + 60] for start, _ in sent]
    return max(len(window) for window in windows), max(sum(window) for window in windows)


@pytest.mark.parametrize(("requests", "tokens"), [(7, None), (None, 900), (5, 700)])
def test_no_minute_holds_more_than_the_allowance(requests, tokens) -> None:
    time = TurnedClock()
    random.seed(3)
    sizes = [random.randint(1, 400) for _ in range(120)]
    sent: list[tuple[float, int]] = []

    async def one(gate: Throttle, size: int) -> None:
        slot = await gate.acquire(size, LONG)
        sent.append((time.time, size))
        await time.clock.sleep(random.random() * 3)
        gate.release(slot, None)

    async def go() -> None:
        gate, _ = throttle(time, requests=requests, tokens=tokens)
        await asyncio.gather(*(one(gate, size) for size in sizes))

    asyncio.run(go())
    assert [size for _, size in sent] == sizes, "first come, first served"
    most_requests, most_tokens = busiest(sent)
    assert requests is None or most_requests <= requests
    assert tokens is None or most_tokens <= tokens
    # and the allowance is used: the clock is turned by waits, some of them on account of one limit alone
    assert most_requests == requests or most_tokens > 0.5 * (tokens or LONG)


def test_a_bill_below_the_bound_lets_the_next_one_in() -> None:
    time = TurnedClock()
    window = RateWindow(None, 100, time.clock)
    first = window.take(80)
    assert window.delay(40) == 60
    first.tokens = 50  # what `release` does with the bill
    assert window.delay(40) == 0
    window.take(40)
    time.time += 10
    assert window.delay(60) == 50, "50 + 40 + 60 fit once the first has left the window"


def test_a_request_above_the_allowance_waits_for_an_empty_minute() -> None:
    time = TurnedClock()
    window = RateWindow(None, 100, time.clock)
    window.take(1)
    assert window.delay(5000) == 60
    time.time += 60
    assert window.delay(5000) == 0
    assert window.take(5000) == Sent(time.time, 100)
    assert window.delay(1) == 60


def test_a_pause_holds_everybody_and_is_never_shortened() -> None:
    time = TurnedClock()

    async def go() -> list[float]:
        gate, window = throttle(time)
        window.pause(30)
        window.pause(5)
        times = []
        for _ in range(2):
            gate.release(await gate.acquire(1, LONG), None)
            times.append(time.time)
        return times

    assert asyncio.run(go()) == [1030.0, 1030.0]


def test_a_turn_that_cannot_come_in_time_is_refused_at_once() -> None:
    time = TurnedClock()

    async def go() -> None:
        gate, window = throttle(time)
        window.pause(100)
        with pytest.raises(QueueTimeout) as refused:
            await gate.acquire(1, 99)
        assert refused.value.wait_s == 100
        gate.release(await gate.acquire(1, 101), None)  # its place was given back

    asyncio.run(go())
    assert time.time == 1100


def test_places_in_flight_are_bounded_and_come_back() -> None:
    time = TurnedClock()
    inside, most = 0, 0

    async def one(gate: Throttle) -> None:
        nonlocal inside, most
        slot = await gate.acquire(1, LONG)
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0)
        inside -= 1
        gate.release(slot, 1)

    async def go() -> None:
        gate, _ = throttle(time, concurrency=3)
        await asyncio.gather(*(one(gate) for _ in range(20)))

    asyncio.run(go())
    assert most == 3


def test_a_full_house_times_out_and_a_cancelled_wait_gives_its_place_back() -> None:
    time = TurnedClock()

    async def go() -> None:
        gate, window = throttle(time, concurrency=1, requests=1)
        slot = await gate.acquire(1, LONG)
        with pytest.raises(QueueTimeout):
            await gate.acquire(1, 0.01)
        gate.release(slot, None)
        waiting = asyncio.create_task(gate.acquire(1, LONG))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        gate.release(await gate.acquire(1, LONG), None)

    asyncio.run(asyncio.wait_for(go(), 20))
