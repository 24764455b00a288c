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
    """What one prompt tells the transformer: prompt_embeds [L, D], pooled [P], reference latents [C, h, w] each, in the
    prompt's order.

    The negative_* are the negative prompt's, where it is read beside this prompt's picture (MetaQuery, editing);
    elsewhere the run has one for all.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    reference_latents: tuple[Tensor, ...] = ()
    negative_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None


@dataclass(frozen=True)
class ConditioningBatch:
    """The same for B samples, on the transformer's device and in its dtype: every sample has as many references, each
    of the same size as the others' at its place, B C h w."""

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    reference_latents: tuple[Tensor, ...] = ()
    negative_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None

    @staticmethod
    def stack(items: Sequence[Conditioning], *, device: Any, dtype: torch.dtype) -> ConditioningBatch:
        """Raises ValueError for samples with references of different number or sizes, and where some have a negative of
        their own and others have none."""

        def gather(name: str) -> Tensor | tuple[Tensor, ...] | None:
            if name == "reference_latents":
                return _stack_references(items)
            tensors = [getattr(item, name) for item in items]
            if all(tensor is None for tensor in tensors):
                return None
            if any(tensor is None for tensor in tensors):
                raise ValueError(
                    "samples with and without a negative prompt of their own cannot share a batch"
                )
            return torch.stack(tensors)

        given: dict[str, Any] = {field.name: gather(field.name) for field in fields(ConditioningBatch)}
        return ConditioningBatch(**given).to(device, dtype)

    def to(self, device: Any, dtype: torch.dtype) -> ConditioningBatch:
        """On a device, in the transformer's dtype."""
        return self._map(lambda tensor: tensor.to(device=device, dtype=dtype))

    def rows(self, index: Tensor) -> ConditioningBatch:
        """The samples that `index` [n] int64 names."""
        return self._map(lambda tensor: tensor[index])

    def _map(self, change: Callable[[Tensor], Tensor]) -> ConditioningBatch:
        def changed(given: Any) -> Any:
            if isinstance(given, tuple):
                return tuple(change(tensor) for tensor in given)
            return None if given is None else change(given)

        return ConditioningBatch(**{field.name: changed(getattr(self, field.name)) for field in fields(self)})

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
        """Both batches as one, without the negatives. Both have as many references, of the same sizes."""
        pairs = zip(self.reference_latents, other.reference_latents, strict=True)
        return ConditioningBatch(
            torch.cat([self.prompt_embeds, other.prompt_embeds]),
            torch.cat([self.pooled_prompt_embeds, other.pooled_prompt_embeds]),
            tuple(torch.cat(pair) for pair in pairs),
        )


def _stack_references(items: Sequence[Conditioning]) -> tuple[Tensor, ...]:
    """B C h w for each place among the references."""
    sizes = sorted({tuple(tuple(one.shape[-2:]) for one in item.reference_latents) for item in items})
    if len(sizes) > 1:
        named = " and samples with ".join(
            f"references of {', '.join(f'{height} x {width}' for height, width in each)} latents"
            if each
            else "no reference"
            for each in sizes[:2]
        )
        raise ValueError(f"samples with {named} cannot share a batch: give groups of one shape")
    return tuple(
        torch.stack(at_place) for at_place in zip(*(item.reference_latents for item in items), strict=True)
    )
