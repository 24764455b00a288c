"""Calls to a plain class, made here one by one or by Ray actors that each hold an instance.

    calls ──► at most QUEUED_PER_WORKER a worker in flight ──► least busy worker ──► (key, result), as they finish

The results are the same either way: a call's result is a function of its arguments alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.failures import DataFailure

if TYPE_CHECKING:
    from core.cluster.workers import Call

QUEUED_PER_WORKER = 2
"""One at work and one waiting: arguments hold whole pictures, so not all are handed out at once."""
START_TIMEOUT_S = 1800.0
CALL_TIMEOUT_S = 1800.0
PLACEMENT_TIMEOUT_S = 600.0
MAX_RESTARTS = 3

Keyed = tuple[int, Callable[[], tuple[Any, ...]]]
"""A call's key, and what gives its arguments when it is to start; that may raise DataFailure as the call itself may."""


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

    from core.cluster.actors import PlacedActors, connect, wait_ready
    from core.cluster.dispatch import Dispatcher
    from core.cluster.placement import uniform_plan
    from core.cluster.workers import Call

    unusable: list[tuple[int, DataFailure]] = []

    def usable() -> Iterator[Call]:
        for key, arguments in calls:
            try:
                yield Call("task", key, method, arguments())
            except DataFailure as failure:
                unusable.append((key, failure))

    started_here = connect()
    try:
        placed = PlacedActors(
            uniform_plan("task", pool.workers, pool.cpus, pool.gpus),
            f"work with {pool.workers} workers",
            "lower --workers or --threads",
            PLACEMENT_TIMEOUT_S,
        )
        try:
            actors = placed.start(
                "task", ray.remote(kind), lambda actor, _: actor.remote(spec), restarts=MAX_RESTARTS
            )
            wait_ready(placed.by_role, START_TIMEOUT_S)
            dispatcher = Dispatcher(
                call_timeout_s=CALL_TIMEOUT_S, start_timeout_s=START_TIMEOUT_S, on_node=placed.on_node
            )
            dispatcher.add_pool("task", actors)
            for done in dispatcher.stream("task", usable(), ahead=QUEUED_PER_WORKER * pool.workers):
                yield done.call.key, done.result if done.failure is None else done.failure  # type: ignore[misc]
            yield from unusable
        finally:
            placed.close()
    finally:
        if started_here:
            ray.shutdown()
