"""The run stops when a reward is missing too often or always the same, and not before."""

import pytest

from rewards.base import FatalRewardError, RewardSpec
from rewards.monitor import FEWEST_GROUPS, WINDOW_GROUPS, RewardMonitor
from rewards.scoring import GroupScore


def group(**components):
    first = next(iter(components.values()))
    failures = {f"{name}/timeout": v.count(None) for name, v in components.items() if None in v}
    return GroupScore(0, first, [v is not None for v in first], components, failures, {}, {}, False, "")


def spec(label="own", **settings):
    return RewardSpec("geneval_shapes", label=label, **settings)


def test_the_share_is_judged_only_once_enough_groups_were_seen():
    monitor = RewardMonitor([spec(max_missing_share=0.2)])
    for _ in range(FEWEST_GROUPS - 1):
        monitor.observe([group(own=[None, None])])
    assert monitor.missing_shares() == {"own": 1.0}
    with pytest.raises(FatalRewardError, match=r"'own': 100% .* max_missing_share 0.2 .*timeout"):
        monitor.observe([group(own=[None, None])])


@pytest.mark.parametrize(("missing", "stops"), [(2, False), (3, True)])
def test_the_share_counts_samples_and_the_limit_itself_is_allowed(missing, stops):
    groups = [group(own=[None if k < missing else 0.1 * k for k in range(10)])] * FEWEST_GROUPS
    monitor = RewardMonitor([spec(max_missing_share=0.2)])
    if stops:
        with pytest.raises(FatalRewardError, match="30%"):
            monitor.observe(groups)
    else:
        monitor.observe(groups)
        assert monitor.missing_shares()["own"] == pytest.approx(0.2)


def test_the_window_slides():
    monitor = RewardMonitor([spec(max_missing_share=0.5)])
    fine, failed = group(own=[0.1, 0.9]), group(own=[None, None])
    monitor.observe([fine] * WINDOW_GROUPS)
    monitor.observe([failed] * (WINDOW_GROUPS // 2))
    with pytest.raises(FatalRewardError):
        monitor.observe([failed])


def test_a_constant_reward_stops_the_run_after_that_many_steps():
    monitor = RewardMonitor([spec(constant_steps=3)])
    step = [group(own=[0.5, 0.5]), group(own=[0.5, None])]
    monitor.observe(step)
    monitor.observe(step)
    with pytest.raises(FatalRewardError, match="last 3 steps is 0.5"):
        monitor.observe(step)


@pytest.mark.parametrize(
    "interruption",
    [[group(own=[0.5, 0.6])], [group(own=[0.5, 0.5]), group(own=[0.4, 0.4])], [group(own=[0.4, 0.4])]],
    ids=["spread within a group", "spread between groups", "another constant"],
)
def test_any_other_score_starts_the_count_again(interruption):
    monitor = RewardMonitor([spec(constant_steps=3)])
    for step in ([group(own=[0.5, 0.5])], [group(own=[0.5, 0.5])], interruption, [group(own=[0.5, 0.5])]):
        monitor.observe(step)


def test_a_step_with_one_score_says_nothing_either_way():
    monitor = RewardMonitor([spec(constant_steps=2)])
    monitor.observe([group(own=[0.5, 0.5])])
    monitor.observe([group(own=[0.9, None])])
    with pytest.raises(FatalRewardError, match="last 2 steps"):
        monitor.observe([group(own=[0.5, 0.5])])


def test_zero_constant_steps_switches_the_alarm_off():
    monitor = RewardMonitor([spec(constant_steps=0)])
    for _ in range(50):
        monitor.observe([group(own=[0.0, 0.0])])


def test_rewards_are_judged_apart_and_all_problems_come_at_once():
    monitor = RewardMonitor([spec("a", constant_steps=1), spec("b"), spec("c", weight=0.0, constant_steps=1)])
    with pytest.raises(FatalRewardError) as raised:
        monitor.observe([group(a=[1.0, 1.0], b=[None, None], c=[0.0, 0.0])] * FEWEST_GROUPS)
    lines = str(raised.value).splitlines()
    assert len(lines) == 2 and "'a'" in lines[0] and "'b'" in lines[1]  # c has weight 0
