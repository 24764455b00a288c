"""Who gets which call and what a deadline ends, with stand-ins for Ray's actors: no process, and no time but rests."""

import time
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorUnavailableError, ObjectLostError, RayTaskError

from core.cluster import dispatch, workers
from core.cluster.dispatch import Dispatcher, PoolExhausted
from core.cluster.workers import Call, Pool, Worker
from core.failures import InfrastructureFailure, ObjectsLost

PENDING = object()


class Ref:
    """What a call will give: a value, an exception, or PENDING for ever."""

    def __init__(self, outcome):
        self.outcome = outcome


class Actor:
    """`answers`: its method's outcomes in order, the last one for ever; `ready`: the same for its probe."""

    def __init__(self, *answers, ready=(True,)):
        self.calls, self.kills = [], []
        self._answers, self._ready = list(answers), list(ready)
        self.work = SimpleNamespace(options=lambda num_returns: SimpleNamespace(remote=self._work))
        self.ready = SimpleNamespace(remote=lambda: Ref(self._next(self._ready)))

    def _work(self, *args):
        self.calls.append(args)
        return Ref(self._next(self._answers))

    @staticmethod
    def _next(outcomes):
        return outcomes.pop(0) if len(outcomes) > 1 else outcomes[0]


@pytest.fixture(autouse=True)
def _wire(monkeypatch):
    def wait(refs, num_returns, timeout, fetch_local):
        ready = [ref for ref in refs if ref.outcome is not PENDING]
        if not ready:
            time.sleep(min(timeout, 0.01))
        return ready[:1], []

    def get(ref, timeout):
        if isinstance(ref.outcome, Exception):
            raise ref.outcome
        return ref.outcome

    def kill(actor, no_restart=True):
        actor.kills.append(no_restart)

    monkeypatch.setattr(dispatch, "ray", SimpleNamespace(wait=wait, get=get, kill=kill))
    monkeypatch.setattr(workers, "_REST_S", 0.001)
    monkeypatch.setattr(dispatch, "_ASK_AGAIN_S", 0.001)
    monkeypatch.setattr(dispatch, "_POLL_S", 0.01)


def failing(cause):
    return RayTaskError("work", "a traceback", cause)


NO_MEMORY = failing(InfrastructureFailure("out of GPU memory"))


def dispatcher(*actors, call_timeout_s=60.0, floor=1, start_timeout_s=60.0, nodes=None):
    """`nodes`: by worker, whether a node has room for it."""
    on_node = {} if nodes is None else {"on_node": lambda role, index: nodes[index]}
    made = Dispatcher(call_timeout_s=call_timeout_s, start_timeout_s=start_timeout_s, **on_node)
    made.add_pool("rollout", list(actors), floor=floor)
    return made


def finish(made, count):
    for key in range(count):
        made.submit(Call("rollout", key, "work", (key,)))
    return [made.wait() for _ in range(count)]


def test_a_worker_that_is_always_out_of_memory_ends_no_run():
    bad, *good = Actor(NO_MEMORY), Actor("a"), Actor("b"), Actor("c")
    made = dispatcher(bad, *good)
    done = finish(made, 24)
    assert len(done) == 24 and all(d.call.tried in ([], [0]) for d in done)
    assert len(bad.calls) < 12, "it rests longer each time"
    assert made.restarts == 0 and bad.kills == []


def test_a_call_that_no_worker_can_make_says_which_ones_tried():
    made = dispatcher(*[Actor(NO_MEMORY) for _ in range(3)])
    with pytest.raises(
        PoolExhausted, match=r"work\(0\) failed 5 times on 3 workers \(0, 1, 2\): \['out of GPU"
    ):
        finish(made, 1)


def test_a_deadline_ends_the_call_itself_and_charges_no_other():
    """A call whose argument never comes does not fail when its worker is killed."""
    hung, other = Actor(PENDING, "late"), Actor("a")
    made = dispatcher(hung, other, call_timeout_s=0.05)
    done = {d.call.key: d for d in finish(made, 2)}
    assert (
        done[0].result == "a"
        and done[0].call.tried == [0]
        and "call_timeout_s=0.05" in done[0].call.causes[0]
    )
    assert hung.kills == [False] and other.kills == [] and done[1].call.tried == []


def test_a_call_that_overlaps_with_later_ones_has_time_for_these_from_the_start():
    actor = Actor(PENDING)
    made = dispatcher(actor)
    made.limits_s["rollout"] = 100.0
    made.submit(Call("rollout", 0, "work", ()))
    (flight,) = made._flights.values()
    assert 190 < flight.deadline - time.monotonic() <= 200, "two may be under way at once"


@pytest.mark.parametrize("alive", [True, False])
def test_a_worker_without_a_sign_of_life_loses_its_calls_long_before_their_limit(alive):
    """One that answers beside its calls may take as long as these may."""
    slow, other = Actor(PENDING), Actor("a")
    for actor, sign in ((slow, True if alive else PENDING), (other, True)):
        actor.ping = SimpleNamespace(remote=lambda sign=sign: Ref(sign))
    made = dispatcher(slow, other, call_timeout_s=0.5 if alive else 3600.0)
    made.silence_s["rollout"] = 0.05
    (done,) = finish(made, 1)
    assert done.result == "a" and done.call.tried == [0] and slow.kills == [False] and other.kills == []
    assert ("call_timeout_s" if alive else "no sign of life for 0.05 s") in done.call.causes[0]


def test_calls_beside_a_late_one_are_made_again_without_a_mark():
    actor = Actor(PENDING, PENDING, "a", "b")
    made = dispatcher(actor, call_timeout_s=0.1)
    first, second = Call("rollout", 0, "work", ()), Call("rollout", 1, "work", ())
    made.submit(first)
    made.submit(second)  # it may take twice as long, since it waits for the first
    assert {made.wait().call.key, made.wait().call.key} == {0, 1}
    assert (first.tried, second.tried) == ([0], []) and actor.kills == [False]


def test_a_worker_that_is_away_is_asked_until_it_answers_and_others_work_meanwhile(monkeypatch):
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda s: pytest.fail("slept in the loop"))
    monkeypatch.setattr(dispatch, "time", clock)
    away = ActorUnavailableError("restarting", b"x" * 16)
    actor = Actor(away, "back", ready=(away, away, True))
    made = dispatcher(actor, Actor("a"))
    assert len(finish(made, 8)) == 8


def test_a_worker_that_does_not_come_back_gives_up_what_it_holds():
    gone = Actor(NO_MEMORY, ready=(PENDING,))
    made = dispatcher(gone, floor=1, start_timeout_s=0.05)
    with pytest.raises(
        PoolExhausted, match=r"0 rollout workers are left, the floor is 1; lost are worker 0: it did"
    ):
        finish(made, 1)
    assert gone.kills == [True]


def test_a_worker_that_failed_one_call_may_end_its_other_before_it_has_to_answer(monkeypatch):
    """The other call takes longer than an answer may, and the answer would stand behind it."""
    slow, actor = Ref(PENDING), Actor("a")
    refs = iter([Ref(NO_MEMORY), slow, Ref("a")])
    actor.work = SimpleNamespace(options=lambda num_returns: SimpleNamespace(remote=lambda key: next(refs)))
    made = dispatcher(actor, start_timeout_s=0.05)
    for key in range(2):
        made.submit(Call("rollout", key, "work", (key,)))
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        made._turn()
    assert not made.workers("rollout")
    slow.outcome = "b"
    assert {made.wait().result, made.wait().result} == {"a", "b"} and actor.kills == []


def test_a_lost_input_is_told_to_whoever_can_make_it_again():
    made = dispatcher(Actor(failing(ObjectLostError("1f", None, "")), "a"))
    (done,) = finish(made, 1)
    assert isinstance(done.failure, ObjectsLost) and made.redispatched == 0


def test_waiting_for_a_worker_ends_with_one_or_with_the_floor():
    actor = Actor("a")
    made = dispatcher(actor)
    made.report_lost("rollout", actor, hung=True)
    assert made.workers("rollout") == [] and made.await_workers("rollout") == [actor]
    assert actor.kills == [False] and made.restarts == 1


def test_a_call_waits_for_a_busy_worker_rather_than_go_back_and_holds_nobody_up():
    pool = Pool([Worker("a", 0), Worker("b", 1, in_flight=1)], floor=1, max_in_flight=1)
    failed, fresh = Call("rollout", 0, "work", (), tried=[0]), Call("rollout", 1, "work", ())
    pool.queue.extend([failed, fresh])
    assert pool.pairs() == [(fresh, pool.workers[0])] and list(pool.queue) == [failed]
    pool.workers[1].state = "dead"
    pool.workers[0].in_flight = 0
    assert pool.pairs() == [(failed, pool.workers[0])], "no other is left"


AWAY = ActorUnavailableError("its node is gone", b"x" * 16)


def turn_until(made, condition):
    until = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < until
        made._turn()


def test_a_worker_without_a_node_is_missed_and_comes_back_with_one():
    """It is not asked meanwhile, is no loss for good, and has the whole limit to start on the new node."""
    gone, nodes = Actor(AWAY, "back", ready=(AWAY,)), [True, False]
    made = dispatcher(Actor("a"), gone, start_timeout_s=0.05, nodes=nodes)
    assert {d.call.key for d in finish(made, 8)} == set(range(8))
    lost = made._pools["rollout"].workers[1]
    turn_until(made, lambda: lost.state == "absent")
    assert [d.result for d in finish(made, 4)] == ["a"] * 4, "the run goes on"
    gone._ready = [True]
    turn_until(made, lambda: time.monotonic() > lost.deadline + 0.1)
    assert lost.state == "absent" and made.restarts == 0
    nodes[1] = True
    turn_until(made, lambda: lost.state == "ready")
    assert {d.result for d in finish(made, 4)} == {"a", "back"} and gone.kills == [] and made.restarts == 1


def test_below_the_floor_a_node_is_waited_for_within_the_limit():
    gone = Actor(AWAY, ready=(AWAY,))
    made = dispatcher(Actor("a"), gone, floor=2, start_timeout_s=0.05, nodes=[True, False])
    finish(made, 4)
    with pytest.raises(PoolExhausted, match=r"1 rollout .* floor is 2; lost are worker 1: no node has room"):
        turn_until(made, lambda: made.submit(Call("rollout", 0, "work", ())))
    assert gone.kills == []


def test_a_worker_that_hangs_on_its_new_node_is_ended():
    gone, nodes = Actor(AWAY, ready=(AWAY, PENDING)), [True, False]
    made = dispatcher(Actor("a"), gone, start_timeout_s=0.05, nodes=nodes)
    finish(made, 4)
    lost = made._pools["rollout"].workers[1]
    turn_until(made, lambda: lost.state == "absent")
    nodes[1] = True
    turn_until(made, lambda: lost.state == "dead")
    assert gone.kills == [True]


def test_a_failed_call_does_not_wait_for_a_node():
    gone = Worker("b", 1, state="recovering", on_node=False)
    pool = Pool([Worker("a", 0), gone], floor=1, max_in_flight=1)
    failed = Call("rollout", 0, "work", (), tried=[0])
    pool.queue.append(failed)
    assert pool.pairs() == [(failed, pool.workers[0])]
