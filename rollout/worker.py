"""The Ray actor around the rollout engine.

A call carries the policy it wants (`Policy`: version, hash, reference to the adapter). A worker that holds
another one, because it was restarted or missed a publish, fetches it before it samples; nothing has to
remember which worker knows what.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError

from core.failures import InfrastructureFailure
from models.kontext import KontextTransformer
from models.lora.attach import Adapter
from rollout.engine import AdapterReceipt, ReplicaSpec, RolloutEngine, SampleInfo, SampleRequest, WorkerInfo
from rollout.machine import machine_failures
from rollout.sampler import Conditioning, SamplingSpec, Trajectory

log = logging.getLogger(__name__)
FETCH_S = 120


@dataclass(frozen=True)
class Policy:
    """Which adapter to sample with. `adapter` holds one object reference, wrapped so that Ray does not resolve
    it on the way: a worker that already has the weights moves no bytes."""

    version: int
    sha256: str
    adapter: tuple[Any, ...]

    def check(self, info: SampleInfo) -> None:
        """Raise RuntimeError where samples were not drawn with this policy's weights."""
        if info.policy_sha256 != self.sha256:
            raise RuntimeError(
                f"{info.worker} sampled with adapter {info.policy_sha256[:12]}, asked for was {self.sha256[:12]} "
                f"(version {self.version}): its weights changed after they were loaded, so do not trust its node; what "
                "was saved before is sound"
            )


class Replica:
    """The actor's methods, as a plain class so that a learner can hold one in-process."""

    def __init__(self, spec: ReplicaSpec, transformer: KontextTransformer | None = None):
        torch.set_num_threads(spec.threads)
        self.engine = RolloutEngine(spec, transformer)

    def ready(self) -> WorkerInfo:
        """Answers once the model is loaded."""
        return WorkerInfo(self.engine.worker, self.engine.spec.device, self.engine.version)

    def load_adapter(self, adapter: Adapter) -> AdapterReceipt:
        """Publish: load, re-hash the live weights, measure the probe."""
        return self.engine.load_adapter(adapter)

    def sample(
        self,
        request: SampleRequest,
        spec: SamplingSpec,
        policy: Policy,
        negative: Conditioning | None,
        *conditionings: Conditioning,
    ) -> tuple[SampleInfo, Trajectory, np.ndarray]:
        """See `RolloutEngine.sample`. Raises DataFailure or InfrastructureFailure; anything else is fatal."""
        if self.engine.sha256 != policy.sha256:
            receipt = self.engine.load_adapter(_fetched(policy))
            if receipt.sha256 != policy.sha256:
                raise InfrastructureFailure(
                    f"{receipt.worker}: adapter {policy.version} arrived as {receipt.sha256[:12]}, "
                    f"expected {policy.sha256[:12]}"
                )
        doing = f"sampling {len(request.seeds)} images"
        with machine_failures(self.engine.worker, doing, "lower rollout.chunk_size"):
            return self.engine.sample(request, spec, negative, conditionings)


def _fetched(policy: Policy) -> Adapter:
    """Raises InfrastructureFailure where it does not come: another node may be nearer to it."""
    try:
        return ray.get(policy.adapter[0], timeout=FETCH_S)
    except (GetTimeoutError, ObjectLostError) as error:
        raise InfrastructureFailure(
            f"{os.uname().nodename}: adapter {policy.version} did not arrive within {FETCH_S} s: {error}"
        ) from error


RolloutWorker = ray.remote(Replica)
