"""Connects to Ray, reserves room (bounded), places actors and waits (bounded) until they answer."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from core.cluster.placement import ResourcePlan, shortage

log = logging.getLogger(__name__)


class ClusterError(RuntimeError):
    """The cluster cannot hold the plan, or an actor did not start in time."""


def connect() -> bool:
    """Join the cluster that RAY_ADDRESS names (set under `ray job submit`; `auto` for one on this machine), else start
    Ray on this machine alone. Never joined by guess: the address file of a cluster that died stalls for minutes.

    Returns whether Ray was started or joined here, so that the caller may shut it down.
    """
    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=True)
    else:
        log.info("RAY_ADDRESS is not set: starting Ray on this machine alone")
        ray.init(address="local", include_dashboard=False, log_to_driver=True)
    return True


class PlacedActors:
    """The actors of a resource plan, each in its bundle of one placement group. As a context manager it gives all back
    when the block fails."""

    def __init__(self, plan: ResourcePlan, timeout_s: float, *, limit: str = "", **messages: str):
        """Wait until the cluster has room.

        Args:
            limit: the key that holds `timeout_s`, for the message.
            messages: `asks` and `remedy` as in `shortage`.

        Raises:
            ClusterError: the cluster is too small, or busy for longer than `timeout_s`.
        """
        self.plan = plan
        self.by_role: dict[str, list[Any]] = {}
        short = shortage(plan, ray.cluster_resources(), **messages)
        if short:
            raise ClusterError("; ".join(short))
        self.group = placement_group(list(plan.bundles), strategy="PACK")
        if not self.group.wait(timeout_seconds=timeout_s):
            remove_placement_group(self.group)
            raise ClusterError(
                f"no room for {len(plan.actors)} actors ({plan.cpus:g} CPUs, {plan.gpus:g} GPUs) after "
                f"{limit + '=' if limit else ''}{timeout_s:g} s: the cluster is large enough "
                f"({ray.cluster_resources()}) but busy ({ray.available_resources()} free), or no single node can hold "
                "one bundle; see `ray status`"
            )

    def start(
        self, role: str, kind: Any, make: Callable[[Any, int], Any], *, restarts: int, **options: Any
    ) -> list[Any]:
        """Start the actors that the plan has for `role`; they need not have answered yet.

        kind: an actor class (made by `ray.remote`). make: calls its `remote`, given the placed class and a number.
        """
        started = self.by_role.setdefault(role, [])
        for actor in self.plan.of(role):
            where = PlacementGroupSchedulingStrategy(
                placement_group=self.group, placement_group_bundle_index=actor.bundle
            )
            placed = kind.options(
                num_cpus=actor.cpus,
                num_gpus=actor.gpus,
                max_restarts=restarts,
                scheduling_strategy=where,
                **options,
            )
            started.append(make(placed, actor.index))
        return started

    def wait_ready(self, timeout_s: float) -> None:
        """Every actor must answer `ready` within the limit. Raises ClusterError naming the role and the cause."""
        started = time.monotonic()
        owners = {
            actor.ready.remote(): f"{role} worker {i}"
            for role, actors in self.by_role.items()
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
                raise ClusterError(f"{owners[done[0]]} could not start: {error}") from error
        log.info("%d workers answered after %.1f s", len(owners), time.monotonic() - started)

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
