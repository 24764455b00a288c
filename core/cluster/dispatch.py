"""Hands calls to pools of Ray actors and brings back what finished, whatever dies in between.

    submit(call) ──► queue of its role ──► least busy ready worker ──► wait() ──► (call, references, small result)
                          ▲                        │ actor died, machine failed, call timed out
                          └────────────────────────┘ (another worker; the dead one is asked again until it answers)

Calls are deterministic, so a call that runs twice gives the same result and re-dispatching is always safe. Every call
that a worker has, and every worker that is to come back, has a deadline; so `wait` ends with a result or an error.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError

from core.failures import DataFailure, InfrastructureFailure

log = logging.getLogger(__name__)
_MAX_ATTEMPTS = 5
_POLL_S = 5.0


class PoolExhausted(RuntimeError):
    """Too few workers of a role are left, or one call failed on worker after worker."""


@dataclass
class Call:
    """One method call that any worker of `role` can make. `key` tells the caller which one it was."""

    role: str
    key: Hashable
    method: str
    args: tuple[Any, ...]
    num_returns: int = 1
    attempts: int = 0
    causes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Done:
    """A finished call: references to all returns, the first one fetched; or the prompt's `failure`. `time`: when it was
    fetched, in Unix seconds."""

    call: Call
    refs: tuple[Any, ...]
    result: Any
    failure: DataFailure | None = None
    time: float = field(default_factory=time.time)


@dataclass
class _Worker:
    handle: Any
    index: int
    state: str = "ready"
    in_flight: int = 0


@dataclass
class _Pool:
    workers: list[_Worker]
    floor: int
    max_in_flight: int
    queue: deque[Call] = field(default_factory=deque)
    finished: deque[Done] = field(default_factory=deque)

    def alive(self) -> list[_Worker]:
        return [w for w in self.workers if w.state != "dead"]


@dataclass
class _Flight:
    call: Call
    worker: _Worker
    refs: tuple[Any, ...]
    deadline: float


class Dispatcher:
    """Pools by role. `restarts` and `redispatched` count what the run survived."""

    def __init__(self, *, call_timeout_s: float, start_timeout_s: float):
        self._pools: dict[str, _Pool] = {}
        self._flights: dict[Any, _Flight] = {}
        self._probes: dict[Any, tuple[str, _Worker, float]] = {}
        self._call_timeout_s, self._start_timeout_s = call_timeout_s, start_timeout_s
        self.restarts = 0
        self.redispatched = 0
        self.limits_s: dict[str, float] = {}
        """By role, the longest that a call may take where that is not `call_timeout_s`."""

    def add_pool(self, role: str, handles: list[Any], *, floor: int = 1, max_in_flight: int = 2) -> None:
        """Actors of one role; each must have a `ready` method that answers when it can work."""
        self._pools[role] = _Pool([_Worker(h, i) for i, h in enumerate(handles)], floor, max_in_flight)

    def workers(self, role: str) -> list[Any]:
        """Handles of the workers of `role` that can work now."""
        return [w.handle for w in self._pools[role].workers if w.state == "ready"]

    def submit(self, call: Call) -> None:
        """Queue a call; it starts during the next `wait`, or at once when a worker is free."""
        self._pools[call.role].queue.append(call)
        self._fill()

    def outstanding(self, role: str | None = None) -> int:
        """Calls (of one role) submitted and not yet returned by `wait`."""
        pools = self._pools if role is None else [role]
        flying = sum(flight.call.role in pools for flight in self._flights.values())
        return flying + sum(len(self._pools[r].queue) + len(self._pools[r].finished) for r in pools)

    def finished(self, role: str) -> bool:
        """Whether `wait` would return a call of `role` at once."""
        return bool(self._pools[role].finished)

    def wait(self, role: str | None = None) -> Done:
        """The next finished call, of `role` or of any; meanwhile the calls of all roles go on.

        Raises PoolExhausted below a role's floor or after a call failed on too many workers, and re-raises
        what an actor method raised when another worker could not do better.
        """
        if not self.outstanding(role):
            raise RuntimeError("nothing was submitted")
        pools = list(self._pools.values()) if role is None else [self._pools[role]]
        while True:
            for pool in pools:
                if pool.finished:
                    return pool.finished.popleft()
            self._fill()
            ready, _ = ray.wait(
                [*self._flights, *self._probes], num_returns=1, timeout=_POLL_S, fetch_local=False
            )
            for ref in ready:
                done = self._take(ref)
                if done is not None:
                    self._pools[done.call.role].finished.append(done)
            self._enforce_deadlines()

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

    def report_lost(self, role: str, handle: Any) -> None:
        """A caller that talked to a worker directly found it gone; it is asked again before it gets work."""
        for worker in self._pools[role].workers:
            if worker.handle == handle and worker.state == "ready":
                self._recover(role, worker, "did not answer a direct call")

    def _fill(self) -> None:
        for role, pool in self._pools.items():
            if pool.queue and len(pool.alive()) < pool.floor:
                raise PoolExhausted(
                    f"{len(pool.alive())} {role} workers are left, the floor is {pool.floor}; "
                    f"last causes: {pool.queue[0].causes[-3:] or 'see the log above'}"
                )
            while pool.queue:
                free = [w for w in pool.workers if w.state == "ready" and w.in_flight < pool.max_in_flight]
                if not free:
                    break
                self._start(pool.queue.popleft(), min(free, key=lambda w: (w.in_flight, w.index)))

    def _start(self, call: Call, worker: _Worker) -> None:
        call.attempts += 1
        worker.in_flight += 1
        returned = (
            getattr(worker.handle, call.method).options(num_returns=call.num_returns).remote(*call.args)
        )
        refs = tuple(returned) if call.num_returns > 1 else (returned,)
        # It may have to wait for the worker's other calls.
        limit = self.limits_s.get(call.role, self._call_timeout_s) * worker.in_flight
        self._flights[refs[0]] = _Flight(call, worker, refs, time.monotonic() + limit)

    def _take(self, ref: Any) -> Done | None:
        if ref in self._probes:
            self._take_probe(ref)
            return None
        flight = self._flights.pop(ref)
        flight.worker.in_flight -= 1
        call = flight.call
        try:
            return Done(call, flight.refs, ray.get(ref, timeout=60))
        except (RayActorError, GetTimeoutError) as error:
            self._recover(call.role, flight.worker, f"{type(error).__name__}: {_first_line(error)}")
            self._again(call, error)
        except RayTaskError as error:
            if isinstance(error.cause, DataFailure):
                return Done(call, (), None, failure=error.cause)
            if not isinstance(error.cause, InfrastructureFailure):
                raise error.as_instanceof_cause() from error
            self._again(call, error.cause)
        return None

    def _again(self, call: Call, error: Exception) -> None:
        call.causes.append(_first_line(error))
        if call.attempts >= _MAX_ATTEMPTS:
            raise PoolExhausted(
                f"{call.role} call {call.method}({call.key}) failed on {call.attempts} workers: {call.causes}"
            ) from error
        self.redispatched += 1
        log.warning("%s call %s goes to another worker: %s", call.role, call.key, call.causes[-1])
        self._pools[call.role].queue.appendleft(call)

    def _recover(self, role: str, worker: _Worker, cause: str) -> None:
        """Take a worker out of service and ask it to answer again; Ray restarts it in the meantime."""
        if worker.state != "ready":
            return
        log.warning("%s worker %d is out of service: %s", role, worker.index, cause)
        worker.state = "recovering"
        self._probe(role, worker, time.monotonic() + self._start_timeout_s)

    def _probe(self, role: str, worker: _Worker, deadline: float) -> None:
        self._probes[worker.handle.ready.remote()] = (role, worker, deadline)

    def _take_probe(self, ref: Any) -> None:
        role, worker, deadline = self._probes.pop(ref)
        try:
            ray.get(ref, timeout=60)
        except ActorUnavailableError:
            if time.monotonic() < deadline:
                time.sleep(0.5)
                self._probe(role, worker, deadline)
            else:
                self._give_up(role, worker)
        except (ActorDiedError, RayActorError, RayTaskError) as error:
            worker.state = "dead"
            log.error("%s worker %d is lost: %s", role, worker.index, _first_line(error))
        else:
            worker.state = "ready"
            self.restarts += 1
            log.info("%s worker %d is back", role, worker.index)

    def _enforce_deadlines(self) -> None:
        now = time.monotonic()
        for flight in list(self._flights.values()):
            if now > flight.deadline:
                cause = (
                    f"{flight.call.method} took longer than resources.call_timeout_s={self._call_timeout_s:g}"
                )
                ray.kill(flight.worker.handle, no_restart=False)
                flight.deadline = float("inf")  # the killed actor's call now fails, as in a crash
                log.error("%s worker %d is restarted: %s", flight.call.role, flight.worker.index, cause)
        for ref, (role, worker, deadline) in list(self._probes.items()):
            if now > deadline:
                del self._probes[ref]
                self._give_up(role, worker)

    def _give_up(self, role: str, worker: _Worker) -> None:
        worker.state = "dead"
        log.error("%s worker %d did not come back in %.0f s", role, worker.index, self._start_timeout_s)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
