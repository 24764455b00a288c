"""The encode worker: prompts to embeddings (cached), reference images to VAE latents."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from PIL import Image

from core.failures import DataFailure
from core.inputs import check_files
from core.prompts import Prompt, load_references
from models.components import load_vae, torch_dtype
from models.conditioning import Conditioning
from models.folders import TEXT_PARTS
from models.latents import encode_images, image_to_tensor
from models.metaquery.encoder import MetaQueryEncoder
from models.metaquery.reading import PositionMode
from models.references import shown_references
from models.sizes import geometry
from models.text import SD3TextEncoder
from rollout.engine import WorkerInfo
from rollout.machine import machine_failures


@dataclass(frozen=True)
class EncoderSpec:
    """What an encode worker is built from. `cache_bytes` bounds the prompt-embedding cache.

    height, width: px at which pictures are edited where a call names no size.
    reference_pixels: of all references of a prompt together, see `models.sizes.reference_sizes`.
    `vlm_path`: the Qwen2.5-VL of a MetaQuery model, None for Kontext and its text encoders; `position_mode` and
    `negative_prompt` matter with it alone. `held`: sha256 of files below `model.path/` and `model.vlm/` as the driver
    has them, which this node's must match.
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
    reference_pixels: int | None = None
    held: Mapping[str, str] = field(default_factory=dict)


class Encoder:
    """Turns prompts into conditioning: prompt embeddings (cached) and the reference images' VAE latents, in order.

    MetaQuery reads the reference images too, beside the prompt and beside the negative prompt, so there an edit's
    conditioning carries a negative of its own.
    """

    def __init__(self, spec: EncoderSpec):
        torch.set_num_threads(spec.threads)
        self.spec, self._name = spec, f"{os.uname().nodename}:{os.getpid()}"
        parts = (*TEXT_PARTS, "vae") if spec.vlm_path is None else ("conditioner", "vae")
        check_files(spec.held, "model.path", spec.model_path, parts)
        if spec.vlm_path is not None:
            check_files(spec.held, "model.vlm", spec.vlm_path)
        dtype = torch_dtype(spec.dtype)
        options: Any = {"dtype": dtype, "device": spec.device, "cache_bytes": spec.cache_bytes}
        self.text: SD3TextEncoder | MetaQueryEncoder
        if spec.vlm_path is None:
            options["max_sequence_length"] = spec.max_sequence_length
            self.text = SD3TextEncoder.from_pretrained(spec.model_path, **options)
        else:
            options["position_mode"] = spec.position_mode
            self.text = MetaQueryEncoder.from_pretrained(spec.model_path, spec.vlm_path, **options)
        self.vae = load_vae(spec.model_path, device=spec.device)
        self._multiple = geometry(spec.model_path).multiple

    def ready(self) -> WorkerInfo:
        """Answers once the encoders are loaded."""
        return WorkerInfo(self._name, self.spec.device, -1)

    def encode(self, prompts: list[Prompt], size: tuple[int, int] | None = None) -> list[Conditioning]:
        """One `Conditioning` per prompt, each independent of the others in the call.

        `size`: height and width in px at which pictures are edited, by default the spec's. Raises DataFailure naming
        a prompt or a reference image that cannot be read.
        """
        return [self.encode_one(prompt, size) for prompt in prompts]

    def encode_apart(self, prompts: list[Prompt], size: tuple[int, int] | None = None) -> tuple[Any, ...]:
        """How many there are, then what `encode` gives, one by one: as a call with a return for each, of which a caller
        fetches the first alone."""
        return len(prompts), *self.encode(prompts, size)

    def encode_one(self, prompt: Prompt, size: tuple[int, int] | None = None) -> Conditioning:
        """The same for a single prompt."""
        remedy = "raise encode_gpus, so that the card is shared by fewer, or set it to 0 to encode on the CPU"
        try:
            with machine_failures(self._name, "encoding a prompt", remedy):
                return self._conditioning(prompt, size)
        except RuntimeError:  # the machine's; a prompt's are of other classes
            raise
        except Exception as error:  # a tokenizer or an image processor raises whatever it likes
            cause = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise DataFailure(f"{prompt.name} ({prompt.prompt!r}): {cause}") from error

    def _conditioning(self, prompt: Prompt, size: tuple[int, int] | None) -> Conditioning:
        if not prompt.references:
            return Conditioning(*self._embed(prompt.prompt, []))
        shown = shown_references(
            load_references(prompt),
            size or (self.spec.height, self.spec.width),
            self._multiple,
            self.spec.reference_pixels,
        )
        latents = tuple(
            encode_images(self.vae, image_to_tensor(one, one.height, one.width)[None])[0].cpu()
            for one in shown
        )
        own = () if self.spec.vlm_path is None else self._embed(self.spec.negative_prompt, shown)
        return Conditioning(*self._embed(prompt.prompt, shown), latents, *own)

    def encode_text(self, text: str) -> Conditioning:
        """Text alone (the negative prompt)."""
        (embeds,) = self.text.encode([text])
        return Conditioning(embeds.prompt_embeds, embeds.pooled_prompt_embeds)

    def _embed(self, text: str, images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        """prompt_embeds and pooled_prompt_embeds of a text read beside pictures, where the encoder sees any."""
        if isinstance(self.text, SD3TextEncoder):
            (embeds,) = self.text.encode([text])
        else:
            (embeds,) = self.text.encode([text], [images])
        return embeds.prompt_embeds, embeds.pooled_prompt_embeds


EncodeWorker = ray.remote(Encoder)
