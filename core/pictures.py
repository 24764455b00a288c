"""Pictures that people give: any file or data URI to an upright RGB image, or the reason why not; contact sheets."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

DATA_URI = "data:image/"

MAX_PIXELS = 89_478_485
"""Width x height of the largest picture that is read: 268 MB as RGB, and where PIL begins to suspect an attack."""

_TOO_LARGE = f"more than the {MAX_PIXELS / 1e6:.0f} megapixels that are read: scale it down first"
_GAP = 2
_LYING = (5, 6, 7, 8)
"""EXIF orientations that swap the sides."""


def picture_bytes(source: str | Path, name: str | None = None) -> bytes:
    """The encoded bytes of a picture: a path's, or those that a `data:image/...;base64,` URI holds.

    Args:
        name: what messages call the picture, by default `picture_name(source)`.

    Raises:
        ValueError: a source that cannot be read.
    """
    try:
        if is_data_uri(source):
            return base64.b64decode(str(source).split(",", 1)[1], validate=True)
        return Path(source).read_bytes()
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(f"{name or picture_name(source)} is unreadable ({error})") from error


def unchanged_bytes(source: str | Path, sha256: str) -> bytes:
    """`picture_bytes` with this sha256. Raises ValueError for a source that has changed, or as that does."""
    data = picture_bytes(source)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(f"{picture_name(source)} has changed: its sha256 is {found} and not {sha256}")
    return data


def decode_picture(data: bytes, name: str) -> Image.Image:
    """An upright 8-bit RGB image from encoded bytes, the first frame where there are several.

    Raises:
        ValueError: not a picture, a truncated or damaged one, grey of 32 bits a pixel, or one above `MAX_PIXELS`; the
            message begins with `name`.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            refuse_large(image)
            return to_rgb(image)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} is unreadable (it looks like a decompression bomb, its pixels are {_TOO_LARGE})"
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{name} is unreadable (cannot identify it as a picture of a known format)"
        ) from error
    except Exception as error:  # on damaged files PIL's decoders raise more than they document
        raise ValueError(f"{name} is unreadable ({error})") from error


def refuse_large(image: Image.Image) -> None:
    """Before its pixels are decoded: PIL itself only warns up to twice `MAX_PIXELS`. Raises ValueError."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} px are {_TOO_LARGE}")


def read_picture(source: str | Path, name: str | None = None) -> Image.Image:
    """`picture_bytes`, then `decode_picture`. Raises ValueError as they do."""
    return decode_picture(picture_bytes(source, name), name or picture_name(source))


def upright_size(source: str | Path, name: str | None = None) -> tuple[int, int]:
    """Height and width in px of the picture that `read_picture` gives, from the file's head alone.

    Raises:
        ValueError: not a picture; damage behind the head is not seen.
    """
    try:
        data = io.BytesIO(picture_bytes(source, name)) if is_data_uri(source) else source
        with Image.open(data) as image:
            width, height = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in _LYING
    except Exception as error:  # as above
        raise ValueError(f"{name or picture_name(source)} is unreadable ({error})") from error
    return (width, height) if turned else (height, width)


def is_data_uri(source: str | Path) -> bool:
    """Whether a picture is written out in the text itself."""
    return isinstance(source, str) and source.startswith(DATA_URI)


def picture_name(source: str | Path) -> str:
    """What messages call a picture: its path, or the beginning of a data URI."""
    return str(source)[:80] if is_data_uri(source) else str(source)


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright 8-bit RGB image: EXIF rotation applied, transparency laid over white, 16-bit grey by its upper byte,
    which is what PIL keeps of 16-bit colour.

    Plain `convert("RGB")`, the field's habit, shows whatever colour lies under transparent pixels, and clips such grey.

    Raises:
        ValueError: grey of 32 bits a pixel, whose range nothing tells.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _grey_of_8_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _grey_of_8_bits(image: Image.Image) -> Image.Image:
    """Older PIL opens 16-bit grey in mode I; there a wider range is another kind of picture."""
    levels = np.asarray(image)
    if image.mode == "F" or levels.size and (levels.min() < 0 or levels.max() > 65535):
        raise ValueError(f"image of mode {image.mode!r} has 32 bits a pixel: scale it to 8 bits first")
    grey = (levels >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    return Image.fromarray(
        grey if transparent is None else np.where(levels == transparent, 255, grey).astype(np.uint8)
    )


def contact_sheet(rows: Sequence[np.ndarray], scale: int = 3) -> Image.Image:
    """Rows of uint8 pictures [N, H, W, 3] (all of one size) on white, pixels enlarged `scale` times, not smoothed."""
    height, width = rows[0].shape[1:3]
    columns = max(len(row) for row in rows)
    step_y, step_x = height * scale + _GAP, width * scale + _GAP
    sheet = np.full((len(rows) * step_y, columns * step_x, 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            enlarged = picture.repeat(scale, axis=0).repeat(scale, axis=1)
            sheet[y * step_y : y * step_y + height * scale, x * step_x : x * step_x + width * scale] = (
                enlarged
            )
    return Image.fromarray(sheet)
