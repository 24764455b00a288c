"""Hands calls to pools of Ray actors and brings back what finished, whatever dies in between.

    submit(call) ──► queue of its role ──► least busy ready worker ──► wait() ──► (call, references, small result)
                          ▲                        │ actor died, machine failed, call timed out
                          └────────────────────────┘ (another worker; the one that failed is asked until it answers)

Calls are deterministic, so a call that runs twice gives the same result and re-dispatching is always safe. Every call
that a worker has, and every worker that is to come back, has a deadline; so `wait` ends with a result or an error. A
worker whose node left is waited for without end, but counts for its role's floor only until its deadline.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
)

from core.cluster.actors import last_words
from core.cluster.workers import Call, Done, Pool, Worker
from core.failures import DataFailure, InfrastructureFailure, ObjectsLost

log = logging.getLogger(__name__)
_MAX_TRIES = 5
_POLL_S = 5.0
_ASK_AGAIN_S = 0.5
_SIGN_OF_LIFE_S = 10.0


class PoolExhausted(RuntimeError):
    """Too few workers of a role are left, or one call failed again and again."""


@dataclass
class _Flight:
    call: Call
    worker: Worker
    refs: tuple[Any, ...]
    deadline: float
    wanted: bool = True


class Dispatcher:
    """Pools by role. `restarts` and `redispatched` count what the run survived. `on_node` tells whether a worker, by
    role and number, has room on a node at present (`PlacedActors.on_node`)."""

    def __init__(
        self,
        *,
        call_timeout_s: float,
        start_timeout_s: float,
        on_node: Callable[[str, int], bool] = lambda role, index: True,
    ):
        self._pools: dict[str, Pool] = {}
        self._flights: dict[Any, _Flight] = {}
        self._probes: dict[Any, tuple[str, Worker]] = {}
        self._call_timeout_s, self._start_timeout_s = call_timeout_s, start_timeout_s
        self._on_node, self._look_at = on_node, 0.0
        self.restarts = 0
        self.redispatched = 0
        self.limits_s: dict[str, float] = {}
        """By role, the longest that a call may take by itself where that is not `call_timeout_s`."""
        self.silence_s: dict[str, float] = {}
        """By role, how long a worker that has calls may leave its method `ping`, which runs beside them, unanswered."""
        self._pings: dict[Worker, tuple[Any, float]] = {}

    def add_pool(self, role: str, handles: list[Any], *, floor: int = 1, max_in_flight: int = 2) -> None:
        """Actors of one role; each must have a `ready` method that answers when it can work."""
        self._pools[role] = Pool([Worker(h, i) for i, h in enumerate(handles)], floor, max_in_flight)

    def workers(self, role: str) -> list[Any]:
        """Handles of the workers of `role` that can work now."""
        return [w.handle for w in self._pools[role].workers if w.state == "ready"]

    def await_workers(self, role: str) -> list[Any]:
        """The same, once there is one. Raises PoolExhausted where too few can come back."""
        while not (found := self.workers(role)):
            self._check_floor(role)
            self._turn()
        return found

    def submit(self, call: Call) -> None:
        """Queue a call; it starts during the next `wait`, or at once when a worker is free."""
        self._pools[call.role].queue.append(call)
        self._fill()

    def outstanding(self, role: str | None = None) -> int:
        """Calls (of one role) submitted and not yet returned by `wait`."""
        pools = self._pools if role is None else [role]
        flying = sum(flight.wanted and flight.call.role in pools for flight in self._flights.values())
        return flying + sum(len(self._pools[r].queue) + len(self._pools[r].finished) for r in pools)

    def abandon(self) -> None:
        """Forget every call that was submitted; those under way end without a result."""
        for pool in self._pools.values():
            pool.queue.clear()
            pool.finished.clear()
        for flight in self._flights.values():
            flight.wanted = False

    def finished(self, role: str) -> bool:
        """Whether `wait` would return a call of `role` at once."""
        return bool(self._pools[role].finished)

    def wait(self, role: str | None = None) -> Done:
        """The next finished call, of `role` or of any; meanwhile the calls of all roles go on.

        Raises PoolExhausted below a role's floor or after a call failed too often, and re-raises what an actor
        method raised when another worker could not do better.
        """
        if not self.outstanding(role):
            raise RuntimeError("nothing was submitted")
        pools = list(self._pools.values()) if role is None else [self._pools[role]]
        while True:
            for pool in pools:
                if pool.finished:
                    return pool.finished.popleft()
            self._turn()

    def stream(self, role: str, calls: Iterable[Call], *, ahead: int | None = None) -> Iterator[Done]:
        """Submit calls of `role` as they are read, at most `ahead` at once, and yield them as they finish.

        `calls` may read another role's stream: both go on while either waits.
        """
        for call in calls:
            self.submit(call)
            while self.finished(role) or (ahead is not None and self.outstanding(role) >= ahead):
                yield self.wait(role)
        while self.outstanding(role):
            yield self.wait(role)

    def report_lost(self, role: str, handle: Any, *, hung: bool = False) -> None:
        """A caller that talked to a worker directly found it gone, or (`hung`) silent for as long as it may be, in
        which case it is restarted; it must answer before it gets work."""
        for worker in self._pools[role].workers:
            if worker.handle == handle and worker.state == "ready":
                if hung:
                    self._restart(role, worker, "a direct call took too long")
                else:
                    self._recover(role, worker, "it was gone at a direct call", restarted=True)

    def _turn(self) -> None:
        """Hand out what can start, and take in what happens next."""
        self._look_for_nodes()
        self._ask_the_rested()
        self._fill()
        waited, pause_s = [*self._flights, *self._probes], self._pause_s()
        if waited:
            ready, _ = ray.wait(waited, num_returns=1, timeout=pause_s, fetch_local=False)
            for ref in ready:
                self._take(ref)
        else:
            time.sleep(pause_s)
        self._look_for_life()
        self._enforce_deadlines()

    def _fill(self) -> None:
        for role, pool in self._pools.items():
            if pool.queue:
                self._check_floor(role)
            for call, worker in pool.pairs():
                self._start(call, worker)

    def _check_floor(self, role: str) -> None:
        pool = self._pools[role]
        if len(pool.alive()) < pool.floor:
            raise PoolExhausted(
                f"{len(pool.alive())} {role} workers are left, the floor is {pool.floor}; lost are {pool.lost()}"
            )

    def _start(self, call: Call, worker: Worker) -> None:
        returned = (
            getattr(worker.handle, call.method).options(num_returns=call.num_returns).remote(*call.args)
        )
        refs = tuple(returned) if call.num_returns > 1 else (returned,)
        # It may have to wait for the worker's other calls; where they overlap, for later ones too.
        own = self.limits_s.get(call.role)
        calls = worker.in_flight if own is None else self._pools[call.role].max_in_flight
        limit = (self._call_timeout_s if own is None else own) * calls
        self._flights[refs[0]] = _Flight(call, worker, refs, time.monotonic() + limit)

    def _take(self, ref: Any) -> None:
        if ref in self._probes:
            self._take_probe(ref)
            return
        flight = self._land(ref)
        call, worker = flight.call, flight.worker
        finished = self._pools[call.role].finished if flight.wanted else deque[Done]()
        try:
            finished.append(Done(call, flight.refs, ray.get(ref, timeout=60)))
            worker.failures = 0
        except RayTaskError as error:
            if isinstance(error.cause, DataFailure):
                finished.append(Done(call, (), None, failure=error.cause))
            elif isinstance(error.cause, ObjectLostError):
                lost = ObjectsLost(f"an input of {call.method}({call.key}) was lost with its node")
                finished.append(Done(call, (), None, failure=lost))
            elif isinstance(error.cause, InfrastructureFailure):
                self._recover(call.role, worker, _first_line(error.cause), restarted=False)
                self._again(flight, _first_line(error.cause))
            elif flight.wanted:
                raise error.as_instanceof_cause() from error
        except (RayActorError, GetTimeoutError, ObjectLostError) as error:
            cause = f"{type(error).__name__}: {_first_line(error)}"
            self._recover(call.role, worker, cause, restarted=True)
            self._again(flight, cause)

    def _land(self, ref: Any) -> _Flight:
        flight = self._flights.pop(ref)
        worker = flight.worker
        worker.in_flight -= 1
        if worker.state == "recovering":  # it had a call to end before it could answer
            worker.deadline = max(worker.deadline, time.monotonic() + self._start_timeout_s)
        return flight

    def _again(self, flight: _Flight, cause: str) -> None:
        if not flight.wanted:
            return
        call, worker = flight.call, flight.worker
        call.tried.append(worker.index)
        call.causes.append(cause)
        if len(call.tried) >= _MAX_TRIES:
            raise PoolExhausted(call.history())
        self.redispatched += 1
        log.warning(
            "%s call %s failed on worker %d and is made again: %s", call.role, call.key, worker.index, cause
        )
        self._pools[call.role].queue.appendleft(call)

    def _recover(self, role: str, worker: Worker, cause: str, *, restarted: bool) -> None:
        """Take a worker out of service; Ray restarts it in the meantime, where it ended."""
        if worker.state != "ready":
            worker.restarted |= restarted
            return
        worker.rest(cause, restarted=restarted, now=time.monotonic(), limit_s=self._start_timeout_s)
        log.warning("%s worker %d is out of service until it answers: %s", role, worker.index, cause)

    def _restart(self, role: str, worker: Worker, cause: str, *, all_late: bool = False) -> None:
        """End a worker that hangs, and with it all its calls: one whose arguments are still on their way would not
        fail by itself. Calls that are not late are made again without a mark; `all_late`: any may be the cause."""
        now = time.monotonic()
        log.error("%s worker %d is restarted: %s", role, worker.index, cause)
        ray.kill(worker.handle, no_restart=False)
        self._recover(role, worker, cause, restarted=True)
        for ref, flight in reversed(list(self._flights.items())):
            if flight.worker is worker:
                self._land(ref)
                if all_late or now > flight.deadline:
                    self._again(flight, cause)
                elif flight.wanted:
                    self.redispatched += 1
                    self._pools[role].queue.appendleft(flight.call)

    def _look_for_life(self) -> None:
        """Ask workers that have calls for a sign of life, and restart one that has not given it in time."""
        for role, limit_s in self.silence_s.items():
            for worker in self._pools[role].workers:
                ref, due = self._pings.pop(worker, (None, 0.0))
                now = time.monotonic()
                if not worker.in_flight or worker.state == "dead":
                    continue
                if ref is None:
                    asked = (worker.handle.ping.remote(), now + limit_s) if now >= due else (None, due)
                    self._pings[worker] = asked
                elif ray.wait([ref], num_returns=1, timeout=0, fetch_local=False)[0]:
                    self._pings[worker] = (None, now + _SIGN_OF_LIFE_S)
                elif now > due:
                    self._restart(role, worker, f"no sign of life for {limit_s:g} s", all_late=True)
                else:
                    self._pings[worker] = (ref, due)

    def _look_for_nodes(self) -> None:
        """Which of the workers that are out of service have a node, looked up every `_POLL_S`."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + _POLL_S
        for role, pool in self._pools.items():
            for worker in pool.workers:
                if worker.state in ("recovering", "absent"):
                    had = worker.on_node
                    worker.placed(self._on_node(role, worker.index), now=now, limit_s=self._start_timeout_s)
                    if worker.on_node is not had:
                        log.warning(
                            "%s worker %d has %s node", role, worker.index, "no" if had else "found a"
                        )

    def _resting(self) -> Iterator[tuple[str, Worker]]:
        """Workers that are to be asked. A call that one still has would keep its answer waiting."""
        asked = [worker for _, worker in self._probes.values()]
        for role, pool in self._pools.items():
            for worker in pool.workers:
                waits = worker.state == "recovering" and worker.on_node and not worker.in_flight
                if waits and worker not in asked:
                    yield role, worker

    def _ask_the_rested(self) -> None:
        for role, worker in list(self._resting()):
            if time.monotonic() >= worker.probe_at:
                self._probes[worker.handle.ready.remote()] = (role, worker)

    def _take_probe(self, ref: Any) -> None:
        role, worker = self._probes.pop(ref)
        try:
            ray.get(ref, timeout=60)
        except (ActorUnavailableError, GetTimeoutError):
            worker.probe_at = time.monotonic() + _ASK_AGAIN_S  # the deadline ends it
        except (RayActorError, RayTaskError) as error:
            self._give_up(role, worker, last_words(error))
        else:
            worker.state, worker.on_node = "ready", True
            self.restarts += worker.restarted
            log.info("%s worker %d is back", role, worker.index)

    def _pause_s(self) -> float:
        """Until the next worker has rested or the next call is late, at most `_POLL_S`."""
        due = [worker.probe_at for _, worker in self._resting()]
        due += [flight.deadline for flight in self._flights.values()]
        return max(0.0, min(_POLL_S, min(due, default=float("inf")) - time.monotonic()))

    def _enforce_deadlines(self) -> None:
        now = time.monotonic()
        for ref, flight in list(self._flights.items()):
            if now > flight.deadline and ref in self._flights:
                own = self.limits_s.get(flight.call.role)
                limit = f"call_timeout_s={self._call_timeout_s:g}" if own is None else f"{own:g} s"
                cause = f"{flight.call.method} took longer than {limit}"
                self._restart(flight.call.role, flight.worker, cause)
        for role, pool in self._pools.items():
            for worker in pool.workers:
                if worker.state == "recovering" and not worker.in_flight and now > worker.deadline:
                    self._end_wait(role, worker)

    def _end_wait(self, role: str, worker: Worker) -> None:
        """A worker did not come back in time: it hangs, or has no node."""
        self._probes = {ref: p for ref, p in self._probes.items() if p[1] is not worker}
        limit = f"start_timeout_s={self._start_timeout_s:g}"
        cause = f"it did not come back within {limit} after: {worker.cause}"
        worker.on_node = worker.on_node and self._on_node(role, worker.index)
        if worker.on_node:
            self._give_up(role, worker, cause)
        else:
            worker.state, worker.cause = "absent", f"no node has room for it (see `ray status`): {cause}"
            log.error("%s worker %d is absent until a node has room for it: %s", role, worker.index, cause)

    def _give_up(self, role: str, worker: Worker, cause: str) -> None:
        """Lost for good; a process that is left of it would keep its GPU."""
        worker.state, worker.cause = "dead", cause
        ray.kill(worker.handle)
        log.error("%s worker %d is lost: %s", role, worker.index, cause)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
