"""What one rank trains on at one step, and how texts and pictures of samples become it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from core.failures import SampleError
from models.metaquery.vlm import refuse_control_tokens
from pretrain.data.buckets import Size, crop_box
from pretrain.data.sources import Source


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


def fitted(picture: Image.Image, size: Size) -> Image.Image:
    """The largest centred part of the (height, width) shape, resized to it (Lanczos)."""
    height, width = size
    if picture.size == (width, height):
        return picture
    return picture.resize((width, height), Image.Resampling.LANCZOS, box=crop_box(*picture.size, size))


def fitted_pair(source: Image.Image, target: Image.Image, size: Size) -> tuple[Image.Image, Image.Image]:
    """Both pictures of an edit by the same crop: the target's, in shares of its sides.

    What was not edited stays in place, also where one of the two is of another scale.
    """
    if source.size == target.size:
        return fitted(source, size), fitted(target, size)
    left, top, right, bottom = crop_box(*target.size, size)
    across, down = source.width / target.width, source.height / target.height
    box = (left * across, top * down, right * across, bottom * down)
    return source.resize((size[1], size[0]), Image.Resampling.LANCZOS, box=box), fitted(target, size)


def fitted_pictures(source: Source, ordinal: int, size: Size) -> tuple[Image.Image, ...]:
    """A sample's pictures, cut and resized to (height, width). Raises SampleError."""
    pictures = source.pictures(ordinal)
    if len(pictures) == 2:
        return fitted_pair(*pictures, size)
    return (fitted(pictures[0], size),)


def to_pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size, B 3 H W float32 in [-1, 1]."""
    rows = [
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(
            picture.height, picture.width, 3
        )
        for picture in pictures
    ]
    return (torch.stack(rows).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()


def readable_texts(source: Source, ordinal: int, tokenizer: Any) -> tuple[str, ...]:
    """A sample's texts. Raises SampleError also for one that the tokenizer's VLM refuses, whichever is drawn: a picture
    or the end of a turn, written into a caption, would be read as one."""
    texts = source.texts(ordinal)
    try:
        for text in texts:
            refuse_control_tokens(text, tokenizer)
    except ValueError as error:
        raise SampleError(str(error)) from error
    return texts
