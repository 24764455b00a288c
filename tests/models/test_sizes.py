"""Sizes of pictures: the released scripts' rule worked by hand, and what a model cannot make."""

import math
from pathlib import Path

import pytest

from models.sizes import (
    ModelGeometry,
    choose_size,
    geometry,
    longer_edge_size,
    parse_aspect_ratio,
    reference_sizes,
)
from tests.fakes.tiny_models import IMAGE_SIZE

SD35 = ModelGeometry(multiple=16, largest=6144, side=1024)
BASE = Path(__file__).resolve().parents[2] / "recipes" / "shapes" / "base"


def test_geometry_comes_from_the_folder(folder: Path) -> None:
    assert geometry(folder) == ModelGeometry(multiple=8, largest=128, side=IMAGE_SIZE)
    assert geometry(BASE) == ModelGeometry(multiple=8, largest=64, side=32)
    assert (SD35.step, SD35.longer_edge) == (32, 512)
    assert (geometry(BASE).step, geometry(BASE).longer_edge) == (16, 32)


@pytest.mark.parametrize(
    ("width", "height", "edge", "expected"),
    [
        (1920, 1080, 512, (288, 512)),  # 288 exactly
        (1080, 1920, 1024, (1024, 576)),
        (4000, 3000, 512, (384, 512)),
        (3, 2, 512, (352, 512)),  # 341.3 is nearer to 352 than to 320
        (500, 500, 1024, (1024, 1024)),
        (1000, 990, 512, (512, 512)),  # 506.9
        (8, 1, 512, (64, 512)),
        (16, 10, 1024, (640, 1024)),
        (640, 480 - 30, 640, (448, 640)),  # 450
    ],
)
def test_the_longer_edge_rule(width: int, height: int, edge: int, expected: tuple[int, int]) -> None:
    assert longer_edge_size(width, height, edge, 32) == expected


@pytest.mark.parametrize("edge", [64, 512, 1024, 1536])
def test_every_proportion_up_to_the_limit_comes_out_as_near_as_the_grid_allows(edge: int) -> None:
    for width in range(1, 41):
        for height in range(math.ceil(width / 8), min(40, 8 * width) + 1):
            rows, columns = longer_edge_size(width, height, edge, 32)
            assert max(rows, columns) == edge and rows % 32 == columns % 32 == 0
            assert (columns >= rows) == (width >= height) or rows == columns
            ideal = edge * min(width, height) / max(width, height)
            assert abs(min(rows, columns) - ideal) <= 16 or (min(rows, columns) == 32 and ideal < 32)


def test_what_is_given_decides_in_order() -> None:
    photo = (4000, 3000)
    assert choose_size(SD35) == (512, 512)
    assert choose_size(SD35, picture=photo) == (384, 512)
    assert choose_size(SD35, picture=photo, longer_edge=1024) == (768, 1024)
    assert choose_size(SD35, picture=photo, aspect_ratio="9:16") == (512, 288)
    assert choose_size(SD35, picture=photo, height=448, width=592) == (448, 592)
    assert choose_size(SD35, picture=(1, 1)) == (512, 512)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"height": 512}, "height 512 and width None: give both, or neither"),
        ({"height": 512, "width": 512, "aspect_ratio": "1:1"}, "leave nothing to aspect_ratio"),
        ({"height": 512, "width": 500}, "512 x 500 px .* multiples of 16 and at most 6144"),
        ({"height": -16, "width": 512}, "multiples of 16"),
        ({"height": 6160, "width": 512}, "at most 6144"),
        ({"longer_edge": 528}, "longer edge of 528 px: must be a multiple of 32"),
        ({"longer_edge": 0}, "longer edge of 0 px"),
        ({"aspect_ratio": "wide"}, "'wide': write it as width:height"),
        ({"aspect_ratio": "0:1"}, "'0:1': write it as"),
        ({"aspect_ratio": "9:1"}, "9 x 1 are beyond 8:1"),
        ({"picture": (1, 500)}, "proportions of 1 x 500 are beyond 8:1"),
    ],
)
def test_sizes_that_contradict_or_cannot_be_made_are_refused(call: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_size(SD35, **call)


def test_a_line_is_edited_where_its_size_is_given() -> None:
    assert choose_size(SD35, picture=(1, 500), height=512, width=64) == (512, 64)
    assert parse_aspect_ratio(" 16:9 ") == (16, 9)


def test_further_references_keep_their_proportions_within_the_drawn_area() -> None:
    assert reference_sizes([], (512, 512), 16) == []
    assert reference_sizes([(9, 9)], (512, 384), 16) == [(512, 384)]
    shown = reference_sizes([(1024, 512), (64, 64), (300, 700)], (512, 512), 16)
    assert shown == [(512, 512), (512, 512), (336, 768)]
    with pytest.raises(ValueError, match="4000 x 10 are beyond 8:1"):
        reference_sizes([(9, 9), (10, 4000)], (512, 512), 16)


def test_a_budget_is_shared_by_the_further_references() -> None:
    drawn, own = (512, 512), [(512, 512), (512, 512), (300, 600)]
    shown = reference_sizes(own, drawn, 16, budget=2 * 512 * 512)
    assert shown[0] == drawn and shown[1] == (368, 352)
    assert sum(height * width for height, width in shown) <= 2 * 512 * 512
    assert reference_sizes(own[:1], drawn, 16, budget=1) == [drawn]
    with pytest.raises(ValueError, match="3 references in 262144 pixels: .*raise the budget"):
        reference_sizes(own, drawn, 16, budget=512 * 512)
