"""Rollout and encode workers that are told the size of each batch: edits keep the aspect ratio of their source."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import ray

from core.prompts import Prompt
from models.latents import latent_shape
from rollout.encoder import Encoder
from rollout.engine import SampleInfo, SampleRequest
from rollout.sampler import Conditioning, SamplingSpec, Trajectory
from rollout.worker import Policy, Replica


class SizedReplica(Replica):
    """`Replica` for pictures of any size that the transformer's position table holds."""

    def sample_sized(
        self,
        size: tuple[int, int],
        request: SampleRequest,
        spec: SamplingSpec,
        policy: Policy,
        negative: Conditioning | None,
        *conditionings: Conditioning,
    ) -> tuple[SampleInfo, Trajectory, np.ndarray]:
        """`Replica.sample` at `size`, height and width in px."""
        self.engine.latent_shape = latent_shape(self.engine.vae, *size)
        return self.sample(request, spec, policy, negative, *conditionings)


class SizedEncoder(Encoder):
    """`Encoder` for source pictures at the size of the batch."""

    def encode_sized(self, size: tuple[int, int], prompts: list[Prompt]) -> list[Conditioning]:
        """`Encoder.encode` with source pictures resized to `size`, height and width in px."""
        self.spec = replace(self.spec, height=size[0], width=size[1])
        return self.encode(prompts)

    def encode_one_sized(self, size: tuple[int, int], prompt: Prompt) -> Conditioning:
        """The same for a single prompt (Ray hands a list of one over as a list)."""
        (found,) = self.encode_sized(size, [prompt])
        return found


SizedRolloutWorker: Any = ray.remote(SizedReplica)
SizedEncodeWorker: Any = ray.remote(SizedEncoder)
