"""All ranks of a supervised run behind one `call`: in this process where there is one, else one Ray actor each.

A rank is any object with `setup(address, port)`, which joins the process group, and the methods that its driver calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from core.cluster.process_group import free_port
from core.keys import Count, Device, Positive
from core.logs import start_logging

MakeRank = Callable[[int], Any]
"""Builds the rank of a number. Sent to Ray's actors, so it imports what it needs when it is called."""
LOOK_S = 5.0
"""How long a dead rank is looked for when another one fails: its neighbours' collectives may fail before Ray tells."""
_MACHINE_ERRORS = {
    "OutOfMemoryError",
    "AcceleratorError",
    "DistBackendError",
    "DistNetworkError",
    "DistStoreError",
}
"""Names of torch's classes: of the card, and of the connections between ranks (NCCL, rendezvous). gloo has none."""


class RankLost(RuntimeError):
    """A rank died, hangs or could not start, or its machine failed. All share one optimizer, so it ends the training of
    all; fresh ranks, or `--resume auto`, continue from the last checkpoint."""


class NodeLost(RankLost):
    """A rank's node left, says Ray."""


class RanksBlind(RankLost):
    """Ranks do not see the run's folder, which fresh ones would not either."""


@dataclass
class RankResources:
    """What each rank takes, and for how long is waited."""

    device: Device = "cuda"
    """Where ranks run."""
    rank_cpus: Positive = 8.0
    """Ray's logical CPUs of a rank."""
    threads: Count = 4
    """CPU threads that a rank really uses."""
    placement_timeout_s: Positive = 600.0
    """Longest wait for the cluster's resources, in seconds."""
    start_timeout_s: Positive = 1800.0
    """Longest wait for a rank to be ready, in seconds."""
    collective_timeout_s: Positive = 1800.0
    """Longest wait of a rank for the others once all are set up, in seconds."""
    call_timeout_s: Positive = 7200.0
    """Longest wait for a rank's answer, in seconds."""
    stop_timeout_s: Positive = 600.0
    """Longest that a run asked to stop (Ctrl-C, SIGTERM) takes to save, in seconds; then it leaves without."""


class Ranks(Protocol):
    """`call` runs a method on every rank and gives the answers in rank order."""

    def call(self, method: str, *args: Any) -> list[Any]: ...

    def close(self) -> None: ...


def start_ranks(make: MakeRank, count: int, resources: RankResources) -> Ranks:
    """Start and set up all ranks. Raises RankLost where they do not come up in time."""
    return LocalRank(make) if count == 1 else RayRanks(make, count, resources)


def gather(calls: list[Any], method: str, timeout_s: float) -> list[Any]:
    """Results of one call to every rank, in rank order.

    The first failure ends the wait for the others, which would sit in a collective. Raises what a rank raised, and
    RankLost for one that died, did not answer in time, or whose machine failed (`_MACHINE_ERRORS`).
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    pending, deadline, answers = list(calls), time.monotonic() + timeout_s, {}
    while pending:
        ready, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [calls.index(call) for call in pending]
            raise RankLost(
                f"{method} took longer than {timeout_s:g} s on {len(pending)} of {len(calls)} ranks ({late}) "
                "(resources.call_timeout_s, resources.start_timeout_s)"
            )
        try:
            answers[ready[0]] = ray.get(ready[0], timeout=60)
        except RayTaskError as error:
            cause = error.as_instanceof_cause()
            _look_for_the_dead(calls, pending, method)
            if _of_the_machine(cause):
                raise RankLost(
                    f"rank {calls.index(ready[0])} failed in {method} ({type(error.cause).__name__}: "
                    f"{_first_line(error.cause)})"
                ) from error
            raise cause from error
        except RayError as error:
            raise _died(calls.index(ready[0]), method, error) from error
    return [answers[call] for call in calls]


def rendezvous(first: Any, timeout_s: float) -> tuple[str, int]:
    """Address and port at which all ranks meet, from the actor of rank 0 once it is up. Raises RankLost."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    try:
        return ray.get(first.address.remote(), timeout=timeout_s)
    except GetTimeoutError as error:
        raise RankLost(
            f"rank 0 did not start within resources.start_timeout_s={timeout_s:g} s; see `ray status` for room"
        ) from error
    except RayError as error:
        raise _died(0, "its start", error) from error


def _look_for_the_dead(calls: list[Any], pending: list[Any], method: str) -> None:
    """Raise RankLost where one of the ranks that have not answered dies within LOOK_S."""
    import ray
    from ray.exceptions import RayActorError, RayError

    deadline = time.monotonic() + LOOK_S
    while pending:
        ready, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            return
        try:
            ray.get(ready[0], timeout=60)
        except RayActorError as error:
            raise _died(calls.index(ready[0]), method, error) from error
        except RayError:
            continue


def _died(rank: int, method: str, error: BaseException) -> RankLost:
    """Ray's account names the process's end, or the node's, on a line of its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = next((line for line in lines if "because" in line), lines[0] if lines else type(error).__name__)
    lost = NodeLost if "its node has died" in cause else RankLost
    return lost(
        f"rank {rank} died in {method} ({cause.partition(' Some common causes')[0]}); Ray's log may say more, "
        "such as that the machine ran out of memory"
    )


def _of_the_machine(cause: BaseException) -> bool:
    names = {kind.__name__ for kind in type(cause).__mro__}
    return bool(names & _MACHINE_ERRORS) or "third_party/gloo" in str(cause)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


class LocalRank:
    """One rank in this process."""

    def __init__(self, make: MakeRank):
        self.rank = make(0)
        self.rank.setup("127.0.0.1", free_port())

    def call(self, method: str, *args: Any) -> list[Any]:
        return [getattr(self.rank, method)(*args)]

    def close(self) -> None:
        """Nothing to give back: the process group ends with the process."""


class RayRanks:
    """One actor for each rank, in a placement group that is waited for with a limit."""

    def __init__(self, make: MakeRank, count: int, resources: RankResources):
        import ray

        from core.cluster.actors import PlacedActors, connect
        from core.cluster.placement import uniform_plan
        from core.failures import ClusterError

        connect()
        self.resources = resources
        gpus = 1.0 if resources.device == "cuda" else 0.0
        try:
            self._placed = PlacedActors(
                uniform_plan("rank", count, resources.rank_cpus, gpus),
                f"training with {count} ranks",
                "lower the number of ranks or resources.rank_cpus",
                resources.placement_timeout_s,
                key="resources.placement_timeout_s",
            )
        except ClusterError as error:
            raise RankLost(str(error)) from error
        with self._placed as placed:
            self.actors = placed.start(
                "rank", ray.remote(RankActor), lambda kind, rank: kind.remote(make, rank), restarts=0
            )
            limit = resources.start_timeout_s
            self._call("setup", rendezvous(self.actors[0], limit), limit)

    def call(self, method: str, *args: Any) -> list[Any]:
        return self._call(method, args, self.resources.call_timeout_s)

    def _call(self, method: str, args: tuple[Any, ...], limit: float) -> list[Any]:
        return gather([actor.run.remote(method, args) for actor in self.actors], method, limit)

    def close(self) -> None:
        """Stop the actors and give their resources back."""
        self._placed.close()


class RankActor:
    """What runs inside a Ray actor: torch loads there, not where the actor is made."""

    def __init__(self, make: MakeRank, rank: int):
        start_logging()
        self.rank = make(rank)

    def address(self) -> tuple[str, int]:
        """An address of this node and a port that is free now."""
        import ray

        return ray.util.get_node_ip_address(), free_port()

    def run(self, method: str, args: tuple[Any, ...]) -> Any:
        return getattr(self.rank, method)(*args)
