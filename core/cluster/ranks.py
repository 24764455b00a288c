"""All ranks of a supervised run behind one `call`: in this process where there is one, else one Ray actor each.

A rank is any object with `setup(address, port)`, which joins the process group, and the methods that its driver calls.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from typing import Any, Protocol

from core.logs import start_logging

log = logging.getLogger(__name__)

MakeRank = Callable[[int], Any]
"""Builds the rank of a number. Sent to Ray's actors, so it imports what it needs when it is called."""


class RankLost(RuntimeError):
    """A rank failed or could not start. All share one optimizer, so the run stops; `--resume auto` continues it."""


class RankResources(Protocol):
    """What each rank gets, and for how long is waited; all keys of a recipe's `resources`."""

    device: str
    rank_cpus: float
    placement_timeout_s: float
    start_timeout_s: float
    call_timeout_s: float


class Ranks(Protocol):
    """`call` runs a method on every rank and gives the answers in rank order."""

    def call(self, method: str, *args: Any) -> list[Any]: ...

    def close(self) -> None: ...


def start_ranks(make: MakeRank, count: int, resources: RankResources) -> Ranks:
    """Start and set up all ranks. Raises RankLost where they do not come up in time."""
    return LocalRank(make) if count == 1 else RayRanks(make, count, resources)


class LocalRank:
    """One rank in this process."""

    def __init__(self, make: MakeRank):
        self.rank = make(0)
        self.rank.setup("127.0.0.1", _free_port())

    def call(self, method: str, *args: Any) -> list[Any]:
        return [getattr(self.rank, method)(*args)]

    def close(self) -> None:
        """Nothing to give back: the process group ends with the process."""


class RayRanks:
    """One actor for each rank, in a placement group that is waited for with a limit."""

    def __init__(self, make: MakeRank, count: int, resources: RankResources):
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from core.cluster.actors import connect

        connect()
        self.resources = resources
        gpus = 1 if resources.device == "cuda" else 0
        bundle = {"CPU": resources.rank_cpus, "GPU": gpus} if gpus else {"CPU": resources.rank_cpus}
        self._check_size(bundle, count)
        self.group = placement_group([bundle] * count, strategy="PACK")
        self.actors: list[Any] = []
        self._remove = remove_placement_group
        try:
            if not self.group.wait(timeout_seconds=resources.placement_timeout_s):
                raise RankLost(
                    f"no room for {count} x {bundle} after resources.placement_timeout_s="
                    f"{resources.placement_timeout_s:g} s: the cluster is busy; see `ray status`"
                )
            for rank in range(count):
                where = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=rank)
                actor = ray.remote(RankActor).options(
                    num_cpus=resources.rank_cpus, num_gpus=gpus, scheduling_strategy=where
                )
                self.actors.append(actor.remote(make, rank))
            limit = resources.start_timeout_s
            address, port = ray.get(self.actors[0].address.remote(), timeout=limit)
            self._call("setup", (address, port), limit)
        except BaseException:
            self.close()
            raise

    def _check_size(self, bundle: dict[str, float], count: int) -> None:
        import ray

        have = ray.cluster_resources()
        for name, amount in bundle.items():
            if amount * count > have.get(name, 0) + 1e-6:
                raise RankLost(
                    f"{count} ranks need {amount * count:g} {name}s, the cluster has {have.get(name, 0):g}; add "
                    "nodes (ray start --address=...) or lower the number of ranks or resources.rank_cpus"
                )

    def call(self, method: str, *args: Any) -> list[Any]:
        return self._call(method, args, self.resources.call_timeout_s)

    def _call(self, method: str, args: tuple[Any, ...], limit: float) -> list[Any]:
        """The first failure ends the wait for the others, which would sit in a collective."""
        import ray

        calls = [actor.run.remote(method, args) for actor in self.actors]
        pending, deadline = list(calls), time.monotonic() + limit
        while pending:
            ready, pending = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankLost(
                    f"{method} took longer than {limit:g} s on {len(pending)} of {len(calls)} ranks "
                    "(resources.call_timeout_s, resources.start_timeout_s); continue with --resume auto"
                )
            try:
                ray.get(ready[0], timeout=60)
            except ray.exceptions.RayTaskError as error:
                raise error.as_instanceof_cause() from error
            except ray.exceptions.RayActorError as error:
                raise RankLost(
                    f"rank {calls.index(ready[0])} died in {method} ({str(error).splitlines()[0]}); its cause is in "
                    "Ray's log (out of memory is the usual one); continue with --resume auto"
                ) from error
        return ray.get(calls, timeout=60)

    def close(self) -> None:
        """Stop the actors and give their resources back."""
        import ray

        for actor in self.actors:
            ray.kill(actor)
        self._remove(self.group)


class RankActor:
    """What runs inside a Ray actor: torch loads there, not where the actor is made."""

    def __init__(self, make: MakeRank, rank: int):
        start_logging()
        self.rank = make(rank)

    def address(self) -> tuple[str, int]:
        """An address of this node and a port that is free now."""
        import ray

        return ray.util.get_node_ip_address(), _free_port()

    def run(self, method: str, args: tuple[Any, ...]) -> Any:
        return getattr(self.rank, method)(*args)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
