"""From pictures of any size to the pixels of a batch of one size."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from pretrain.data.buckets import Size, crop_box
from pretrain.data.sources import Source


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
