"""Connects to Ray, reserves room (bounded), places actors and waits (bounded) until they answer."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from core.cluster.placement import ActorPlan, ResourcePlan, shortage
from core.failures import ClusterError

log = logging.getLogger(__name__)
KNOCK_S = 30.0


def connect(*, worker_logs: bool = True) -> bool:
    """Join the cluster that RAY_ADDRESS names (set under `ray job submit`; `auto` for one on this machine), else start
    Ray on this machine alone. Never joined by guess: the address file of a cluster that died stalls for minutes.
    `worker_logs`: whether this process prints what workers print.

    Returns whether this process was not connected before, so that the caller may shut Ray down. Raises ClusterError
    where Ray does not start or does not let this process in.
    """
    if ray.is_initialized():
        return False
    address, handler = os.environ.get("RAY_ADDRESS"), signal.getsignal(signal.SIGTERM)
    try:
        if address:
            _knock(address)
            ray.init(address=address, log_to_driver=worker_logs)
        else:
            log.info("RAY_ADDRESS is not set: starting Ray on this machine alone")
            ray.init(address="local", include_dashboard=False, log_to_driver=worker_logs)
    except SystemExit as error:  # how Ray answers a SIGTERM while it starts
        if error.code == signal.SIGTERM and callable(handler):
            signal.signal(signal.SIGTERM, handler)
            handler(signal.SIGTERM, None)
        raise
    except Exception as error:  # Ray has no class of its own for this
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = f"join RAY_ADDRESS={address}" if address else "start Ray on this machine"
        remedy = "see `ray status` there, and RAY_AUTH_MODE and its token where the cluster asks for one"
        remedy = remedy if address else "see the newest folder below /tmp/ray for its logs"
        raise ClusterError(f"cannot {where}: {cause}; {remedy}") from error
    if callable(handler):  # Ray takes SIGTERM for itself; a command that has its own way to stop keeps it
        signal.signal(signal.SIGTERM, handler)
    return True


def _knock(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT, for which Ray takes minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in address:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()


def reserve(plan: ResourcePlan, what: str, remedy: str, timeout_s: float, *, key: str = "") -> Any:
    """A placement group for the bundles of `plan`, once the cluster has room.

    Args:
        what: who asks, as messages begin.
        remedy: how to ask for less, as in `shortage`.
        key: what sets `timeout_s`, for the message.

    Raises:
        ClusterError: the cluster is too small, or busy for longer than `timeout_s`.
    """
    short = shortage(plan, ray.cluster_resources(), what=what, remedy=remedy)
    if short:
        raise ClusterError("; ".join(short))
    group = placement_group(list(plan.bundles), strategy="PACK")
    if not group.wait(timeout_seconds=timeout_s):
        remove_placement_group(group)
        free = ray.available_resources()
        raise ClusterError(
            f"{what} found no room in {key and key + '='}{timeout_s:g} s: {free.get('GPU', 0.0):g} GPUs and "
            f"{free.get('CPU', 0.0):g} CPUs are free, or no node has enough for one bundle; see `ray status`"
        )
    return group


def actor_options(actor: ActorPlan, group: Any, *, restarts: int) -> dict[str, Any]:
    """Ray's options for an actor in its bundle of the placement group."""
    return {
        "num_cpus": actor.cpus,
        "num_gpus": actor.gpus,
        "max_restarts": restarts,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=actor.bundle
        ),
    }


def wait_ready(roles: Mapping[str, Sequence[Any]], timeout_s: float) -> None:
    """Every actor must answer `ready` within the limit. Raises ClusterError naming the role and the cause."""
    started = time.monotonic()
    owners = {
        actor.ready.remote(): f"{role} worker {i}"
        for role, actors in roles.items()
        for i, actor in enumerate(actors)
    }
    pending = list(owners)
    while pending:
        left = max(0.0, started + timeout_s - time.monotonic())
        done, pending = ray.wait(pending, num_returns=1, timeout=left)
        if not done:
            late = ", ".join(owners[ref] for ref in pending)
            raise ClusterError(f"{late} did not start within start_timeout_s={timeout_s:g} s")
        try:
            ray.get(done[0], timeout=60)
        except Exception as error:
            raise ClusterError(f"{owners[done[0]]} could not start: {last_words(error)}") from error
    log.info("%d workers answered after %.1f s", len(owners), time.monotonic() - started)


def last_words(error: BaseException) -> str:
    """The line that says why an actor could not be made or does not answer: what it raised, without Ray's account of
    where, or else Ray's first line."""
    error = getattr(error, "cause", None) or error
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if "creation task" in lines[0] else lines[0]


class PlacedActors:
    """The actors of a resource plan, each in its bundle of one placement group, which `reserve` waits for.

    As a context manager it gives everything back when the block fails.
    """

    def __init__(self, plan: ResourcePlan, what: str, remedy: str, timeout_s: float, *, key: str = ""):
        self.plan, self.by_role = plan, dict[str, list[Any]]()
        self.group = reserve(plan, what, remedy, timeout_s, key=key)

    def start(
        self, role: str, kind: Any, make: Callable[[Any, int], Any], *, restarts: int, **options: Any
    ) -> list[Any]:
        """Start the actors that the plan has for `role`; they need not have answered yet.

        kind: an actor class (made by `ray.remote`). make: calls its `remote`, given the placed class and a number.
        """
        started = self.by_role.setdefault(role, [])
        for actor in self.plan.of(role):
            placed = kind.options(**actor_options(actor, self.group, restarts=restarts), **options)
            started.append(make(placed, actor.index))
        return started

    def on_node(self, role: str, index: int) -> bool:
        """Whether the bundle of this actor is on a node. Ray looks for another one by itself when its node leaves."""
        nodes = placement_group_table(self.group)["bundles_to_node_id"]
        return all(nodes.get(actor.bundle) for actor in self.plan.of(role) if actor.index == index)

    def stop(self, role: str) -> None:
        """End the actors of `role`, for others to be started in their place: Ray has no room for these before the
        processes of the old ones are gone, and with them their GPUs and what they hold of the object store."""
        for actor in self.by_role.pop(role, []):
            ray.kill(actor)

    def close(self) -> None:
        """Stop every actor and give the resources back."""
        for actors in self.by_role.values():
            for actor in actors:
                ray.kill(actor)
        remove_placement_group(self.group)

    def __enter__(self) -> PlacedActors:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self.close()
