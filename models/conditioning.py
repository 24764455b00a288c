"""What prompts and pictures to edit tell the transformer, for one prompt and for a batch.

Shapes: B samples, C h w latents, L text tokens, D width, P pooled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What one prompt tells the transformer: prompt_embeds [L, D], pooled [P], reference latents [C, h, w].

    The negative_* are the negative prompt's, where it is read beside this prompt's picture (MetaQuery, editing);
    elsewhere the run has one for all.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    reference_latents: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None


@dataclass(frozen=True)
class ConditioningBatch:
    """The same for B samples, on the transformer's device and in its dtype."""

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    reference_latents: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None

    @staticmethod
    def stack(items: Sequence[Conditioning], *, device: Any, dtype: torch.dtype) -> ConditioningBatch:
        """Raises ValueError where some samples have a reference, or a negative of their own, and others have none."""

        def gather(name: str) -> Tensor | None:
            tensors = [getattr(item, name) for item in items]
            if all(tensor is None for tensor in tensors):
                return None
            if any(tensor is None for tensor in tensors):
                what = (
                    "a reference image" if name == "reference_latents" else "a negative prompt of their own"
                )
                raise ValueError(f"samples with and without {what} cannot share a batch")
            return torch.stack(tensors).to(device=device, dtype=dtype)

        return ConditioningBatch(**{field.name: gather(field.name) for field in fields(ConditioningBatch)})  # type: ignore[arg-type]

    def to(self, device: Any, dtype: torch.dtype) -> ConditioningBatch:
        """On a device, in the transformer's dtype."""
        return self._map(lambda tensor: tensor.to(device=device, dtype=dtype))

    def rows(self, index: Tensor) -> ConditioningBatch:
        """The samples that `index` [n] int64 names."""
        return self._map(lambda tensor: tensor[index])

    def _map(self, change: Callable[[Tensor], Tensor]) -> ConditioningBatch:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: None if tensor is None else change(tensor) for name, tensor in given.items()}
        return ConditioningBatch(**changed)  # type: ignore[arg-type]

    def unconditional(self, shared: Conditioning | None) -> ConditioningBatch:
        """The unconditional rows, with the same reference images: the samples' own negatives, else the `shared` one."""
        if self.negative_prompt_embeds is not None and self.negative_pooled_prompt_embeds is not None:
            return ConditioningBatch(
                self.negative_prompt_embeds, self.negative_pooled_prompt_embeds, self.reference_latents
            )
        assert shared is not None
        size, like = len(self.prompt_embeds), self.prompt_embeds
        embeds = shared.prompt_embeds.to(device=like.device, dtype=like.dtype)
        pooled = shared.pooled_prompt_embeds.to(device=like.device, dtype=like.dtype)
        return ConditioningBatch(
            embeds.expand(size, *embeds.shape), pooled.expand(size, *pooled.shape), self.reference_latents
        )

    def followed_by(self, other: ConditioningBatch) -> ConditioningBatch:
        """Both batches as one, without the negatives. Either both have reference images, or neither has."""
        references = None
        if self.reference_latents is not None and other.reference_latents is not None:
            references = torch.cat([self.reference_latents, other.reference_latents])
        return ConditioningBatch(
            torch.cat([self.prompt_embeds, other.prompt_embeds]),
            torch.cat([self.pooled_prompt_embeds, other.pooled_prompt_embeds]),
            references,
        )
