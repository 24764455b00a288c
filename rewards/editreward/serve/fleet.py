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
from ray.util.placement_group import remove_placement_group

from core.cluster.actors import actor_options, connect, reserve
from core.cluster.placement import ActorPlan, ResourcePlan
from core.failures import ClusterError
from rewards.editreward.serve.replicas import END_S, Replica, ReplicaPlan, ReplicaStatus

log = logging.getLogger(__name__)
CALL_S = 60.0


@dataclass(frozen=True)
class Room:
    """What each of `replicas` asks of the cluster, and how many seconds to wait for it."""

    replicas: int
    cpus: float
    gpus: int
    timeout_s: float

    def plan(self) -> ResourcePlan:
        """One bundle for each replica."""
        bundle = {name: amount for name, amount in (("CPU", self.cpus), ("GPU", float(self.gpus))) if amount}
        actors = (ActorPlan("replica", i, i, self.cpus, self.gpus) for i in range(self.replicas))
        return ResourcePlan((bundle,) * self.replicas, tuple(actors))


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
        """Start every server; returns their URLs at once. Raises ClusterError where a place turns out unusable."""
        try:
            return ray.get([actor.start_here.remote() for actor in self._actors], timeout=CALL_S)
        except RayError as error:
            raise ClusterError(str(getattr(error, "cause", None) or error)) from error

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
        _, late = ray.wait(ending, num_returns=len(ending), timeout=3 * END_S)
        if late:
            log.error("%d replicas did not end within %.0f s; their actors are killed", len(late), 3 * END_S)
        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._group)


def cluster_has_gpus() -> bool:
    """Joins the cluster that RAY_ADDRESS names, else starts Ray on this machine alone, as `rl.train` does."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would starve the servers of a CPU
    connect(worker_logs=False)
    return ray.cluster_resources().get("GPU", 0.0) > 0


def check_host(host: str) -> None:
    """Raises ClusterError for an address that reward workers on other nodes could not reach."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    loopback = host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
    if loopback and len(nodes) > 1:
        raise ClusterError(
            f"the cluster has {len(nodes)} nodes, and servers on {host} answer their own node alone; give --host "
            "0.0.0.0, where the network is yours"
        )
    if not loopback:
        log.warning("whoever reaches %s can use the servers: vLLM asks for no token on /classify", host)


def place(plans: Sequence[ReplicaPlan], room: Room) -> Fleet:
    """Reserve room for all replicas and make their actors; nothing is started yet.

    Raises ClusterError when the cluster is too small, or too busy for `room.timeout_s`.
    """
    what = f"serving {room.replicas} replicas of {room.gpus} GPUs and {room.cpus:g} CPUs"
    group = reserve(room.plan(), what, "lower --replicas or --tensor-parallel", room.timeout_s)
    try:
        remote = ray.remote(PlacedReplica)
        options = [actor_options(actor, group, restarts=0) for actor in room.plan().actors]
        actors = [remote.options(**options[plan.index]).remote(plan) for plan in plans]
    except BaseException:
        remove_placement_group(group)
        raise
    return Fleet(actors, group)


def wait_until_ready(fleet: Fleet, show: Any, limit_s: float, leaving: Any) -> bool:
    """Show statuses until every replica is ready; False when `leaving` was set meanwhile.

    Raises ClusterError when one fails, or is not ready within the limit.
    """
    deadline = time.monotonic() + limit_s
    while not leaving.wait(0.5):
        statuses = fleet.statuses()
        show(statuses)
        for index, status in enumerate(statuses):
            if status.state == "failed":
                raise ClusterError(f"replica {index} did not start: {status.detail}")
        late = [index for index, status in enumerate(statuses) if status.state != "ready"]
        if not late:
            return True
        if time.monotonic() > deadline:
            raise ClusterError(f"replicas {late} were not ready within {limit_s:g} s")
    return False


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
