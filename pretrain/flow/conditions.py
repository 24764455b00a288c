"""What a batch becomes before the transformer sees it: latents, references and prompts, by models that are frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

import recipes
from models.components import load_vae
from models.latents import encode_images
from models.metaquery.reading import QueryReader
from models.text import SD3TextEncoder
from pretrain.data.batch import PretrainBatch
from pretrain.flow.config import FlowRecipe
from pretrain.flow.model import Prompt


@dataclass(frozen=True)
class Encoded:
    """A batch as the loss wants it, on the device: clean latents and references [B, C, h, w] float32."""

    clean: Tensor
    references: Tensor | None
    prompt: Prompt


class Encoders:
    """VAE, and either SD3's text encoders or the VLM; each is loaded only if the recipe's batches need it."""

    def __init__(self, recipe: FlowRecipe):
        """Raises FileNotFoundError and ValueError as the loaders do."""
        self.recipe, self.device = recipe, recipe.resources.device
        folder, dtype = recipes.resolve(recipe.model.path), getattr(torch, recipe.model.dtype)
        self.vae = load_vae(folder, device=self.device)
        self.text: SD3TextEncoder | None = None
        self.reader: QueryReader | None = None
        if recipe.loads_vlm:
            self.reader = QueryReader.from_pretrained(
                recipes.resolve(str(recipe.model.vlm)),
                dtype=dtype,
                device=self.device,
                position_mode=recipe.model.position_mode,  # type: ignore[arg-type]
            )
            if recipe.model.gradient_checkpointing:
                self.reader.enable_gradient_checkpointing()
        elif not recipe.uses_vlm and not recipe.data.cache.text:
            self.text = SD3TextEncoder.from_pretrained(
                folder,
                dtype=dtype,
                device=self.device,
                max_sequence_length=recipe.model.max_sequence_length,
            )

    def encode(self, batch: PretrainBatch) -> Encoded:
        """Latents as the batch brings them, or of its pixels; references and pictures where the recipe sends them."""
        clean = self.latents(batch.latents, batch.pixels)
        assert clean is not None
        references = None
        if batch.task == "edit" and self.recipe.references.transformer:
            references = self.latents(batch.reference_latents, batch.references)
        return Encoded(clean, references, self.prompt(batch))

    def prompt(self, batch: PretrainBatch) -> Prompt:
        """The batch's prompts, beside its pictures where the VLM is shown them."""
        if batch.prompt_embeds is not None and batch.pooled_prompt_embeds is not None:
            return batch.prompt_embeds.to(self.device), batch.pooled_prompt_embeds.to(self.device)
        if batch.query_states is not None:
            return partial(_cached, states=batch.query_states.to(self.device))
        if self.reader is not None:
            shown = batch.reference_images if self.recipe.references.vlm else None
            images = None if shown is None else [[picture] for picture in shown]
            return partial(self.reader.hidden_states, prompts=batch.prompts, images=images)
        assert self.text is not None
        encoded = self.text.encode(batch.prompts)
        return (
            torch.stack([one.prompt_embeds for one in encoded]).to(self.device),
            torch.stack([one.pooled_prompt_embeds for one in encoded]).to(self.device),
        )

    def latents(self, latents: Tensor | None, pixels: Tensor | None) -> Tensor | None:
        """[B, C, h, w] float32 on the device: those given, else of the pixels [B, 3, H, W]; None without both."""
        if latents is not None:
            return latents.to(self.device)
        return None if pixels is None else encode_images(self.vae, pixels.to(self.device))


def load_tokenizer(recipe: FlowRecipe) -> Any:
    """That of the VLM which is shown the prompts while training, or None."""
    if not recipe.loads_vlm:
        return None
    return AutoTokenizer.from_pretrained(recipes.resolve(str(recipe.model.vlm)), local_files_only=True)


def _cached(queries: Tensor, states: Tensor) -> Tensor:
    """States [B, Q, D] that were read at these frozen `queries` before."""
    return states


def micro_batches(batch: PretrainBatch, size: int) -> Iterator[PretrainBatch]:
    """The batch in parts of `size` samples, the last one shorter where it does not divide."""
    count = len(batch.prompts)
    for start in range(0, count, size):
        yield rows_of(batch, range(start, min(start + size, count)))


def rows_of(batch: PretrainBatch, rows: Sequence[int]) -> PretrainBatch:
    """Some samples of a batch."""
    taken: dict[str, Any] = {}
    for item in fields(batch):
        value = getattr(batch, item.name)
        if isinstance(value, Tensor):
            taken[item.name] = value[list(rows)]
        elif isinstance(value, list):
            taken[item.name] = [value[row] for row in rows]
    return replace(batch, **taken)
