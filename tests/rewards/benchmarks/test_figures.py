"""Figures: means over groups, what is missing, and subsets that hold every group."""

import pytest

from core.prompts import Prompt
from rewards.benchmarks.figures import Figure, by_group, image_mean, only_scored
from rewards.benchmarks.items import DataError, Item, ScoredItem, subset


def scored(group, *values, key=None):
    """An item whose pictures have these scores; None for a picture that is absent, "?" for an unscored one."""
    images = tuple(
        None if value is None else {"seen": 1.0} if value == "?" else {"score": value} for value in values
    )
    return ScoredItem(Item(key or f"{group}{values}", group, Prompt(0, "t2i", "x")), images)


def test_a_figure_is_the_mean_over_groups_of_the_mean_over_pictures():
    items = [scored("a", 1.0, 0.0), scored("a", 1.0, 1.0), scored("b", 0.0, 0.5)]
    found = image_mean("all", "score", by_group(items))
    assert found.value == pytest.approx((3 / 4 + 0.5 / 2) / 2)
    assert (found.expected, found.missing, found.prompts) == (6, 0, 3)


def test_absent_and_unscored_pictures_are_counted_and_never_numbers():
    found = image_mean("all", "score", by_group([scored("a", 1.0, None), scored("a", "?", "?")]))
    assert found.value == 1.0
    assert (found.expected, found.missing, found.prompts) == (4, 3, 1)


def test_a_group_with_nothing_in_it_leaves_no_figure():
    items = [scored("a", 1.0), scored("b", None)]
    assert image_mean("all", "score", by_group(items)).value is None
    assert image_mean("all", "score", by_group(items[:1], ("a", "c"))).value is None
    assert image_mean("all", "score", only_scored(by_group(items), "score")).value == 1.0
    assert image_mean("all", "score", {}).value is None


def test_rounding_like_a_script_rounds_the_groups_and_their_mean():
    rows = {"a": ((1.0, 3.0),), "b": ((2.0, 3.0),)}
    assert Figure("x", rows, 2, 0).value == 0.5
    assert Figure("x", {"a": rows["a"]}, 1, 0, decimals=2).value == 0.33
    assert Figure("x", {"a": ((1.0, 3.0),), "b": ((0.0, 1.0),)}, 2, 0, decimals=2).value == round(0.33 / 2, 2)


def test_a_subset_takes_the_groups_in_turn_and_keeps_the_order():
    items = [Item(f"{group}{k}", group, Prompt(0, "t2i", "x")) for group in "abc" for k in range(4)]
    assert [item.key for item in subset(items, 5)] == ["a0", "a1", "b0", "b1", "c0"]
    assert subset(items, None) == items
    assert subset(items, 12) == items
    with pytest.raises(DataError, match="13 prompts are asked for, and the data holds 12"):
        subset(items, 13)
