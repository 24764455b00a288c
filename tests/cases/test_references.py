"""References whose proportions are not the run's are refused by line: policy and reward would see two pictures."""

import pytest

from core import prompts
from tests.cases.conftest import CASES

FILE = CASES / "references" / "edit.jsonl"
SIZES = ["512 x 1024", "1000 x 333", "64 x 64", "512 x 1024", "1024 x 512", "4000 x 40"]
"""Of each line's picture, upright."""


def problems(width: int, height: int) -> list[str]:
    unreadable, squashed = prompts.reference_problems(
        prompts.load_prompts(FILE, "edit"), (width, height), "model.width and model.height"
    )
    assert not unreadable
    return squashed


@pytest.mark.parametrize(
    ("size", "fitting"),
    [
        ((64, 64), [3]),
        ((32, 64), [1, 4]),
        ((1000, 333), [2]),
        ((800, 8), [6]),
        ((64, 32), [5]),
        ((48, 80), []),
    ],
)
def test_each_line_is_refused_by_its_sizes(monkeypatch, size, fitting):
    monkeypatch.setattr(prompts, "MOST_SHAPES", 6)
    width, height = size
    wrong = [(number, SIZES[number - 1]) for number in range(1, 7) if number not in fitting]
    found = problems(width, height)
    assert len(found) == len(wrong)
    for problem, (number, own) in zip(found, wrong, strict=True):
        assert problem.startswith(f"{FILE}:{number}: its reference image is {own} px (width x height)")
        assert f"drawn at {width} x {height}" in problem and "crop or pad it" in problem


def test_many_are_counted():
    found = problems(48, 80)
    assert len(found) == 6 and found[-1] == "and 1 references more of other proportions"


def test_a_pixel_of_rounding_is_let_pass():
    assert [problem.split(": ")[0] for problem in problems(601, 200)] == [
        f"{FILE}:{n}" for n in (1, 3, 4, 5, 6)
    ]
