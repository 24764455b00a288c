"""The picture of one object, as GenEval shows it to CLIP."""

from __future__ import annotations

from PIL import Image

from rewards.geneval.backend import ColorQuestion

BACKGROUND = "#999999"

LONGEST = 8
"""Longest edge of a crop over its shortest. CLIP sees the middle square alone, and a sliver enlarged to CLIP's
size would fill the memory, so what lies further out is cut off first."""


def object_crop(question: ColorQuestion) -> Image.Image | None:
    """The box of the object, everything outside its mask in BACKGROUND; None when nothing of it is in the picture.

    Box edges are rounded to whole pixels. A part of the box outside the picture is cut off, where upstream
    would fill it with black; boxes drawn from masks have none. Without a mask the whole box counts.

    Raises ValueError for a mask of another size than the image's.
    """
    image, mask = question.image.convert("RGB"), question.detection.mask
    if mask is not None and tuple(mask.shape) != (image.height, image.width):
        raise ValueError(f"mask of {tuple(mask.shape)} on an image of {(image.height, image.width)}")
    x1, y1, x2, y2 = (round(value) for value in question.detection.box)
    box = (max(x1, 0), max(y1, 0), min(x2, image.width), min(y2, image.height))
    if box[0] >= box[2] or box[1] >= box[3]:
        return None
    crop = image.crop(box)
    if mask is not None:
        inside = mask[box[1] : box[3], box[0] : box[2]]
        if not inside.any():
            return None
        crop = Image.composite(crop, Image.new("RGB", crop.size, BACKGROUND), Image.fromarray(inside))
    return _middle(crop)


def _middle(crop: Image.Image) -> Image.Image:
    limit = LONGEST * min(crop.size)
    cut_x, cut_y = max(crop.width - limit, 0) // 2, max(crop.height - limit, 0) // 2
    return crop.crop((cut_x, cut_y, crop.width - cut_x, crop.height - cut_y))
