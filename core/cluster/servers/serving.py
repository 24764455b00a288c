"""Equal servers from their placement to a signal that ends them: what a command line that serves runs.

    room on the Ray cluster ──► one server per replica ──► all ready: URLs printed, the ready file written
                                  │ dies: restarted with back-off, see `replica.py`
    SIGTERM, SIGINT ──► every server and everything below it is ended

The servers' own log comes through line by line, each with its replica's number before it.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from core.cluster.servers.fleet import Fleet, Room, check_host, cluster_has_gpus, place
from core.cluster.servers.replica import ReplicaPlan, ReplicaStatus
from core.failures import ClusterError
from core.files import atomic_write_json

log = logging.getLogger(__name__)
LOOK_S = 0.5
SPARE_S = 60.0
"""Seconds beyond a replica's own limit after which a start is given up."""


@dataclass(frozen=True)
class Service:
    """What is served.

    name: as it is printed. facts: written to the ready file, beside the URLs. remedy: how to ask for less room.
    """

    name: str
    facts: dict[str, Any]
    host: str
    ready_file: Path | None
    remedy: str


def serve(service: Service, plan: Callable[[bool], tuple[list[ReplicaPlan], Room]]) -> int:
    """Serve until a signal comes: 0, or 1 when every replica is lost.

    plan: the replicas and their room, given whether the cluster has GPUs. Raises ClusterError where they cannot be
    placed or do not start.
    """
    stop = threading.Event()
    _set_on_signals(stop)
    try:
        has_gpus = cluster_has_gpus()
        _set_on_signals(stop)  # Ray has set its own handlers
        check_host(service.host)
        replicas, room = plan(has_gpus)
        _forget(service.ready_file)
        fleet = place(replicas, room, remedy=service.remedy)
        try:
            return _watch(fleet, service, replicas[0].start_timeout_s + SPARE_S, stop)
        finally:
            _forget(service.ready_file)
            fleet.close()
    finally:
        ray.shutdown()


def _watch(fleet: Fleet, service: Service, limit_s: float, stop: threading.Event) -> int:
    urls, show = fleet.start(), _StatusLog()
    deadline, ready = time.monotonic() + limit_s, False
    while not stop.wait(LOOK_S):
        statuses = fleet.statuses()
        show(statuses)
        failed = [i for i, status in enumerate(statuses) if status.state == "failed"]
        late = [i for i, status in enumerate(statuses) if status.state != "ready"]
        if ready and len(failed) == len(statuses):
            log.error("every replica is lost")
            return 1
        if ready:
            continue
        if failed:
            raise ClusterError(f"replica {failed[0]} did not start: {statuses[failed[0]].detail}")
        if not late:
            ready = True
            sys.stdout.write(f"ready: {service.name}\n" + "".join(f"{url}\n" for url in urls))
            sys.stdout.flush()
            if service.ready_file:
                atomic_write_json(service.ready_file, service.facts | {"urls": urls})
        elif time.monotonic() > deadline:
            raise ClusterError(f"replicas {late} were not ready within {limit_s:g} s")
    log.info("stopping")
    return 0


class _StatusLog:
    """Passes the servers' log through and says when a replica's state changes."""

    def __init__(self) -> None:
        self._states: dict[int, tuple[str, str]] = {}

    def __call__(self, statuses: Sequence[ReplicaStatus]) -> None:
        for index, status in enumerate(statuses):
            for line in status.lines:
                sys.stderr.write(f"[replica {index}] {line}\n")
            state = (status.state, status.detail)
            if self._states.get(index) != state:
                level = logging.INFO if status.state in ("starting", "ready") else logging.WARNING
                because = f": {status.detail}" if status.detail else ""
                log.log(level, "replica %d at %s is %s%s", index, status.url, status.state, because)
            self._states[index] = state
        sys.stderr.flush()


def _set_on_signals(stop: threading.Event) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())


def _forget(ready_file: Path | None) -> None:
    if ready_file:
        ready_file.unlink(missing_ok=True)
