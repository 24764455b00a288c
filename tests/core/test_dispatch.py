"""The dispatcher on real Ray actors that crash, hang, refuse and recover."""

import gc
import os
import time

import pytest
import ray

from core.cluster import workers
from core.cluster.actors import wait_ready
from core.cluster.dispatch import Dispatcher, PoolExhausted
from core.cluster.workers import Call
from core.failures import ClusterError, DataFailure, InfrastructureFailure


class Worker:
    """Answers with its process id. A marker file makes a failure happen once, in whichever process comes first."""

    def ready(self):
        return True

    def work(self, marker, how):
        if marker and not os.path.exists(marker):
            open(marker, "w").close()
            if how == "crash":
                os._exit(1)
            if how == "hang":
                time.sleep(600)
            if how == "infrastructure":
                raise InfrastructureFailure("no memory at present")
            if how == "data":
                raise DataFailure("this prompt is broken")
            if how == "bug":
                raise KeyError("a bug")
        return os.getpid(), how

    def always_crash(self):
        os._exit(1)


def make_dispatcher(count, *, restarts=2, floor=1, call_timeout_s=60.0):
    actor = ray.remote(Worker).options(num_cpus=0.1, max_restarts=restarts)
    handles = [actor.remote() for _ in range(count)]
    ray.get([h.ready.remote() for h in handles], timeout=240)
    dispatcher = Dispatcher(call_timeout_s=call_timeout_s, start_timeout_s=240)
    dispatcher.add_pool("rollout", handles, floor=floor)
    return dispatcher, handles


@pytest.fixture(autouse=True)
def no_worker_is_left(ray_session):
    """Actors end when their last handle goes; a failed test's traceback would hold one."""
    yield
    gc.collect()


def finish(dispatcher):
    done = []
    while dispatcher.outstanding():
        done.append(dispatcher.wait())
    return done


@pytest.mark.parametrize("how", ["crash", "infrastructure"])
def test_a_failed_call_is_made_again_and_all_others_finish(ray_session, tmp_path, how):
    dispatcher, _ = make_dispatcher(2)
    for key in range(6):
        marker = str(tmp_path / "once") if key == 2 else ""
        dispatcher.submit(Call("rollout", key, "work", (marker, how)))
    assert sorted(d.call.key for d in finish(dispatcher)) == list(range(6))
    assert dispatcher.redispatched >= 1


def test_a_hung_worker_is_restarted_and_its_call_made_again(ray_session, tmp_path):
    dispatcher, _ = make_dispatcher(1, call_timeout_s=4.0)
    dispatcher.submit(Call("rollout", 0, "work", (str(tmp_path / "once"), "hang")))
    (done,) = finish(dispatcher)
    assert done.call.attempts == 2 and dispatcher.restarts == 1


def test_a_hung_worker_costs_the_pool_it_feeds_nothing(ray_session, tmp_path):
    """As a hung encoder: rollout calls start when their conditioning is there, so no rollout worker is blamed."""
    dispatcher, handles = make_dispatcher(2, call_timeout_s=4.0)
    dispatcher.add_pool("encode", handles[:1])
    dispatcher.add_pool("rollout", handles[1:])
    before = ray.get(handles[1].work.remote("", ""))[0]
    marker = str(tmp_path / "once")
    calls = (Call("encode", key, "work", (marker if key == 1 else "", "hang")) for key in range(3))
    encoded = dispatcher.stream("encode", calls)
    sampled = dispatcher.stream("rollout", (Call("rollout", d.call.key, "work", ("", "")) for d in encoded))
    done = {d.call.key: d.result[0] for d in sampled}
    assert done == dict.fromkeys(range(3), before) and dispatcher.restarts == 1


def test_a_lone_worker_comes_back_and_goes_on(ray_session, tmp_path):
    dispatcher, handles = make_dispatcher(1)
    before = ray.get(handles[0].work.remote("", ""))[0]
    for key in range(3):
        dispatcher.submit(Call("rollout", key, "work", (str(tmp_path / "once"), "crash")))
    done = finish(dispatcher)
    assert len(done) == 3 and all(d.result[0] != before for d in done)
    assert dispatcher.restarts == 1


def test_a_data_failure_is_returned_and_a_bug_is_raised(ray_session, tmp_path):
    dispatcher, _ = make_dispatcher(1)
    dispatcher.submit(Call("rollout", 0, "work", (str(tmp_path / "data"), "data")))
    (done,) = finish(dispatcher)
    assert isinstance(done.failure, DataFailure) and "broken" in str(done.failure)
    dispatcher.submit(Call("rollout", 1, "work", (str(tmp_path / "bug"), "bug")))
    with pytest.raises(KeyError, match="a bug"):
        finish(dispatcher)


def test_below_the_floor_the_run_stops_with_the_cause(ray_session):
    dispatcher, _ = make_dispatcher(2, restarts=0, floor=2)
    dispatcher.submit(Call("rollout", 0, "always_crash", ()))
    with pytest.raises(PoolExhausted, match="rollout workers are left, the floor is 2"):
        finish(dispatcher)


def test_a_call_that_kills_every_worker_is_given_up(ray_session, monkeypatch):
    monkeypatch.setattr(workers, "_REST_S", 0.05)
    dispatcher, _ = make_dispatcher(1, restarts=50)
    dispatcher.submit(Call("rollout", 7, "always_crash", ()))
    with pytest.raises(PoolExhausted, match=r"always_crash\(7\) failed 5 times on 1 worker \(0\)"):
        finish(dispatcher)


def test_a_stream_feeds_another_and_holds_back_what_is_not_due(ray_session):
    dispatcher, handles = make_dispatcher(2)
    dispatcher.add_pool("reward", handles[:1])
    read, most = [], 0

    def calls():
        nonlocal most
        for key in range(8):
            read.append(key)
            most = max(most, dispatcher.outstanding("rollout"))
            yield Call("rollout", key, "work", ("", ""))

    first = dispatcher.stream("rollout", calls(), ahead=3)
    second = dispatcher.stream("reward", (Call("reward", done.call.key, "work", ("", "")) for done in first))
    assert next(second).call.role == "reward" and len(read) < 8, "rewards begin while there is more to sample"
    assert sorted(done.call.key for done in second)[-1] == 7 and most <= 3
    assert dispatcher.outstanding() == 0


class CannotBeMade:
    def __init__(self):
        raise ClusterError("other bytes than the driver: copy the same model to every node")

    def ready(self):
        """Never asked."""


def test_an_actor_that_cannot_be_made_says_why_in_its_own_words(ray_session):
    actor = ray.remote(CannotBeMade).remote()
    with pytest.raises(ClusterError) as refused:
        wait_ready({"rollout": [actor]}, 120)
    text = str(refused.value)
    assert text.startswith("rollout worker 0 could not start: ")
    assert text.endswith("other bytes than the driver: copy the same model to every node")
    assert "\x1b" not in text and "\n" not in text
