"""Which of several equal services is asked next, and when one that failed is asked again."""

from rewards.service import endpoints
from rewards.service.endpoints import Endpoints


def test_the_least_busy_endpoint_is_next_and_equals_take_turns():
    spread = Endpoints(["a", "b", "c"])
    turns = []
    for _ in range(4):
        with spread.borrow() as endpoint:
            turns.append(endpoint.url)
    assert turns == ["a", "b", "c", "a"]
    with spread.borrow() as first, spread.borrow() as second, spread.borrow() as third:
        assert {first.url, second.url, third.url} == {"a", "b", "c"}
        assert [endpoint.in_flight for endpoint in spread.all] == [1, 1, 1]
    assert [endpoint.in_flight for endpoint in spread.all] == [0, 0, 0]


def test_an_endpoint_that_failed_is_left_alone_then_tried_by_one_caller(monkeypatch):
    monkeypatch.setattr(endpoints, "DOWN_S", 30.0)
    spread = Endpoints(["a", "b"])
    with spread.borrow() as failing:
        spread.failed(failing, "refused")
    with spread.borrow() as one, spread.borrow() as two:
        assert (one.url, two.url) == ("b", "b")
    failing.down_until = 0.0
    with spread.borrow() as trying, spread.borrow() as other:
        assert (trying.url, other.url) == ("a", "b")
        spread.works(trying)
    with spread.borrow() as one, spread.borrow() as two:
        assert {one.url, two.url} == {"a", "b"}
    for endpoint in spread.all:
        with spread.borrow():
            spread.failed(endpoint, "refused")
    with spread.borrow() as none:
        assert none is None
    assert 0 < spread.wait_s() <= 30.0 and spread.faults() == "a (refused), b (refused)"
