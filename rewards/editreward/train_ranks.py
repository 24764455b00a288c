"""All ranks of a training run behind one `call`: in this process where there is one, else one Ray actor each."""

from __future__ import annotations

import logging
import socket
import time
from typing import Any, Protocol

from rewards.editreward.config import Recipe
from rewards.editreward.settings import EditRewardSettings

log = logging.getLogger(__name__)


class RankLost(RuntimeError):
    """A rank failed or could not start. All share one optimizer, so the run stops; `--resume auto` continues it."""


class Ranks(Protocol):
    """`call` runs a method of `TrainRank` on every rank and gives the answers in rank order."""

    def call(self, method: str, *args: Any) -> list[Any]: ...

    def close(self) -> None: ...


def start_ranks(recipe: Recipe, settings: EditRewardSettings) -> Ranks:
    """Start and set up all ranks. Raises RankLost where they do not come up in time."""
    if recipe.train.ranks == 1:
        return LocalRank(recipe, settings)
    return RayRanks(recipe, settings)


class LocalRank:
    """One rank in this process."""

    def __init__(self, recipe: Recipe, settings: EditRewardSettings):
        from rewards.editreward.train_rank import TrainRank

        self.rank = TrainRank(recipe, settings, 0)
        self.rank.setup("127.0.0.1", _free_port())

    def call(self, method: str, *args: Any) -> list[Any]:
        return [getattr(self.rank, method)(*args)]

    def close(self) -> None:
        """Nothing to give back: the process group ends with the process."""


class RayRanks:
    """One actor for each rank, in a placement group that is waited for with a limit."""

    def __init__(self, recipe: Recipe, settings: EditRewardSettings):
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from rl.cluster import connect

        connect()
        self.resources, ranks = recipe.resources, recipe.train.ranks
        gpus = 1 if self.resources.device == "cuda" else 0
        bundle = {"CPU": self.resources.rank_cpus, "GPU": gpus} if gpus else {"CPU": self.resources.rank_cpus}
        self._check_size(bundle, ranks)
        self.group = placement_group([bundle] * ranks, strategy="PACK")
        self.actors: list[Any] = []
        self._remove = remove_placement_group
        try:
            if not self.group.wait(timeout_seconds=self.resources.placement_timeout_s):
                raise RankLost(
                    f"no room for {ranks} x {bundle} after resources.placement_timeout_s="
                    f"{self.resources.placement_timeout_s:g} s: the cluster is busy; see `ray status`"
                )
            for rank in range(ranks):
                where = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=rank)
                actor = ray.remote(RankActor).options(
                    num_cpus=self.resources.rank_cpus, num_gpus=gpus, scheduling_strategy=where
                )
                self.actors.append(actor.remote(recipe, settings, rank))
            limit = self.resources.start_timeout_s
            address, port = ray.get(self.actors[0].address.remote(), timeout=limit)
            self._call("setup", (address, port), limit)
        except BaseException:
            self.close()
            raise

    def _check_size(self, bundle: dict[str, float], ranks: int) -> None:
        import ray

        have = ray.cluster_resources()
        for name, amount in bundle.items():
            if amount * ranks > have.get(name, 0) + 1e-6:
                raise RankLost(
                    f"train.ranks={ranks} need {amount * ranks:g} {name}s, the cluster has {have.get(name, 0):g}; add "
                    "nodes (ray start --address=...) or lower train.ranks or resources.rank_cpus"
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

    def __init__(self, recipe: Recipe, settings: EditRewardSettings, rank: int):
        from rewards.editreward.train_rank import TrainRank

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        self.rank = TrainRank(recipe, settings, rank)

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
