"""The size of an encoded picture from its header alone."""

from typing import IO

from PIL import Image, UnidentifiedImageError

from core.pictures import MAX_PIXELS
from core.shards.errors import SampleError

FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION = 0x0112
_TRANSPOSED = range(5, 9)
# Where an orientation can lie; asking PIL for one that is not there would decode a whole PNG to look behind it.
_METADATA = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")


def upright_size(file: IO[bytes], name: str) -> tuple[int, int]:
    """(width, height) of a picture once EXIF rotation is applied.

    Raises:
        SampleError: beginning with `name`, for what is no picture of `FORMATS`, or one that could not be used:
            more than 8 bits a channel, or above `core.pictures.MAX_PIXELS`.
    """
    try:
        with Image.open(file, formats=FORMATS) as picture:
            width, height = picture.size
            if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
                raise SampleError(f"{name} has more than 8 bits a channel")
            if width * height > MAX_PIXELS:
                raise SampleError(
                    f"{name} has {width} x {height} px, more than {MAX_PIXELS / 1e6:.0f} megapixels"
                )
            tagged = any(key in picture.info for key in _METADATA)
            turned = tagged and picture.getexif().get(_ORIENTATION) in _TRANSPOSED
    except SampleError:
        raise
    except UnidentifiedImageError as error:
        raise SampleError(f"{name} is no {', '.join(FORMATS)} picture") from error
    except Exception as error:  # on damaged files PIL raises more than it documents
        raise SampleError(f"{name} has a header that cannot be read ({error})") from error
    return (height, width) if turned else (width, height)
