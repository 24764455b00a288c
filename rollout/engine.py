"""One DiT replica: samples chunks of a group, decodes the images, holds one adapter at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from core.failures import DataFailure
from core.inputs import check_files
from core.seeds import derive_seed
from models.compiling import compile_blocks
from models.components import load_scheduler, load_transformer, load_vae, torch_dtype
from models.kontext import KontextTransformer
from models.latents import decode_latents, latent_shape
from models.lora.attach import (
    Adapter,
    adapter_state,
    attach_lora,
    hash_state,
    load_adapter_state,
    use_adapter,
)
from models.sampling import sigma_table
from rollout.sampler import (
    Conditioning,
    ConditioningBatch,
    SamplingSpec,
    Trajectory,
    guided_velocity,
    sample_trajectories,
)

ROLLOUT_ADAPTER = "rollout"


@dataclass(frozen=True)
class ReplicaSpec:
    """What a replica is built from; enough for a restarted actor to build itself again.

    height, width: px of what a request without a size of its own asks for. `shapes`: how many come, each with graphs of
    its own where the model is compiled. `held`: sha256 of `model.path/...` files as the driver has them, which this
    node's must match; what is not in it is not compared.
    """

    model_path: str
    dtype: str
    device: str
    height: int
    width: int
    lora_rank: int
    lora_alpha: float
    lora_targets: tuple[str, ...]
    threads: int
    compile: bool = False
    shapes: int = 1
    held: Mapping[str, str] = field(default_factory=dict)

    def check_base(self) -> None:
        """Raise ClusterError where this node has another base than the driver."""
        check_files(self.held, "model.path", self.model_path, ("transformer", "vae", "scheduler"))


@dataclass(frozen=True)
class SampleRequest:
    """A fixed piece of one group (or of an evaluation): one sample per seed.

    The unit of work never depends on the number of workers, so one worker and three give the same bits, and a
    request dispatched again after a crash gives the same samples.

    `trunk_seed` decides the initial noise that all samples of a branching group share, in whatever chunk they are;
    None gives each its own. `size`: height and width in px, by default the replica's.
    """

    group_id: int
    first: int
    seeds: tuple[int, ...]
    steps: tuple[int, ...]
    trunk_seed: int | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class SampleInfo:
    """The small part of an answer, which the controller reads; tensors stay in the object store.

    policy_sha256: of the live adapter weights that drew the samples, "" where none was ever loaded.
    """

    group_id: int
    first: int
    policy_version: int
    policy_sha256: str
    seconds: float
    started: float
    worker: str


@dataclass(frozen=True)
class WorkerInfo:
    """Who answers: node and process, its device, and the version of the policy that it holds (-1: none)."""

    worker: str
    device: str
    policy_version: int


@dataclass(frozen=True)
class AdapterReceipt:
    """A replica's proof that an adapter took effect: hash of its live weights, and how far a probe moved from what the
    replica held before (`replaced`, the hash of that)."""

    worker: str
    version: int
    sha256: str
    probe_shift: float
    replaced: str


class RolloutEngine:
    """Samples with one transformer and one adapter. `transformer` may be shared with a learner in-process."""

    def __init__(self, spec: ReplicaSpec, transformer: KontextTransformer | None = None):
        self.spec = spec
        self.worker = f"{os.uname().nodename}:{os.getpid()}"
        dtype = torch_dtype(spec.dtype)
        if transformer is None:
            spec.check_base()
            transformer = load_transformer(spec.model_path, dtype=dtype, device=spec.device)
            attach_rollout_adapter(transformer, spec)
            if spec.compile:
                compile_blocks(transformer, spec.shapes)
        self.transformer = transformer  # one that is shared stays in the learner's mode; it has no dropout
        self.vae = load_vae(spec.model_path, device=spec.device)
        self.scheduler = load_scheduler(spec.model_path)
        self.version, self.sha256 = -1, ""

    def load_adapter(self, adapter: Adapter) -> AdapterReceipt:
        """Put `adapter` into the live weights; the receipt hashes what is then in the module, not what came."""
        before, replaced = self._probe(), self.sha256
        load_adapter_state(self.transformer, adapter.tensors, ROLLOUT_ADAPTER)
        self.sha256 = hash_state(adapter_state(self.transformer, ROLLOUT_ADAPTER))
        self.version = adapter.version
        shift = float((self._probe() - before).abs().max())
        return AdapterReceipt(self.worker, self.version, self.sha256, shift, replaced)

    def sample(
        self,
        request: SampleRequest,
        spec: SamplingSpec,
        negative: Conditioning | None,
        conditionings: Sequence[Conditioning],
    ) -> tuple[SampleInfo, Trajectory, np.ndarray]:
        """Trajectories and decoded images uint8 [n, H, W, 3] of one request.

        `conditionings` holds one entry for all samples (a training group) or one per sample (evaluation).
        Raises DataFailure when this prompt drives the model to non-finite latents.
        """
        started, began = time.time(), time.perf_counter()
        if len(conditionings) == 1:
            conditionings = list(conditionings) * len(request.seeds)
        positive = ConditioningBatch.stack(
            conditionings, device=self.spec.device, dtype=torch_dtype(self.spec.dtype)
        )
        shape = latent_shape(self.vae, *(request.size or (self.spec.height, self.spec.width)))
        sigmas = sigma_table(self.scheduler, spec.num_steps)
        generators = [torch.Generator().manual_seed(seed) for seed in request.seeds]
        trunk = None if request.trunk_seed is None else torch.Generator().manual_seed(request.trunk_seed)
        with use_adapter(self.transformer, ROLLOUT_ADAPTER):
            trajectory = sample_trajectories(
                self.transformer,
                positive,
                negative,
                spec,
                sigmas,
                shape,
                generators,
                request.steps,
                trunk,
            )
        if not torch.isfinite(trajectory.final_latents).all():
            raise DataFailure(f"group {request.group_id}: the sampled latents are not finite")
        images = decode_latents(self.vae, trajectory.final_latents).numpy()
        # Of the weights themselves, after they drew: what was loaded once need not be what they are now.
        live = hash_state(adapter_state(self.transformer, ROLLOUT_ADAPTER)) if self.sha256 else ""
        seconds = time.perf_counter() - began  # a clock may be set back meanwhile
        info = SampleInfo(request.group_id, request.first, self.version, live, seconds, started, self.worker)
        return info, trajectory, images

    @torch.no_grad()
    def _probe(self) -> torch.Tensor:
        """One fixed forward [C, H, W]; a new adapter that leaves it unchanged bound to nothing."""
        config: Any = self.transformer.config
        dtype = torch_dtype(self.spec.dtype)
        generator = torch.Generator().manual_seed(derive_seed("adapter-probe"))
        shape = latent_shape(self.vae, self.spec.height, self.spec.width)
        latents = torch.randn((1, *shape), generator=generator)
        text = Conditioning(
            torch.randn((16, config.joint_attention_dim), generator=generator),
            torch.randn((config.pooled_projection_dim,), generator=generator),
        )
        batch = ConditioningBatch.stack([text], device=self.spec.device, dtype=dtype)
        sigma = torch.full((1,), 0.7, device=self.spec.device)
        with use_adapter(self.transformer, ROLLOUT_ADAPTER):
            velocity = guided_velocity(
                self.transformer, latents.to(self.spec.device), sigma, batch, None, guidance_scale=1.0
            )
        return velocity[0].float().cpu()


def attach_rollout_adapter(transformer: KontextTransformer, spec: ReplicaSpec) -> None:
    """Add the frozen adapter that rollouts sample with (kept apart from the one being trained)."""
    attach_lora(
        transformer,
        rank=spec.lora_rank,
        alpha=spec.lora_alpha,
        targets=spec.lora_targets,
        adapter_name=ROLLOUT_ADAPTER,
        trainable=False,
    )
