"""Calls to a plain class, made here one by one or by Ray actors that each hold an instance.

    calls ──► at most QUEUED_PER_WORKER a worker in flight ──► least busy worker ──► (key, result), as they finish

The results are the same either way: a call's result is a function of its arguments alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from core.failures import DataFailure

log = logging.getLogger(__name__)

QUEUED_PER_WORKER = 2
"""One at work and one waiting: arguments hold whole pictures, so not all are handed out at once."""
START_TIMEOUT_S = 1800.0
CALL_TIMEOUT_S = 1800.0
PLACEMENT_TIMEOUT_S = 600.0
MAX_RESTARTS = 3

Keyed = tuple[int, Callable[[], tuple[Any, ...]]]
"""A call's key, and what gives its arguments when its turn comes; it may raise DataFailure as the call itself may."""


@dataclass(frozen=True)
class PoolSpec:
    """How many Ray actors (0: none, the calls are made here), and what each asks for."""

    workers: int
    cpus: float
    gpus: float


def run_calls(
    kind: type, spec: Any, method: str, calls: Iterable[Keyed], pool: PoolSpec
) -> Iterator[tuple[int, Any]]:
    """(key, result) of `kind(spec).method(*arguments())` for each call `(key, arguments)`, in order of completion.

    The result is a DataFailure where the call raised one: that input cannot be used, and the others go on. `calls` is
    read only as fast as work is done. Under Ray, `kind` needs a method `ready`.

    Raises what a call raised otherwise, and under Ray ClusterError and PoolExhausted: no room, or no worker left.
    """
    if pool.workers:
        yield from _over_ray(kind, spec, method, calls, pool)
        return
    worker = kind(spec)
    for key, arguments in calls:
        try:
            result = getattr(worker, method)(*arguments())
        except DataFailure as failure:
            result = failure
        yield key, result


def _over_ray(
    kind: type, spec: Any, method: str, calls: Iterable[Keyed], pool: PoolSpec
) -> Iterator[tuple[int, Any]]:
    import ray

    from core.cluster.actors import connect
    from core.cluster.dispatch import Call, Dispatcher

    started_here = not ray.is_initialized()
    connect()
    try:
        group, actors = _start(kind, spec, pool)
        try:
            dispatcher = Dispatcher(call_timeout_s=CALL_TIMEOUT_S, start_timeout_s=START_TIMEOUT_S)
            dispatcher.add_pool("task", actors)
            for key, arguments in calls:
                try:
                    call = Call("task", key, method, arguments())
                except DataFailure as failure:
                    yield key, failure
                    continue
                dispatcher.submit(call)
                if dispatcher.outstanding() >= QUEUED_PER_WORKER * pool.workers:
                    yield _finished(dispatcher.wait())
            while dispatcher.outstanding():
                yield _finished(dispatcher.wait())
        finally:
            _stop(group, actors)
    finally:
        if started_here:
            ray.shutdown()


def _finished(done: Any) -> tuple[int, Any]:
    return done.call.key, done.result if done.failure is None else done.failure


def _stop(group: Any, actors: list[Any]) -> None:
    import ray

    for actor in actors:
        ray.kill(actor)
    ray.util.remove_placement_group(group)


def _start(kind: type, spec: Any, pool: PoolSpec) -> tuple[Any, list[Any]]:
    """Placement group and actors, all of which have answered. Raises ClusterError in a stated time."""
    import ray

    from core.cluster.actors import actor_options, reserve, wait_ready
    from core.cluster.placement import ActorPlan, ResourcePlan

    places = tuple(ActorPlan("task", index, index, pool.cpus, pool.gpus) for index in range(pool.workers))
    bundle = {name: amount for name, amount in (("CPU", pool.cpus), ("GPU", pool.gpus)) if amount}
    plan = ResourcePlan((bundle,) * pool.workers, places)
    group = reserve(plan, f"{pool.workers} workers", "lower --workers or --threads", PLACEMENT_TIMEOUT_S)
    actors: list[Any] = []
    try:
        for place in places:
            options = actor_options(place, group, restarts=MAX_RESTARTS)
            actors.append(ray.remote(kind).options(**options).remote(spec))
        wait_ready({"task": actors}, START_TIMEOUT_S)
    except BaseException:
        _stop(group, actors)
        raise
    log.info("%d workers answered", len(actors))
    return group, actors
