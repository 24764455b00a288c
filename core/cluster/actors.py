"""Connects to Ray, reserves room (bounded), places actors and waits (bounded) until they answer."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from core.cluster.placement import ActorPlan, ResourcePlan
from core.failures import ClusterError

log = logging.getLogger(__name__)


def connect(*, worker_logs: bool = True) -> None:
    """Join the cluster that RAY_ADDRESS names (set under `ray job submit`; `auto` for one on this machine), else start
    Ray on this machine alone. Never joined by guess: the address file of a cluster that died stalls for minutes.
    `worker_logs`: whether this process prints what workers print."""
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=worker_logs)
    else:
        log.info("RAY_ADDRESS is not set: starting Ray on this machine alone")
        ray.init(address="local", include_dashboard=False, log_to_driver=worker_logs)


def reserve(plan: ResourcePlan, what: str, way_out: str, timeout_s: float) -> Any:
    """A placement group for the bundles of `plan`, once the cluster has room.

    Args:
        what: who asks, as messages begin.
        way_out: how to ask for less; `{}` becomes CPU or GPU.

    Raises:
        ClusterError: the cluster is too small, or busy for longer than `timeout_s`.
    """
    for name, wanted in (("CPU", plan.cpus), ("GPU", plan.gpus)):
        have = ray.cluster_resources().get(name, 0.0)
        if wanted > have + 1e-6:
            raise ClusterError(
                f"{what} needs {wanted:g} {name}s, the cluster has {have:g}; add nodes (ray start --address=...), or "
                + way_out.format(name)
            )
    group = placement_group(list(plan.bundles), strategy="PACK")
    if not group.wait(timeout_seconds=timeout_s):
        remove_placement_group(group)
        free = ray.available_resources()
        raise ClusterError(
            f"{what} found no room in {timeout_s:g} s: {free.get('GPU', 0.0):g} GPUs and {free.get('CPU', 0.0):g} CPUs "
            "are free, or no node has enough for one bundle; see `ray status`"
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


def wait_ready(roles: dict[str, list[Any]], timeout_s: float) -> None:
    """Every actor must answer `ready` within the limit. Raises ClusterError naming the role and the cause."""
    owners = {
        actor.ready.remote(): f"{role} worker {i}"
        for role, list_ in roles.items()
        for i, actor in enumerate(list_)
    }
    pending, deadline = list(owners), time.monotonic() + timeout_s
    while pending:
        done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            late = ", ".join(owners[ref] for ref in pending)
            raise ClusterError(f"{late} did not start within start_timeout_s={timeout_s:g} s")
        try:
            ray.get(done[0], timeout=60)
        except Exception as error:
            raise ClusterError(f"{owners[done[0]]} could not start: {error}") from error
