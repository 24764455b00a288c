"""Replicas on a Ray cluster: room for all of them is reserved together, one actor holds each one's cards."""

from __future__ import annotations

import ipaddress
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rewards.editreward.serve.replicas import END_S, Replica, ReplicaPlan, ReplicaStatus

log = logging.getLogger(__name__)
CALL_S = 60.0
GPU_WAY_OUT = "lower --replicas or --tensor-parallel, wait for cards to be given back, or add nodes"


class ServeError(RuntimeError):
    """The replicas cannot be placed, did not start, or are all lost; the text says what to do."""


@dataclass(frozen=True)
class Room:
    """What each of `replicas` asks of the cluster, and how many seconds to wait for it."""

    replicas: int
    cpus: float
    gpus: int
    timeout_s: float


class PlacedReplica(Replica):
    """A replica that knows which node it is on."""

    def start_here(self) -> str:
        """`Replica.start` with this node's address."""
        return self.start(ray.util.get_node_ip_address())


class Fleet:
    """The replicas of one `serve`. Close it, or its servers run until this process ends."""

    def __init__(self, actors: Sequence[Any], group: Any) -> None:
        self._actors, self._group = list(actors), group
        self._lost: dict[int, ReplicaStatus] = {}

    def start(self) -> list[str]:
        """Start every server; returns their URLs at once. Raises ServeError where a place turns out unusable."""
        try:
            return ray.get([actor.start_here.remote() for actor in self._actors], timeout=CALL_S)
        except RayError as error:
            cause = getattr(error, "cause", None) or error
            raise ServeError(str(cause)) from error

    def statuses(self) -> list[ReplicaStatus]:
        """How every replica is now. One whose actor or node is gone has failed, and stays so."""
        answers = {i: actor.status.remote() for i, actor in enumerate(self._actors) if i not in self._lost}
        for i, answer in answers.items():
            try:
                answers[i] = ray.get(answer, timeout=CALL_S)
            except RayActorError:
                self._lost[i] = ReplicaStatus("failed", "", 0, "its actor is gone; is its node still up?", ())
        return [self._lost.get(i) or answers[i] for i in range(len(self._actors))]

    def close(self) -> None:
        """End every server and give the room back."""
        ending = [actor.stop.remote() for actor in self._actors]
        done, late = ray.wait(ending, num_returns=len(ending), timeout=3 * END_S)
        if late:
            log.error("%d replicas did not end within %.0f s; their actors are killed", len(late), 3 * END_S)
        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._group)


def cluster_has_gpus() -> bool:
    """Joins the cluster that RAY_ADDRESS names, else starts Ray on this machine alone, as `rl.train` does."""
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False)
    else:
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would starve the servers of a CPU
        ray.init(address="local", include_dashboard=False, log_to_driver=False)
    return ray.cluster_resources().get("GPU", 0.0) > 0


def check_host(host: str) -> None:
    """Raises ServeError for an address that reward workers on other nodes could not reach."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    loopback = host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
    if loopback and len(nodes) > 1:
        raise ServeError(
            f"the cluster has {len(nodes)} nodes, and servers on {host} answer their own node alone; give --host "
            "0.0.0.0, where the network is yours"
        )
    if not loopback:
        log.warning("whoever reaches %s can use the servers: vLLM asks for no token on /classify", host)


def place(plans: Sequence[ReplicaPlan], room: Room) -> Fleet:
    """Reserve room for all replicas and make their actors; nothing is started yet.

    Raises ServeError when the cluster is too small, or too busy for `room.timeout_s`.
    """
    for name, wanted in (("GPU", room.gpus * room.replicas), ("CPU", room.cpus * room.replicas)):
        there = ray.cluster_resources().get(name, 0.0)
        if wanted > there:
            raise ServeError(
                f"{room.replicas} replicas need {wanted:g} {name}s together, the cluster has {there:g}; {GPU_WAY_OUT}"
            )
    bundle = {name: amount for name, amount in (("CPU", room.cpus), ("GPU", float(room.gpus))) if amount}
    group = placement_group([bundle] * room.replicas, strategy="PACK")
    try:
        if not group.wait(timeout_seconds=room.timeout_s):
            free = ray.available_resources()
            raise ServeError(
                f"no room for {room.replicas} replicas of {room.gpus} GPUs and {room.cpus:g} CPUs within "
                f"{room.timeout_s:g} s: {free.get('GPU', 0.0):g} GPUs and {free.get('CPU', 0.0):g} CPUs are free, or "
                f"no node has enough for one replica; {GPU_WAY_OUT}"
            )
        remote = ray.remote(PlacedReplica)
        actors = [
            remote.options(
                num_cpus=room.cpus,
                num_gpus=room.gpus,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=group, placement_group_bundle_index=plan.index
                ),
            ).remote(plan)
            for plan in plans
        ]
    except BaseException:
        remove_placement_group(group)
        raise
    return Fleet(actors, group)


def wait_until_ready(fleet: Fleet, show: Any, limit_s: float, leaving: Any) -> bool:
    """Show statuses until every replica is ready; False when `leaving` was set meanwhile.

    Raises ServeError when one fails, or is not ready within the limit.
    """
    deadline = time.monotonic() + limit_s
    while not leaving.wait(0.5):
        statuses = fleet.statuses()
        show(statuses)
        for index, status in enumerate(statuses):
            if status.state == "failed":
                raise ServeError(f"replica {index} did not start: {status.detail}")
        if all(status.state == "ready" for status in statuses):
            return True
        if time.monotonic() > deadline:
            late = [index for index, status in enumerate(statuses) if status.state != "ready"]
            raise ServeError(f"replicas {late} were not ready within {limit_s:g} s")
    return False


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
