"""SD3's three text encoders behind one call, with a cache bounded in bytes."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from models.components import load_text_encoder, load_tokenizer
from models.folders import TEXT_ENCODERS, TEXT_PARTS, TOKENIZERS, check_model_folder, require

logger = logging.getLogger(__name__)

DEFAULT_CACHE_BYTES = 2 << 30


@dataclass(frozen=True)
class PromptEmbeds:
    """One prompt as SD3 reads it, on the CPU. Cached and shared: never write into the tensors.

    Attributes:
        prompt_embeds: L D; CLIP's tokens padded to T5's width, then T5's tokens.
        pooled_prompt_embeds: P; the projections of both CLIPs.
    """

    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Memory of both tensors in bytes: 2.7 MB for SD3.5 in bfloat16."""
        return self.prompt_embeds.nbytes + self.pooled_prompt_embeds.nbytes


def stack_embeds(items: Sequence[PromptEmbeds]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of N prompts: prompt_embeds N L D and pooled N P."""
    return (
        torch.stack([item.prompt_embeds for item in items]),
        torch.stack([item.pooled_prompt_embeds for item in items]),
    )


class EmbedsCache:
    """Embeddings by key, bounded in bytes; forgets the least recently used. Not thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes` 0 keeps nothing."""
        self.max_bytes = max_bytes
        self._items: OrderedDict[Hashable, PromptEmbeds] = OrderedDict()
        self.num_bytes = 0

    def get(self, key: Hashable, make: Callable[[], PromptEmbeds]) -> PromptEmbeds:
        """What is kept under `key`, or what `make` returns for it."""
        if key in self._items:
            self._items.move_to_end(key)
            return self._items[key]
        embeds = make()
        if embeds.num_bytes <= self.max_bytes:
            self._items[key] = embeds
            self.num_bytes += embeds.num_bytes
        while self.num_bytes > self.max_bytes:
            _, oldest = self._items.popitem(last=False)
            self.num_bytes -= oldest.num_bytes
        return embeds


class SD3TextEncoder:
    """CLIP-L, CLIP-G and T5 as `StableDiffusion3Pipeline` joins them, one prompt at a time.

    Encoding singly makes a prompt's embedding independent of the prompts that came with it, to the bit,
    which batching does not; the cache pays for it. Not thread-safe.
    """

    def __init__(
        self,
        *,
        clip_tokenizers: Sequence[Any],
        clip_encoders: Sequence[CLIPTextModelWithProjection],
        t5_tokenizer: Any,
        t5_encoder: T5EncoderModel,
        max_sequence_length: int = 256,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        """Join loaded parts; `max_sequence_length` counts T5 tokens, `cache_bytes` 0 keeps nothing."""
        self.clip_tokenizers = list(clip_tokenizers)
        self.clip_encoders = list(clip_encoders)
        self.t5_tokenizer = t5_tokenizer
        self.t5_encoder = t5_encoder
        self.max_sequence_length = max_sequence_length
        self.cache = EmbedsCache(cache_bytes)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        max_sequence_length: int = 256,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> "SD3TextEncoder":
        """Load `text_encoder{,_2,_3}` and `tokenizer{,_2,_3}` of a model folder, frozen.

        Raises:
            FileNotFoundError: naming every part that is missing.
        """
        require(check_model_folder(folder, TEXT_PARTS))
        encoders = [load_text_encoder(folder, name, dtype=dtype, device=device) for name in TEXT_ENCODERS]
        tokenizers = [load_tokenizer(folder, name) for name in TOKENIZERS]
        return cls(
            clip_tokenizers=tokenizers[:2],
            clip_encoders=encoders[:2],
            t5_tokenizer=tokenizers[2],
            t5_encoder=encoders[2],
            max_sequence_length=max_sequence_length,
            cache_bytes=cache_bytes,
        )

    def encode(self, prompts: Sequence[str]) -> list[PromptEmbeds]:
        """Embeddings of the prompts in order, from the cache where they are in it.

        Raises:
            TypeError: a single string instead of a list of them.
        """
        if isinstance(prompts, str):
            raise TypeError(f"encode takes a list of prompts, not the string {prompts!r}")
        return [self.cache.get(prompt, partial(self._encode_one, prompt)) for prompt in prompts]

    @torch.no_grad()
    def _encode_one(self, prompt: str) -> PromptEmbeds:
        """SD3's recipe: penultimate CLIP states side by side, zero-padded to T5's width, T5 after them."""
        states, pooled = zip(
            *(
                self._clip(*pair, prompt)
                for pair in zip(self.clip_tokenizers, self.clip_encoders, strict=True)
            ),
            strict=True,
        )
        t5 = self.t5_encoder(self._t5_ids(prompt).to(self.t5_encoder.device)).last_hidden_state
        clip = torch.cat(states, dim=-1)
        clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return PromptEmbeds(
            prompt_embeds=torch.cat([clip, t5.to(clip.dtype)], dim=1)[0].cpu(),
            pooled_prompt_embeds=torch.cat(pooled, dim=-1)[0].cpu(),
        )

    @staticmethod
    def _clip(
        tokenizer: Any, encoder: CLIPTextModelWithProjection, prompt: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = tokenizer(
            prompt,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        output = encoder(tokens.input_ids.to(encoder.device), output_hidden_states=True)
        return output.hidden_states[-2], output.text_embeds

    def _t5_ids(self, prompt: str) -> torch.Tensor:
        length = self.max_sequence_length
        tokens = self.t5_tokenizer(
            prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        full = len(self.t5_tokenizer(prompt).input_ids)
        if full > length:
            logger.warning(
                "prompt of %d T5 tokens cut to max_sequence_length %d: %.80r", full, length, prompt
            )
        return tokens.input_ids
