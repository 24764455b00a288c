"""The workers' start, without Ray: what they are told, and when one that scores counts as hanging."""

from types import SimpleNamespace

import pytest

from rewards.base import RewardSet, RewardSpec
from rewards.scoring import longest_score_s
from rl.recipe.schema import ModelConfig, ResourcesConfig
from rl.workers.start import encoder_spec, start_workers


@pytest.mark.parametrize(("timeout_s", "own"), [(60.0, False), (600.0, True), (2400.0, True)])
def test_a_reward_worker_is_given_the_time_that_its_rewards_may_take(timeout_s, own):
    """3 x 600 s and the waits in between are more than the 1800 s of every other worker."""
    slow = RewardSpec("a:slow", timeout_s=timeout_s)
    sets = [
        RewardSet("x", "t2i", [RewardSpec("a:quick"), slow]),
        RewardSet("y", "t2i", [RewardSpec("a:quick")]),
    ]
    placed = SimpleNamespace(start=lambda *_, **__: [], on_node=None)
    limit_s = start_workers(placed, None, None, sets, ResourcesConfig()).dispatcher.limits_s["reward"]
    assert limit_s > longest_score_s(slow)
    assert (limit_s > ResourcesConfig().call_timeout_s) == own


def test_the_encoder_knows_the_budget_of_references():
    model = ModelConfig(path="recipes/shapes/base", reference_pixels=4096)
    assert encoder_spec(model, ResourcesConfig(), "").reference_pixels == 4096
