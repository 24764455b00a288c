"""Replicas on a Ray cluster: room for all of them is reserved together, one actor holds each one's cards."""

from __future__ import annotations

import ipaddress
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from core.cluster.actors import PlacedActors, connect
from core.cluster.placement import uniform_plan
from core.cluster.servers.replica import END_S, Replica, ReplicaPlan, ReplicaStatus
from core.failures import ClusterError

log = logging.getLogger(__name__)
CALL_S = 60.0


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
    """Equal servers. Close it, or they run until this process ends."""

    def __init__(self, placed: PlacedActors) -> None:
        self._placed, self._actors = placed, placed.by_role["replica"]
        self._lost: dict[int, ReplicaStatus] = {}
        self._known: dict[int, ReplicaStatus] = {}

    def start(self) -> list[str]:
        """Start every server; returns their URLs at once. Raises ClusterError where a place turns out unusable."""
        try:
            return ray.get([actor.start_here.remote() for actor in self._actors], timeout=CALL_S)
        except RayError as error:
            raise ClusterError(str(getattr(error, "cause", None) or error)) from error

    def statuses(self) -> list[ReplicaStatus]:
        """How every replica is now, asked together. One whose actor or node is gone has failed, and stays so; one that
        does not answer is asked again the next time."""
        asked = {i: actor.status.remote() for i, actor in enumerate(self._actors) if i not in self._lost}
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=CALL_S)
        for i, answer in asked.items():
            known = self._known.get(i, ReplicaStatus("starting", "", 0, "", ()))
            try:
                self._known[i] = ray.get(answer, timeout=0)
            except GetTimeoutError:
                detail = f"its actor did not answer within {CALL_S:g} s; is its node reachable?"
                self._known[i] = replace(known, state="silent", detail=detail, lines=())
            except RayActorError:
                self._lost[i] = ReplicaStatus(
                    "failed", known.url, known.restarts, "its actor is gone; is its node still up?", ()
                )
        return [self._lost.get(i) or self._known[i] for i in range(len(self._actors))]

    def close(self) -> None:
        """End every server and give the room back."""
        ending = [actor.stop.remote() for actor in self._actors]
        _, late = ray.wait(ending, num_returns=len(ending), timeout=3 * END_S)
        if late:
            log.error("%d replicas did not end within %.0f s; their actors are killed", len(late), 3 * END_S)
        self._placed.close()


def cluster_has_gpus() -> bool:
    """Connects to Ray first, as `core.cluster.actors.connect` does."""
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
        log.warning("whoever reaches %s can use the servers: they ask for no token", host)


def place(plans: Sequence[ReplicaPlan], room: Room, *, remedy: str) -> Fleet:
    """Reserve room for all replicas and make their actors; nothing is started yet.

    Raises ClusterError, with `remedy`, when the cluster is too small, or too busy for `room.timeout_s`.
    """
    plan = uniform_plan("replica", room.replicas, room.cpus, room.gpus)
    what = f"serving {room.replicas} replicas of {room.gpus} GPUs and {room.cpus:g} CPUs"
    with PlacedActors(plan, what, remedy, room.timeout_s) as placed:
        kind = ray.remote(PlacedReplica)
        placed.start("replica", kind, lambda actor, index: actor.remote(plans[index]), restarts=0)
        return Fleet(placed)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
