"""Equation 1 against figures worked by hand, and what a missing reward must not do."""

import math

import numpy as np
import pytest

from rl.loop.advantages import group_advantages


def test_the_papers_normalisation_by_hand():
    """Group 0: mean 2, population std 1. Group 1: mean 4, std 2. eps = 1e-4."""
    result = group_advantages([1.0, 3.0, 2.0, 6.0], [0, 0, 1, 1])
    np.testing.assert_allclose(result.values, [-1 / 1.0001, 1 / 1.0001, -2 / 2.0001, 2 / 2.0001])
    assert result.used.all()
    assert result.zero_spread_share == 0.0


def test_the_batchs_spread_keeps_the_groups_means():
    """Rewards 1 3 2 6: mean 3, population variance (4 + 0 + 1 + 9) / 4 = 3.5."""
    result = group_advantages([1.0, 3.0, 2.0, 6.0], [0, 0, 1, 1], std="batch", eps=0.5)
    np.testing.assert_allclose(result.values, np.array([-1, 1, -2, 2]) / (math.sqrt(3.5) + 0.5))


def test_the_clamp():
    rewards = [0.0] * 63 + [1.0]
    result = group_advantages(rewards, [0] * 64)
    assert result.values.max() == 5.0
    assert group_advantages(rewards, [0] * 64, clip=100.0).values.max() == pytest.approx(
        math.sqrt(63), rel=1e-3
    )


@pytest.mark.parametrize("std", ["group", "batch"])
def test_rewards_that_no_statistics_can_hold_are_not_used(std):
    result = group_advantages([1e308, -1e308, 1e200, 0.0, 1.0, 2.0], [0, 0, 0, 0, 1, 1], std=std)
    assert np.isfinite(result.values).all()
    assert result.used.tolist() == [False] * 4 + [True] * 2


@pytest.mark.parametrize("missing", [None, float("nan"), float("inf"), 1e308])
def test_a_missing_reward_takes_no_part_in_mean_or_spread(missing):
    whole = group_advantages([1.0, 3.0, 5.0], [7, 7, 7])
    holed = group_advantages([1.0, missing, 3.0, 5.0], [7, 7, 7, 7])
    np.testing.assert_allclose(holed.values[[0, 2, 3]], whole.values)
    assert holed.values[1] == 0.0
    assert holed.used.tolist() == [True, False, True, True]


def test_a_masked_sample_counts_as_missing_in_the_batchs_spread_too():
    kept = group_advantages([1.0, 3.0, 2.0, 6.0], [0, 0, 1, 1], std="batch")
    masked = group_advantages(
        [1.0, 3.0, 2.0, 6.0, 100.0], [0, 0, 1, 1, 1], std="batch", mask=[True, True, True, True, False]
    )
    np.testing.assert_allclose(masked.values[:4], kept.values)
    assert not masked.used[4]


def test_groups_without_spread_are_not_used():
    result = group_advantages([0.5, 0.5, 0.1, 0.9, None, 0.3], [0, 0, 1, 1, 2, 2])
    assert result.used.tolist() == [False, False, True, True, False, False]
    assert result.values[[0, 1, 4, 5]].tolist() == [0.0] * 4
    assert result.zero_spread_share == pytest.approx(2 / 3)


def test_equal_rewards_up_to_rounding_have_no_spread():
    """0.1 + 0.2 and 0.3 differ in the last bit, and a division by eps would make an advantage of it."""
    assert not group_advantages([0.1 + 0.2, 0.3, 0.3], [0, 0, 0]).used.any()


def test_nothing_scored_is_no_error():
    result = group_advantages([None, float("nan")], [0, 0])
    assert not result.used.any()
    assert result.zero_spread_share == 0.0
    assert len(group_advantages([], []).values) == 0


def test_group_ids_need_no_order():
    rng = np.random.default_rng(0)
    rewards, groups = rng.random(24), rng.integers(0, 5, 24) * 1000
    order = rng.permutation(24)
    for std in ("group", "batch"):
        plain = group_advantages(rewards, groups, std=std)
        shuffled = group_advantages(rewards[order], groups[order], std=std)
        np.testing.assert_allclose(shuffled.values, plain.values[order], atol=1e-12)
        for group in set(groups.tolist()):
            assert plain.values[groups == group].sum() == pytest.approx(0.0, abs=1e-9)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="1 group ids for 2 rewards"):
        group_advantages([1.0, 2.0], [0])
    with pytest.raises(ValueError, match="mask has 1 entries for 2 rewards"):
        group_advantages([1.0, 2.0], [0, 0], mask=[True])
    with pytest.raises(ValueError, match="std='global': choose 'group' or 'batch'"):
        group_advantages([1.0, 2.0], [0, 0], std="global")
