"""The Ray actor around one learner rank, and the group of all ranks as the controller sees it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError

from core.cluster.process_group import free_port, join_process_group, limit_collectives
from core.cluster.ranks import RanksBlind, gather, rendezvous
from core.failures import ObjectsLost
from models.conditioning import Conditioning
from models.lora.attach import Adapter, hash_state
from rl.learner.batching import RankShare, TrainBatch, TrainSample
from rl.learner.learner import Learner, LearnerSpec
from rl.learner.rehearsal import Rehearsal, RehearsalPicture, SampledPicture, rank_share
from rl.learner.stats import UpdateStats
from rl.recipe.schema import RehearsalConfig
from rollout.engine import AdapterReceipt, SampleInfo, SampleRequest
from rollout.sampler import SamplingSpec, Trajectory
from rollout.worker import Policy, Replica, WorkerInfo


class LearnerRank:
    """One rank: joins the process group, resolves its share's references, runs the update."""

    def __init__(self, spec: LearnerSpec, rank: int, world_size: int):
        torch.set_num_threads(spec.replica.threads)
        self.spec, self.rank, self.world_size = spec, rank, world_size
        self.learner: Learner | None = None
        self.replica: Replica | None = None
        self.shares: list[tuple[list[TrainSample], int]] = []

    def address(self) -> tuple[str, int]:
        """An address of this node and a port that is free now, for the process group's rendezvous."""
        return ray.util.get_node_ip_address(), free_port()

    def setup(self, master_address: str, master_port: int) -> WorkerInfo:
        """Join the process group and build the model. Raises after `start_timeout_s` without the others."""
        join_process_group(
            rank=self.rank,
            world_size=self.world_size,
            address=master_address,
            port=master_port,
            device=self.spec.replica.device,
            timeout_s=self.spec.start_timeout_s,
        )
        self.learner = Learner(self.spec)
        if self.spec.inprocess:
            self.replica = Replica(self.spec.replica, self.learner.transformer)
        limit_collectives(self.spec.collective_timeout_s)
        return self.ready()

    def sees(self, folder: str) -> bool:
        """Whether this node has the run's folder: every rank writes its part of a checkpoint there."""
        return Path(folder).is_dir()

    def ready(self) -> WorkerInfo:
        """Who answers."""
        return WorkerInfo(f"{os.uname().nodename}:{os.getpid()}", self.spec.replica.device, -1)

    def begin_stage(self) -> None:
        """See `Learner.begin_stage`."""
        self._learner().begin_stage()

    def set_negative(self, negative: Conditioning | None) -> None:
        """The negative prompt's conditioning, for classifier-free guidance in the replay."""
        self._learner().negative = negative

    def rehearse(self, config: RehearsalConfig, pictures: Sequence[SampledPicture]) -> None:
        """Keep this rank's share of the drawn pictures; the stage's updates rehearse them from now on."""
        learner, own = self._learner(), rank_share(pictures, self.rank, self.world_size)
        values = _fetched({r for p in own for r in (p.trajectory, p.conditioning)})
        learner.rehearsal = Rehearsal(
            config,
            [
                RehearsalPicture(
                    values[p.trajectory].final_latents[p.row].clone(), values[p.conditioning], p.shape
                )
                for p in own
            ],
            values[own[0].trajectory].sigmas,
            rank=self.rank,
            ranks=self.world_size,
            micro_batch_size=self.spec.config.micro_batch_size,
        )

    def fetch(self, shares: Sequence[RankShare]) -> None:
        """Get what this rank's shares of one rollout refer to, before any rank enters a collective. Raises ObjectsLost
        where a node took some of it."""
        self.shares = []  # first, so that two rollouts never stand here at once
        values = _fetched(
            {r for share in shares for s in share.samples for r in (s.trajectory, s.conditioning)}
        )
        self.shares = [
            (
                [TrainSample.of(s, values[s.trajectory], values[s.conditioning]) for s in share.samples],
                share.count,
            )
            for share in shares
        ]

    def update(self, learning_rate: float) -> tuple[list[UpdateStats], float, float]:
        """Train on what was fetched, at this rate. Returns statistics, start time and seconds."""
        started, began = time.time(), time.perf_counter()
        shares, self.shares = self.shares, []
        self._learner().set_learning_rate(learning_rate)
        stats = self._learner().update(shares)
        return stats, started, time.perf_counter() - began

    def adapter(self, version: int, *, shipped: bool) -> Adapter | None:
        """The live adapter (to sample with), or the shipped one (to evaluate and save); None off rank 0."""
        learner = self._learner()
        tensors = learner.shipped_adapter() if shipped else learner.adapter()
        return make_adapter(version, tensors) if self.rank == 0 else None

    def reference_adapter(self, version: int) -> Adapter | None:
        """The adapter as the stage began; None off rank 0."""
        reference = self._learner().reference_state()
        return make_adapter(version, reference) if self.rank == 0 else None

    def save(self, folder: str) -> None:
        """See `Learner.save`."""
        self._learner().save(Path(folder))

    def load(self, folder: str) -> None:
        """See `Learner.load`."""
        self._learner().load(Path(folder))

    def load_adapter(self, adapter: Adapter) -> AdapterReceipt:
        """In-process placement: what a rollout worker would do."""
        return self._replica().load_adapter(adapter)

    def sample(
        self,
        request: SampleRequest,
        spec: SamplingSpec,
        policy: Policy,
        negative: Conditioning | None,
        *conditionings: Conditioning,
    ) -> tuple[SampleInfo, Trajectory, Any]:
        """In-process placement: what a rollout worker would do."""
        return self._replica().sample(request, spec, policy, negative, *conditionings)

    def _learner(self) -> Learner:
        if self.learner is None:
            raise RuntimeError("setup() was not called on this learner rank")
        return self.learner

    def _replica(self) -> Replica:
        if self.replica is None:
            raise RuntimeError("this learner rank samples only with resources.placement=inprocess")
        return self.replica


def make_adapter(version: int, tensors: dict[str, Any]) -> Adapter:
    """An adapter with the hash of its tensors."""
    return Adapter(version, hash_state(tensors), tensors)


def _fetched(refs: set[Any]) -> dict[Any, Any]:
    """Reference -> value. Raises ObjectsLost."""
    order = list(refs)
    try:
        return dict(zip(order, ray.get(order, timeout=600), strict=True))
    except (ObjectLostError, GetTimeoutError) as error:
        raise ObjectsLost(f"samples did not arrive: {str(error).splitlines()[0]}") from error


class LearnerGroup:
    """All ranks; every call goes to each of them, and the first failure ends the wait for the others.

    Every method raises RankLost when a rank is dead or late, and what a rank raised.
    """

    def __init__(self, actors: Sequence[Any], *, call_timeout_s: float, start_timeout_s: float):
        self.actors = list(actors)
        self._timeout_s = call_timeout_s
        address, port = rendezvous(self.actors[0], start_timeout_s)
        gather([actor.setup.remote(address, port) for actor in self.actors], "setup", start_timeout_s)

    def check_sees(self, folder: Path) -> None:
        """Raise RanksBlind naming the ranks whose node does not share the run's folder."""
        blind = [rank for rank, sees in enumerate(self._all("sees", str(folder))) if not sees]
        if blind:
            raise RanksBlind(
                f"learner ranks {blind} do not see {folder}: output_dir must lie on a file system that all nodes share"
            )

    def check_alive(self) -> None:
        """Raise RankLost unless every rank answers."""
        self._all("ready")

    def begin_stage(self) -> None:
        self._all("begin_stage")

    def set_negative(self, negative: Any) -> None:
        self._all("set_negative", negative)

    def rehearse(self, config: RehearsalConfig, pictures: Sequence[SampledPicture]) -> None:
        self._all("rehearse", config, list(pictures))

    def fetch(self, batch: TrainBatch) -> None:
        """Have every rank get its samples, for `update`. Raises ObjectsLost where a node took some: draw them again."""
        calls = [
            actor.fetch.remote([shares[rank] for shares in batch.updates])
            for rank, actor in enumerate(self.actors)
        ]
        gather(calls, "fetch", self._timeout_s)

    def update(self, learning_rate: float) -> tuple[list[UpdateStats], list[tuple[float, float]]]:
        """One rollout's updates; statistics are global, spans are (start, seconds) per rank."""
        results = self._all("update", learning_rate)
        return results[0][0], [(started, seconds) for _, started, seconds in results]

    def adapter(self, version: int, *, shipped: bool) -> Adapter:
        return self._all("adapter", version, shipped=shipped)[0]

    def reference_adapter(self, version: int) -> Adapter:
        return self._all("reference_adapter", version)[0]

    def save(self, folder: Path) -> None:
        self._all("save", str(folder))

    def load(self, folder: Path) -> None:
        self._all("load", str(folder))

    def _all(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return gather(
            [getattr(a, method).remote(*args, **kwargs) for a in self.actors], method, self._timeout_s
        )


LearnerWorker = ray.remote(LearnerRank)
