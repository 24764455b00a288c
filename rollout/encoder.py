"""The encode worker: prompts to embeddings (cached), reference images to VAE latents."""

from __future__ import annotations

import os
from dataclasses import dataclass

import ray
import torch
from PIL import Image

from core.failures import DataFailure
from core.prompts import Prompt, load_reference
from models.components import load_vae, torch_dtype
from models.latents import encode_images, image_to_tensor
from models.metaquery.encoder import MetaQueryEncoder
from models.metaquery.reading import PositionMode
from models.text import PromptEmbeds, SD3TextEncoder
from rollout.sampler import Conditioning
from rollout.worker import WorkerInfo


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


EncodeWorker = ray.remote(Encoder)
