"""What one rank trains on at one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


@dataclass(frozen=True)
class PretrainBatch:
    """A rank's places of a global batch, which has one task and one size.

    Legend: B samples of this rank, H W pixels, C h w latents, L tokens, D and P widths of the embeddings, Q queries, V
    width of the VLM.

    Attributes:
        task: `t2i`, or `edit` with references.
        height, width: H and W in pixels, also where only latents are there.
        indices: B int64, places of the samples in the global batch: seed noise by them, and the number of ranks
            does not matter.
        prompts: B texts, "" where dropped.
        pixels: B 3 H W float32 in [-1, 1]; None where `latents` stand in their place.
        references: B 3 H W float32 in [-1, 1], the source of an edit; None for `t2i` and where cached.
        latents, reference_latents: B C h w float32, shifted and scaled as `models.latents.encode_images` does;
            None unless cached.
        prompt_embeds, pooled_prompt_embeds: B L D and B P of `prompts`, in the type they were cached in; None
            unless cached.
        query_states: B Q V, what the VLM makes of the queries after `prompts`; None unless cached.
        reference_images: B pictures of W x H, the source of an edit; None unless `data.reference_images`.
    """

    task: Literal["t2i", "edit"]
    height: int
    width: int
    indices: Tensor
    prompts: list[str]
    pixels: Tensor | None = None
    references: Tensor | None = None
    latents: Tensor | None = None
    reference_latents: Tensor | None = None
    prompt_embeds: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None
    query_states: Tensor | None = None
    reference_images: list[Image.Image] | None = None
