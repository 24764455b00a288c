"""From scored groups to a train batch and its metrics, by hand."""

import math

import pytest

from core.prompts import Prompt
from rewards.scoring import GroupScore
from rl.learner.gate import LogProbGaps
from rl.learner.stats import UpdateStats
from rl.loop.schedule import stage_learning_rate
from rl.loop.step import describe_fates, group_fates, make_batch, reward_metrics, update_metrics
from rl.recipe.schema import LearnerConfig, RunConfig
from rl.record.metric_table import find_metric
from rl.workers.requests import Chunk, RolloutRequest, RolloutResult


def config(**learner) -> RunConfig:
    result = RunConfig(name="x")
    result.rollout.num_steps, result.learner.ranks, result.learner.micro_batch_size = 4, 1, 2
    for key, value in learner.items():
        setattr(result.learner, key, value)
    return result


def scored(group_id, rewards, *, mask=None, dropped=False, components=None, steps=(0, 1, 2, 3)):
    mask = [r is not None and not dropped for r in rewards] if mask is None else mask
    components = {"red": list(rewards), **(components or {})}
    score = GroupScore(group_id, list(rewards), mask, components, {}, {}, {}, dropped, "")
    return sampled(group_id, len(rewards), score, steps)


def sampled(group_id, size, score, steps=(0, 1, 2, 3)):
    """A group in chunks of 2."""
    seeds = tuple(range(100 * group_id, 100 * group_id + size))
    request = RolloutRequest(group_id, (Prompt(0, "t2i", "x"),), seeds, steps)
    chunks = tuple(
        Chunk(first, min(2, size - first), f"t{group_id}.{first}", None) for first in range(0, size, 2)
    )
    return RolloutResult(request, (f"c{group_id}",), chunks, score)


def trained(batch):
    return [s for shares in batch.updates for share in shares for s in share.samples if s.weight > 0]


def test_samples_point_to_their_row_and_carry_their_advantage():
    batch, advantages = make_batch([scored(1, [1.0, 3.0, 3.0, 1.0])], config(updates_per_rollout=1))
    samples = trained(batch)
    assert [(s.group, s.k, s.trajectory, s.row, s.conditioning) for s in samples] == [
        (1, 0, "t1.0", 0, "c1"), (1, 1, "t1.0", 1, "c1"), (1, 2, "t1.2", 0, "c1"), (1, 3, "t1.2", 1, "c1"),
    ]  # fmt: skip
    assert [s.advantage for s in samples] == pytest.approx([-1 / 1.0001, 1 / 1.0001, 1 / 1.0001, -1 / 1.0001])
    assert {s.positions for s in samples} == {(0, 1, 2)}
    assert advantages.used.all()


def test_the_order_of_arrival_does_not_matter():
    groups = [scored(g, [0.1 * g, 0.5, 0.9, 0.2]) for g in (5, 2, 9)]
    assert make_batch(groups, config())[0] == make_batch(groups[::-1], config())[0]


def test_missing_masked_dropped_and_failed_samples_do_not_train():
    groups = [
        scored(1, [None, 1.0, 2.0, 3.0]),
        scored(2, [1.0, 2.0, 3.0, 4.0], mask=[True, True, True, False]),
        scored(3, [1.0, 2.0, None, None], dropped=True),
        scored(4, [0.5, 0.5, 0.5, 0.5]),
        sampled(5, 4, None),
    ]
    batch, advantages = make_batch(groups, config(updates_per_rollout=1))
    assert [(s.group, s.k) for s in trained(batch)] == [(1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2)]
    assert advantages.zero_spread_share == pytest.approx(1 / 3)
    values = reward_metrics(groups, advantages, clip=5.0)
    assert values["reward/missing_share"] == pytest.approx(1 - 13 / 20)
    assert values["reward/groups_dropped"] == 2
    assert values["reward/red/mean"] == values["reward/mean"] == pytest.approx((6 + 10 + 3 + 2) / 13)
    assert values["reward/red/missing_share"] == pytest.approx(3 / 16)


def test_a_step_without_signal_has_no_update():
    batch, advantages = make_batch([scored(1, [0.5] * 4), sampled(2, 4, None)], config())
    assert batch.updates == ()
    values = reward_metrics([scored(1, [0.5] * 4)], advantages, clip=5.0)
    assert values["advantage/abs_mean"] is None
    assert values["reward/zero_spread_share"] == 1.0
    assert update_metrics([], 1e-3, 0) == {"optimizer/updates": 0, "optimizer/samples": 0}


def test_drawn_steps_are_shared_by_a_group_and_follow_its_seed():
    groups = [scored(g, [1.0, 2.0, 3.0, 4.0]) for g in range(12)]
    samples = trained(make_batch(groups, config(train_steps=1, updates_per_rollout=1))[0])
    by_group = {g: {s.positions for s in samples if s.group == g} for g in range(12)}
    assert all(len(positions) == 1 for positions in by_group.values())
    assert len(set().union(*by_group.values())) > 1


def test_a_windows_positions_count_from_its_start():
    groups = [scored(1, [1.0, 2.0], steps=(1, 2)), scored(2, [1.0, 2.0], steps=(0, 1))]
    samples = trained(make_batch(groups, config(updates_per_rollout=1))[0])
    assert {s.positions for s in samples} == {(0, 1)}


def test_components_are_averaged_over_what_is_there():
    groups = [
        scored(1, [1.0, 0.0], components={"red/hue": [0.2, None]}),
        scored(2, [1.0, 0.0], components={"red/hue": [0.4, 0.6]}),
    ]
    values = reward_metrics(groups, make_batch(groups, config())[1], clip=5.0)
    assert values["reward/red/component/hue"] == pytest.approx(0.4)
    for name in values:
        find_metric(name)


def test_clamped_advantages_are_counted():
    groups = [scored(1, [0.0] * 31 + [1.0])]
    advantages = make_batch(groups, config(advantage_clip=5.0))[1]
    assert reward_metrics(groups, advantages, clip=5.0)["advantage/clamped_share"] == pytest.approx(1 / 32)


def test_the_rate_falls_linearly_over_a_stage_where_a_recipe_asks():
    constant, falling = LearnerConfig(learning_rate=1e-3), LearnerConfig(learning_rate=1e-3)
    falling.final_learning_rate = 2e-4
    assert [stage_learning_rate(constant, done, 4) for done in range(4)] == [1e-3] * 4
    assert [stage_learning_rate(falling, done, 4) for done in range(4)] == pytest.approx(
        [1e-3, 8e-4, 6e-4, 4e-4]
    )


def stats(**changes) -> UpdateStats:
    values = dict(
        loss=1.0, policy_loss=0.5, kl=0.1, approx_kl=0.01, ratio_mean=1.0, ratio_min=0.9, ratio_max=1.1,
        clip_fraction_low=0.2, clip_fraction_high=0.3, grad_norm=2.0, gaps=None,
    )  # fmt: skip
    return UpdateStats(**(values | changes))


def test_a_gradient_that_is_not_finite_stays_in_the_mean_and_is_counted():
    values = update_metrics([stats(), stats(grad_norm=math.nan, skipped=True)], 3e-4, 16)
    assert math.isnan(values["optimizer/grad_norm"])
    assert (values["optimizer/updates"], values["optimizer/skipped"]) == (2, 1)


def test_what_became_of_groups_is_told_apart():
    gone = RolloutResult(scored(4, [1.0, 2.0]).request, (), failure="unreadable")
    results = [
        scored(1, [1.0, 2.0]), scored(2, [0.5, 0.5]), scored(3, [None, None]), gone,
        scored(5, [1.0, 2.0], dropped=True), scored(6, [0.5, None]), sampled(7, 2, None),
    ]  # fmt: skip
    fates = group_fates(results)
    assert describe_fates(fates) == (
        "of 7 groups 1 could not be sampled, 2 have no spread in their rewards, 1 taught, 3 were not scored"
    )
    assert describe_fates({}) == "of 0 groups none was drawn"


def test_update_metrics_are_means_and_extremes():
    gaps = LogProbGaps({0: 1e-7, 2: 3e-7}, 9e-7)
    values = update_metrics(
        [stats(gaps=gaps), stats(loss=3.0, ratio_min=0.5, ratio_max=1.5, grad_norm=None)], 3e-4, 16
    )
    assert values["loss/total"] == 2.0
    assert (values["policy/ratio_min"], values["policy/ratio_max"]) == (0.5, 1.5)
    assert values["optimizer/grad_norm"] == 2.0
    assert (values["optimizer/updates"], values["optimizer/samples"], values["optimizer/lr"]) == (2, 16, 3e-4)
    assert values["gate/log_prob_gap_mean"] == pytest.approx(2e-7)
    assert values["gate/log_prob_gap_max"] == 9e-7
    assert values["gate/log_prob_gap/2"] == 3e-7
    for name in values:
        find_metric(name)
