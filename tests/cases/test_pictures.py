"""Pictures are read as a viewer shows them, or refused by their file's name and the reason."""

import numpy as np
import pytest
from PIL import Image

from core import pictures
from core.failures import DataError, SampleError
from core.pictures import read_picture
from core.prompts import load_prompts, load_references
from rewards.benchmarks.layouts import Picture
from rewards.editreward.data import shards
from rewards.editreward.evaluate import pairs
from tests.cases.conftest import CASES

BAD = {
    "bomb.png": "megapixels that are read: scale it down first",
    "empty.png": "cannot identify it as a picture of a known format",
    "html.png": "cannot identify it as a picture of a known format",
    "svg.png": "cannot identify it as a picture of a known format",
    "trunc.jpg": "image file is truncated",
    "trunc.png": "unreadable",
}
GOOD = {
    **dict.fromkeys(("anim.gif", "anim.png", "anim.webp"), (32, 32)),
    **dict.fromkeys(("exif6.jpg", "exif6.png"), (48, 32)),
    **dict.fromkeys(("cmyk.jpg", "cmyk.tif", "gray.png", "one.png"), (32, 48)),
    **dict.fromkeys(("palette.png", "rgb.png", "rgba_clear.png"), (32, 48)),
    "1x1.png": (1, 1), "gray16.png": (32, 32), "rgb16.png": (16, 16), "wide.png": (200000, 1),
}  # fmt: skip


def test_no_case_is_forgotten():
    assert {path.name for path in (CASES / "pictures").iterdir()} == BAD.keys() | GOOD.keys()


@pytest.mark.parametrize("name", BAD)
def test_a_picture_is_refused_by_its_name(name):
    path = CASES / "pictures" / name
    with pytest.raises(ValueError) as caught:
        read_picture(path)
    assert str(caught.value).startswith(f"{path} is unreadable (") and BAD[name] in str(caught.value)
    assert "BytesIO" not in str(caught.value)


@pytest.mark.parametrize("name", GOOD)
def test_a_picture_is_read_upright_and_in_8_bits(name):
    picture = read_picture(CASES / "pictures" / name)
    assert (picture.mode, picture.size) == ("RGB", GOOD[name])


def test_what_lies_under_transparent_pixels_is_not_shown():
    assert np.asarray(read_picture(CASES / "pictures" / "rgba_clear.png")).max() == 255


@pytest.mark.parametrize("name", BAD)
def test_a_reference_is_named_with_the_line_that_asks_for_it(tmp_path, name):
    path = tmp_path / "edit.jsonl"
    path.write_text(f'\n{{"prompt": "make it blue", "image": "{CASES}/pictures/{name}"}}\n')
    (prompt,) = load_prompts(path, "edit")
    with pytest.raises(ValueError, match=f"reference image .*{name} of {path}:2 is unreadable"):
        load_references(prompt)


def test_a_large_picture_is_refused_wherever_foreign_ones_are_read(tmp_path, monkeypatch):
    """PIL warns up to twice the limit, and reads them."""
    monkeypatch.setattr(pictures, "MAX_PIXELS", 99)
    path = tmp_path / "large.png"
    Image.new("RGB", (10, 10)).save(path)
    shard, pair, benchmark = shards._picture, pairs._picture, Picture(path).check
    for read in (lambda: shard(path.read_bytes(), "x"), lambda: pair(path), benchmark):
        with pytest.raises((SampleError, DataError, ValueError), match="10 x 10 px are more than"):
            read()
