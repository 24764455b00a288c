"""Limits against a brute-force count over every window of 60 seconds, on a clock that the test turns."""

import asyncio
import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.judge.client import JudgeClient
from rewards.judge.limits import QueueTimeout, RateWindow, Sent, Throttle
from rewards.judge.settings import JudgeSettings
from tests.fakes.judge_questions import TurnedClock

LONG = 1e9


def throttle(time: TurnedClock, *, concurrency=4, requests=None, tokens=None) -> tuple[Throttle, RateWindow]:
    window = RateWindow(requests, tokens, time.clock)
    return Throttle(concurrency, window, time.clock), window


def test_clients_of_one_endpoint_share_a_window_and_workers_its_rates():
    settings = JudgeSettings("m", "http://127.0.0.1:9/v1", None, requests_per_minute=10)
    one, same = JudgeClient(settings), JudgeClient(dataclasses.replace(settings, concurrency=2))
    other = JudgeClient(dataclasses.replace(settings, model="n"))
    assert one._window is same._window is not other._window
    one.share_rates(4)
    one.share_rates(4)  # by every reward that has it
    for _ in range(2):
        assert same._window.delay(1) == 0
        one._window.take(1)
    assert same._window.delay(1) > 0 and other._window.delay(1) == 0
    one.share_rates(100)
    assert 0 < same._window.delay(1) <= 60, "each keeps one request a minute"


async def enter(gate: Throttle, limit_s: float) -> None:
    """Send one small request."""
    async with gate.slot(1, limit_s):
        pass


def busiest(sent: list[tuple[float, int]]) -> tuple[int, int]:
    """Most requests and most tokens in any window [t, t + 60)."""
    windows = [[tokens for at, tokens in sent if start <= at < start + 60] for start, _ in sent]
    return max(len(window) for window in windows), max(sum(window) for window in windows)


ALLOWANCE = 200
CALLS = st.lists(
    st.tuples(
        st.integers(1, ALLOWANCE),  # upper bound on the tokens
        st.floats(0, 1),  # share of it that is billed
        st.sampled_from([0.0, 0.3, 7.0, 59.5, 60.0, 61.0]),  # seconds that the answer takes
        st.sampled_from([0.0, 0.0, 0.0, 30.0]),  # seconds that the endpoint then asks everybody to wait
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(
    calls=CALLS,
    concurrency=st.integers(1, 5),
    requests=st.none() | st.integers(1, 5),
    tokens=st.none() | st.just(ALLOWANCE),
)
def test_no_minute_holds_more_than_the_allowance(
    calls: Sequence[tuple[int, float, float, float]],
    concurrency: int,
    requests: int | None,
    tokens: int | None,
) -> None:
    time = TurnedClock()
    sent: list[tuple[float, int]] = []
    order: list[int] = []
    pauses: list[tuple[float, float]] = []
    inside = 0

    async def one(gate: Throttle, window: RateWindow, number: int) -> None:
        nonlocal inside
        most, share, seconds, pause = calls[number]
        async with gate.slot(most, LONG) as slot:
            inside += 1
            assert inside <= concurrency
            order.append(number)
            sent.append((time.time, round(most * share)))
            await time.clock.sleep(seconds)
            slot.tokens = round(most * share)
            if pause:
                window.pause(pause)
                pauses.append((time.time, time.time + pause))
            inside -= 1

    async def go() -> None:
        gate, window = throttle(time, concurrency=concurrency, requests=requests, tokens=tokens)
        await asyncio.gather(*(one(gate, window, number) for number in range(len(calls))))

    asyncio.run(go())
    assert order == list(range(len(calls))), "first come, first served"
    most_requests, most_tokens = busiest(sent)
    assert requests is None or most_requests <= requests
    assert tokens is None or most_tokens <= tokens
    assert not [at for at, _ in sent for start, end in pauses if start < at < end], "sent within a pause"


@pytest.mark.parametrize(("requests", "tokens"), [(7, None), (None, 900)])
def test_the_allowance_is_used(requests: int | None, tokens: int | None) -> None:
    time = TurnedClock()
    sent: list[tuple[float, int]] = []

    async def one(gate: Throttle) -> None:
        async with gate.slot(100, LONG):
            sent.append((time.time, 100))

    async def go() -> None:
        gate, _ = throttle(time, requests=requests, tokens=tokens)
        await asyncio.gather(*(one(gate) for _ in range(30)))

    asyncio.run(go())
    assert busiest(sent) == ((7, 700) if requests else (9, 900))
    assert time.time == 1000 + 60 * ((30 - 1) // (requests or 9)), "no longer than it must"


def test_a_bill_below_the_bound_lets_the_next_one_in() -> None:
    time = TurnedClock()
    window = RateWindow(None, 100, time.clock)
    first = window.take(80)
    assert window.delay(40) == 60
    first.tokens = 50  # the bill
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
            async with gate.slot(1, LONG):
                times.append(time.time)
        return times

    assert asyncio.run(go()) == [1030.0, 1030.0]


def test_a_turn_that_cannot_come_in_time_is_refused_at_once() -> None:
    time = TurnedClock()

    async def go() -> None:
        gate, window = throttle(time)
        window.pause(100)
        with pytest.raises(QueueTimeout) as refused:
            await enter(gate, 99)
        assert refused.value.args == (100,)
        await enter(gate, 101)  # its slot was given back

    asyncio.run(go())
    assert time.time == 1100


def test_places_in_flight_are_bounded_and_come_back() -> None:
    time = TurnedClock()
    inside, most = 0, 0

    async def one(gate: Throttle) -> None:
        nonlocal inside, most
        async with gate.slot(1, LONG):
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1

    async def go() -> None:
        gate, _ = throttle(time, concurrency=3)
        await asyncio.gather(*(one(gate) for _ in range(20)))

    asyncio.run(go())
    assert most == 3


def test_a_full_house_times_out_and_a_cancelled_wait_gives_its_place_back() -> None:
    time = TurnedClock()

    async def go() -> None:
        gate, _ = throttle(time, concurrency=1, requests=1)
        async with gate.slot(1, LONG):
            with pytest.raises(QueueTimeout):
                await enter(gate, 0.01)
        waiting = asyncio.create_task(enter(gate, LONG))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await enter(gate, LONG)

    asyncio.run(asyncio.wait_for(go(), 20))
