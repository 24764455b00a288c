"""Ray actors of the rollout side: `RolloutWorker` around the engine, `EncodeWorker` around the encoders.

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
from PIL import Image

from models.components import load_vae
from models.kontext import KontextTransformer
from models.latents import encode_images, image_to_tensor
from models.lora import Adapter
from models.metaquery_encoder import MetaQueryEncoder
from models.metaquery_vlm import PositionMode
from models.text import PromptEmbeds, SD3TextEncoder
from rollout.engine import AdapterReceipt, ReplicaSpec, RolloutEngine, SampleInfo, SampleRequest, torch_dtype
from rollout.failures import DataFailure, InfrastructureFailure
from rollout.prompts import Prompt, load_reference
from rollout.sampler import Conditioning, SamplingSpec, Trajectory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Policy:
    """Which adapter to sample with. `adapter` holds one object reference, wrapped so that Ray does not resolve
    it on the way: a worker that already has the weights moves no bytes."""

    version: int
    sha256: str
    adapter: tuple[Any, ...]


@dataclass(frozen=True)
class WorkerInfo:
    """Who answers: node, process, device, and memory in bytes (GPU where there is one, else resident)."""

    worker: str
    device: str
    policy_version: int


@dataclass(frozen=True)
class EncoderSpec:
    """What an encode worker is built from. `cache_bytes` bounds the prompt-embedding cache.

    `vlm_path`: the Qwen2.5-VL of a MetaQuery model, None for Kontext and its text encoders; `position_mode` and
    `negative_prompt` matter with it alone.
    """

    model_path: str
    dtype: str
    device: str
    height: int
    width: int
    max_sequence_length: int
    cache_bytes: int
    threads: int
    vlm_path: str | None = None
    position_mode: PositionMode = "flat"
    negative_prompt: str = ""


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
            receipt = self.engine.load_adapter(ray.get(policy.adapter[0], timeout=120))
            if receipt.sha256 != policy.sha256:
                raise InfrastructureFailure(
                    f"{receipt.worker}: adapter {policy.version} arrived as {receipt.sha256[:12]}, "
                    f"expected {policy.sha256[:12]}"
                )
        try:
            return self.engine.sample(request, spec, negative, conditionings)
        except torch.OutOfMemoryError as error:
            raise InfrastructureFailure(
                f"{self.engine.worker}: out of GPU memory sampling {len(request.seeds)} images; "
                "lower rollout.chunk_size"
            ) from error
        except torch.AcceleratorError:
            # A device error leaves every later call of this process failing, so make room for a fresh one: Ray
            # restarts the actor, and the controller hands the chunk to another worker.
            log.exception("%s: the device failed; this worker leaves to be restarted", self.engine.worker)
            os._exit(1)


class Encoder:
    """Turns prompts into conditioning: prompt embeddings (cached) and the reference image's VAE latents.

    MetaQuery reads the reference image too, beside the prompt and beside the negative prompt, so there an edit's
    conditioning carries a negative of its own.
    """

    def __init__(self, spec: EncoderSpec):
        torch.set_num_threads(spec.threads)
        self.spec = spec
        dtype = torch_dtype(spec.dtype)
        self.text: SD3TextEncoder | MetaQueryEncoder
        if spec.vlm_path is None:
            self.text = SD3TextEncoder.from_pretrained(
                spec.model_path,
                dtype=dtype,
                device=spec.device,
                max_sequence_length=spec.max_sequence_length,
                cache_bytes=spec.cache_bytes,
            )
        else:
            self.text = MetaQueryEncoder.from_pretrained(
                spec.model_path,
                spec.vlm_path,
                dtype=dtype,
                device=spec.device,
                position_mode=spec.position_mode,
                cache_bytes=spec.cache_bytes,
            )
        self.vae = load_vae(spec.model_path, dtype=dtype, device=spec.device)

    def ready(self) -> WorkerInfo:
        """Answers once the encoders are loaded."""
        return WorkerInfo(f"{os.uname().nodename}:{os.getpid()}", self.spec.device, -1)

    def encode(self, prompts: list[Prompt]) -> list[Conditioning]:
        """One `Conditioning` per prompt, each independent of the others in the call.

        Raises DataFailure naming a prompt or a reference image that cannot be read.
        """
        return [self.encode_one(prompt) for prompt in prompts]

    def encode_one(self, prompt: Prompt) -> Conditioning:
        """The same for a single prompt (Ray hands a list of one over as a list)."""
        image = None if prompt.reference is None else self._reference(prompt)
        latents = None if image is None else self._latents(image)
        embeds = self._embed(prompt, prompt.prompt, image)
        own: tuple[torch.Tensor, ...] = ()
        if image is not None and self.spec.vlm_path is not None:
            negative = self._embed(prompt, self.spec.negative_prompt, image)
            own = (negative.prompt_embeds, negative.pooled_prompt_embeds)
        return Conditioning(embeds.prompt_embeds, embeds.pooled_prompt_embeds, latents, *own)

    def encode_text(self, text: str) -> Conditioning:
        """Text alone (the negative prompt)."""
        (embeds,) = self.text.encode([text])
        return Conditioning(embeds.prompt_embeds, embeds.pooled_prompt_embeds)

    def _embed(self, prompt: Prompt, text: str, image: Image.Image | None) -> PromptEmbeds:
        if isinstance(self.text, SD3TextEncoder):
            return self.text.encode([text])[0]
        try:
            return self.text.encode([text], [image])[0]
        except ValueError as error:
            raise DataFailure(f"prompt {prompt.index} ({prompt.prompt!r}): {error}") from error

    def _reference(self, prompt: Prompt) -> Image.Image:
        """The reference image at the size at which it is edited."""
        try:
            image = load_reference(prompt)
        except ValueError as error:
            raise DataFailure(str(error)) from error
        return image.resize((self.spec.width, self.spec.height), Image.Resampling.LANCZOS)

    def _latents(self, image: Image.Image) -> torch.Tensor:
        pixels = image_to_tensor(image, self.spec.height, self.spec.width)[None]
        return encode_images(self.vae, pixels)[0].cpu()


RolloutWorker = ray.remote(Replica)
EncodeWorker = ray.remote(Encoder)
