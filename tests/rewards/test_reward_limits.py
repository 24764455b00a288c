"""Time limits follow from one another: the reward states its own, and who calls it waits for all its attempts."""

import asyncio
import math

import pytest

from rewards.base import RewardSet, RewardSpec, ServiceSpec
from rewards.checks import check_rewards
from rewards.editreward.client import EditReward
from rewards.judge.judge import Judge
from rewards.loading import default_timeout_s
from rewards.recipe import RewardConfig, reward_specs
from rewards.scoring import longest_score_s, score_group
from tests.rewards.test_reward_scoring import KEYWORDS, Sleeps

JUDGE = {"protocol": "viescore", "model": "m", "base_url": "http://127.0.0.1:9/v1", "api_key_env": None}
PATIENT = f"""
class Patient:
    def __init__(self, passes=1):
        self.default_timeout_s = 100.0 * passes
        self.least_timeout_s = 50.0
    def check(self):
        return []
    def score(self, {KEYWORDS}):
        return [1.0] * len(images)

def quick({KEYWORDS}):
    return [1.0] * len(images)
"""


def test_a_recipe_without_a_limit_takes_the_rewards_own(reward_file):
    path = reward_file(PATIENT)
    rewards = [
        RewardConfig(f"{path}:Patient"),
        RewardConfig(f"{path}:Patient", params={"passes": 3}),
        RewardConfig(f"{path}:Patient", timeout_s=7.0),
        RewardConfig(f"{path}:quick"),
        RewardConfig("judge", params=JUDGE),
        RewardConfig("judge"),  # without its parameters, as preflight says
        RewardConfig("no.such.module:reward"),
    ]
    limits = [spec.timeout_s for spec in reward_specs(rewards)]
    assert limits == [100.0, 300.0, 7.0, 60.0, Judge(**JUDGE).default_timeout_s, 60.0, 60.0]


def test_a_judge_with_default_limits_finishes_a_group_at_its_own_concurrency():
    judge, samples, questions = Judge(**JUDGE), 24, 2
    settings, limit_s = judge.settings, default_timeout_s("judge", JUDGE)
    rounds = math.ceil(samples * questions / settings.concurrency)
    assert (rounds - 1) * settings.timeout_s <= settings.queue_timeout_s, "the last ones get their turn"
    assert limit_s >= judge.max_asks * settings.longest_ask_s
    assert longest_score_s(RewardSpec("judge", timeout_s=limit_s)) > 3 * limit_s


@pytest.mark.parametrize(
    ("params", "least"), [({}, 420.0), ({"mode": "inprocess"}, 0.0), ({"unavailable_s": 900.0}, 1020.0)]
)
def test_editreward_waits_longer_than_for_an_outage(params, least):
    reward = EditReward(model="/none", **params)
    assert reward.least_timeout_s == least
    assert reward.default_timeout_s >= max(600.0, least)


def test_a_limit_that_ends_a_call_before_it_can_fail_is_refused(reward_file):
    path = reward_file(PATIENT)

    def problems(name, timeout_s, params=None):
        spec = RewardSpec(name, timeout_s=timeout_s, params=params or {})
        return check_rewards(RewardSet("set", "t2i", [spec]))

    assert problems(f"{path}:Patient", 50.0) == []
    (found,) = problems(f"{path}:Patient", 49.0)
    assert "timeout_s 49 ends a call" in found and "50 s; raise timeout_s" in found
    assert problems("judge", 60.0, JUDGE) == []
    assert "timeout_s 59 ends a call" in problems("judge", 59.0, JUDGE)[0]


@pytest.mark.parametrize("attempts", [1, 3])
def test_a_reward_that_always_fails_ends_within_its_longest_time(load, batch, attempts):
    busy = load(
        f"def reward({KEYWORDS}): raise RetryableRewardError('429', retry_after_s=9e9)", attempts=attempts
    )
    sleeps = Sleeps()
    asyncio.run(score_group((0, 0), [busy], batch, sleep=sleeps))
    assert len(sleeps) == attempts - 1
    assert sum(sleeps) + attempts * busy.spec.timeout_s <= longest_score_s(busy.spec)


def test_a_served_reward_may_also_wait_for_its_service():
    spec = RewardSpec("a:b", timeout_s=600.0, service=ServiceSpec(("http://h:1",), unavailable_s=120.0))
    assert longest_score_s(spec) >= 3 * (600 + 120 + 600)
