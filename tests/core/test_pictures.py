"""Pictures that people give: every kind is read as a viewer would show it, or refused with its name and the reason."""

import base64
import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.pictures import decode_picture, picture_bytes, read_picture, to_rgb, upright_size

ORIENTATION = 0x0112


def noise(width: int = 12, height: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_transparent_pixels_become_white() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 255, 0))
    assert list(to_rgb(image).tobytes()) == [255, 0, 0, 255, 255, 255]
    palette = image.convert("P")
    palette.info["transparency"] = palette.getpixel((1, 0))
    assert to_rgb(palette).getpixel((1, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 51))
    assert to_rgb(half).getpixel((0, 0)) == (204, 204, 204)


def test_rotation_from_exif_is_applied() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for kind in ("PNG", "JPEG", "WEBP"):
        assert decode_picture(encoded(noise(4, 2), kind, exif=exif), "x").size == (2, 4), kind


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_8_bit_mode_is_read(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.tif"
    Image.new("RGB", (5, 3), "white").convert(mode).save(path)
    read = read_picture(path)
    assert read.mode == "RGB" and set(read.tobytes()) == {255}


@pytest.mark.parametrize(
    ("mode", "kind"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "PNG"), ("I;16B", "TIFF"), ("I", "TIFF")]
)
def test_16_bit_grey_is_scaled_and_upright(mode: str, kind: str) -> None:
    """PIL's own conversion of mode I clips at 255."""
    levels = np.array(
        [[0, 255, 256], [32768, 65279, 65535]], {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    )
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    image = Image.frombytes(mode, (3, 2), levels.tobytes())
    read = np.asarray(decode_picture(encoded(image, kind, exif=exif), "x"))
    assert (read == np.array([[255, 254, 128], [1, 0, 0]])[..., None]).all() and read.shape == (2, 3, 3)


def test_a_transparent_level_of_16_bit_grey_becomes_white() -> None:
    image = Image.frombytes("I;16", (2, 1), np.array([300, 301], "<u2").tobytes())
    assert decode_picture(encoded(image, transparency=300), "x").tobytes() == bytes([255] * 3 + [1] * 3)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_no_negative(kind: str) -> None:
    """Adobe's programs, and PIL, write inverted CMYK into JPEG files, and not into TIFF files."""
    image = Image.new("CMYK", (8, 8), (0, 250, 250, 0))
    data = encoded(image, kind)
    assert (b"Adobe" in data) == (kind == "JPEG")
    red, green, blue = decode_picture(data, "x").getpixel((4, 4))  # type: ignore[misc]
    assert red > 245 and green < 10 and blue < 10


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA", "L", "1"])
def test_transparency_of_every_kind_is_laid_over_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    if mode in ("L", "1"):  # one level is the transparent one
        image = Image.new(mode, (2, 1), 0)
        image.putpixel((0, 0), 255)
        assert decode_picture(encoded(image, transparency=0), "x").getpixel((1, 0)) == (255, 255, 255)
    else:
        image = image.convert(mode)
        assert to_rgb(image).tobytes() == bytes([0] * 3 + [255] * 3)


def test_a_data_uri_is_its_picture() -> None:
    data = encoded(noise())
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    assert picture_bytes(uri) == data
    assert read_picture(uri).tobytes() == noise().tobytes()


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_picture(data, "x").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("float.tif", encoded(Image.new("F", (4, 4)), "TIFF"), "mode 'F' has 32 bits a pixel: scale it to 8 bits"),
        ("wide.tif", encoded(Image.new("I", (4, 4), 65536), "TIFF"), "mode 'I' has 32 bits a pixel"),
        ("signed.tif", encoded(Image.new("I", (4, 4), -1), "TIFF"), "mode 'I' has 32 bits a pixel"),
        ("huge.png", encoded(Image.new("1", (10_000, 9_000))), "10000 x 9000 px are more than the 89 megapixels"),
        ("bomb.png", encoded(Image.new("1", (20_000, 10_000))), "decompression bomb"),
        ("short.png", encoded(noise(64, 64))[:-40], "truncated"),
        ("short.jpg", encoded(noise(64, 64), "JPEG")[:-400], "truncated"),
        ("notes.png", b"hello", "cannot identify"),
        ("empty.png", b"", "cannot identify"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_used_is_refused_by_name(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} is unreadable \(.*{reason}"):
        read_picture(path)


def test_a_file_that_is_not_there_or_a_broken_uri_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gone.png is unreadable .*No such file"):
        read_picture(tmp_path / "gone.png")
    for uri in ("data:image/png;base64,####", "data:image/png"):
        with pytest.raises(ValueError, match="^data:image/png.* is unreadable"):
            read_picture(uri)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_damaged_file_is_read_or_refused_but_nothing_else(kind: str) -> None:
    """Decoders raise whatever they like; a batch must hear of it as one bad line."""
    whole, dice, refused = encoded(noise(20, 16), kind), random.Random(0), 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(3):
            data[dice.randrange(len(data))] = dice.randrange(256)
        try:
            assert decode_picture(bytes(data), "x").mode == "RGB"
        except ValueError as error:
            refused += 1
            assert str(error).startswith("x is unreadable (")
    assert refused


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_upright_size_is_that_of_the_picture_read(tmp_path: Path, orientation: int) -> None:
    image, exif = Image.new("RGB", (6, 3)), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", exif=exif)
    width, height = read_picture(tmp_path / "a.jpg").size
    assert upright_size(tmp_path / "a.jpg") == (height, width)
    uri = "data:image/jpeg;base64," + base64.b64encode((tmp_path / "a.jpg").read_bytes()).decode()
    assert upright_size(uri) == (height, width)
    (tmp_path / "b.jpg").write_bytes(b"no")
    with pytest.raises(ValueError, match="b.jpg is unreadable"):
        upright_size(tmp_path / "b.jpg")
