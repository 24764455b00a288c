"""Intervals agree with SciPy's bootstrap and cover the truth as often as they say."""

import numpy as np
import pytest
import scipy.stats

from core import statistics
from core.statistics import Difference, Estimate, bootstrap_mean, paired_bootstrap, seeds_bootstrap


def test_the_interval_agrees_with_scipy() -> None:
    rng = np.random.default_rng(1)
    before = rng.beta(2, 3, size=200)
    after = np.clip(before + rng.normal(0.05, 0.2, size=200), 0, 1)
    ours = paired_bootstrap(before, after, resamples=20_000)
    theirs = scipy.stats.bootstrap(
        (after - before,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours.mean == pytest.approx((after - before).mean(), abs=1e-12)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.001)
    assert (ours.before, ours.after) == pytest.approx((before.mean(), after.mean()))
    assert (ours.n, ours.missing) == (200, 0)


def test_the_mean_agrees_with_a_plain_loop_of_the_same_draws() -> None:
    values = np.random.default_rng(3).normal(size=17)
    rng = np.random.default_rng(5)
    means = [np.mean([values[i] for i in rng.integers(0, 17, size=17)]) for _ in range(300)]
    ours = bootstrap_mean(values, resamples=300, seed=5)
    assert ours.low == pytest.approx(np.quantile(means, 0.025), abs=1e-12)
    assert ours.high == pytest.approx(np.quantile(means, 0.975), abs=1e-12)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).normal(size=33)
    whole = bootstrap_mean(values, resamples=1000)
    for size in (1, 33 * 7, 10_000):
        monkeypatch.setattr(statistics, "INDICES_PER_CHUNK", size)
        assert bootstrap_mean(values, resamples=1000) == whole


def test_coverage_is_near_95_percent() -> None:
    rng = np.random.default_rng(6)
    covered = 0
    for trial in range(300):
        estimate = bootstrap_mean(rng.normal(0.3, 1.0, size=60), resamples=500, seed=trial)
        assert estimate.low is not None and estimate.high is not None
        covered += estimate.low <= 0.3 <= estimate.high
    assert 0.90 <= covered / 300 <= 0.98


def test_pairing_removes_what_prompts_have_in_common() -> None:
    difficulty = np.random.default_rng(7).uniform(size=100)
    change = paired_bootstrap(difficulty, difficulty + 0.01)
    assert change.low == pytest.approx(0.01) and change.high == pytest.approx(0.01)


def test_pairs_with_a_missing_side_are_left_out_and_counted() -> None:
    change = paired_bootstrap([0.1, None, 0.3, 0.4, 0.5], [0.2, 0.9, float("nan"), 0.6, 0.4])
    assert (change.n, change.missing) == (3, 2)
    assert change.before == pytest.approx((0.1 + 0.4 + 0.5) / 3)
    assert change.after == pytest.approx((0.2 + 0.6 + 0.4) / 3)
    assert change.mean == pytest.approx(0.2 / 3)


def test_too_few_values_give_no_interval() -> None:
    assert paired_bootstrap([None, 1.0], [1.0, None]) == Difference(None, None, None, None, None, 0, 2)
    assert paired_bootstrap([0.25], [0.5]) == Difference(0.25, 0.5, 0.25, None, None, 1, 0)
    assert bootstrap_mean([]) == Estimate(None, None, None, 0, 0)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="before has 2 values and after 1"):
        paired_bootstrap([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="infinite value at index 1"):
        bootstrap_mean([0.0, float("inf")])
    with pytest.raises(ValueError, match=r"shape \(2, 2\)"):
        bootstrap_mean(np.ones((2, 2)))
    with pytest.raises(ValueError, match="at least 1, not 0"):
        bootstrap_mean([1.0, 2.0], resamples=0)


def test_seeds_and_prompts_are_both_drawn_as_in_a_plain_loop() -> None:
    rng = np.random.default_rng(5)
    values = rng.normal(0.3, 0.1, (3, 40)) + rng.normal(0.0, 0.2, (3, 1))
    means = [values[rng.integers(0, 3, 3)][:, rng.integers(0, 40, 40)].mean() for _ in range(20_000)]
    found = seeds_bootstrap(values)
    assert found.mean == pytest.approx(values.mean()) and (found.n, found.missing) == (40, 0)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.01)


def test_one_seed_is_the_bootstrap_over_prompts() -> None:
    values = np.random.default_rng(6).normal(0.0, 1.0, 200)
    one, prompts = seeds_bootstrap(values[None]), bootstrap_mean(values)
    assert one.mean == pytest.approx(prompts.mean)
    assert (one.low, one.high) == pytest.approx((prompts.low, prompts.high), abs=0.01)


def test_prompts_that_a_seed_lacks_count_for_no_seed() -> None:
    values = np.array([[0.1, np.nan, 0.3], [0.2, 9.0, 0.4]])
    assert seeds_bootstrap(values).mean == pytest.approx(0.25)
    assert (seeds_bootstrap(values).n, seeds_bootstrap(values).missing) == (2, 1)
    assert seeds_bootstrap(values[:, 1:2]) == Estimate(None, None, None, 0, 1)
    assert seeds_bootstrap(values[:0]).mean is None
    lone = seeds_bootstrap(values[:, :1])
    assert lone.mean == pytest.approx(0.15) and lone.low is None
