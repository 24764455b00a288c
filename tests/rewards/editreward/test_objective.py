"""The loss against plain loops, and the order of the data as a pure function of seed, step and rank."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from rewards.editreward.config import RankingSection, TrainSection
from rewards.editreward.data.index import Entry
from rewards.editreward.train.objective import edit_reward_loss, ranking_loss
from rewards.editreward.train.order import DataOrder

SETTINGS = TrainSection(steps=1)


def draw(n, k=2):
    generator = torch.Generator().manual_seed(n)
    return torch.randn((n, k), generator=generator), torch.randn((n, k), generator=generator)


def reference_ranking(predicted, target, groups, unit, gap):
    total = 0.0
    for i in range(len(groups)):
        for j in range(len(groups)):
            if groups[i] == groups[j] and i // unit == j // unit:
                for k in range(predicted.shape[1]):
                    if target[i, k] - target[j, k] > gap:
                        total += math.log1p(math.exp(-float(predicted[i, k] - predicted[j, k])))
    return total / (predicted.shape[1] * len(groups) * (unit - 1) / 2)


def test_regression_is_the_mean_over_samples_and_dimensions():
    predicted, target = draw(6)
    loss = edit_reward_loss(predicted, target, ["g"] * 6, SETTINGS)
    expected = (
        sum((float(p) - float(t)) ** 2 for p, t in zip(predicted.flatten(), target.flatten(), strict=True))
        / 12
    )
    assert float(loss.total) == float(loss.regression) == pytest.approx(expected)
    assert float(loss.ranking) == 0
    huber = edit_reward_loss(predicted, target, ["g"] * 6, replace(SETTINGS, loss="huber", huber_delta=0.5))
    expected = 0.0
    for p, t in zip(predicted.flatten(), target.flatten(), strict=True):
        d = abs(float(p) - float(t))
        expected += (d * d / 2 if d <= 0.5 else 0.5 * (d - 0.25)) / 12
    assert float(huber.total) == pytest.approx(expected)


def test_ranking_compares_within_groups_and_units_only():
    predicted, target = draw(8)
    groups = ["a", "a", "a", "a", "b", "c", "b", "b"]
    found = ranking_loss(predicted, target, groups, unit=4, gap=0.1)
    assert float(found) == pytest.approx(reference_ranking(predicted, target, groups, 4, 0.1))
    settings = replace(SETTINGS, ranking=RankingSection(weight=0.5, group_size=4, min_gap=0.1))
    loss = edit_reward_loss(predicted, target, groups, settings)
    assert float(loss.total) == pytest.approx(float(loss.regression) + 0.5 * float(found))
    alone = ranking_loss(predicted, target, list("abcdefgh"), unit=4, gap=0.1)
    assert float(alone) == 0
    # The gradient pushes a worse sample that scores higher down, and the better one up.
    score = torch.tensor([[1.0], [0.0]], requires_grad=True)
    ranking_loss(score, torch.tensor([[0.0], [2.0]]), ["a", "a"], unit=2, gap=0.1).backward()
    assert score.grad[0] > 0 > score.grad[1]


def test_the_loss_does_not_depend_on_how_a_batch_is_cut():
    settings = replace(SETTINGS, ranking=RankingSection(weight=0.7, group_size=2, min_gap=0.0))
    predicted, target = draw(12)
    groups = [name for name in "abcdef" for _ in range(2)]
    whole = edit_reward_loss(predicted, target, groups, settings).total
    for size in (2, 4, 6):
        parts = [
            edit_reward_loss(
                predicted[k : k + size], target[k : k + size], groups[k : k + size], settings
            ).total
            for k in range(0, 12, size)
        ]
        assert float(sum(parts) / len(parts)) == pytest.approx(float(whole), rel=1e-6)


def entries(*group_sizes):
    return [
        Entry("shard", f"{g}-{k}", {}, f"source {g}", f"group {g}", "text", "kind", (0.0,))
        for g, size in enumerate(group_sizes)
        for k in range(size)
    ]


def order(data, *, ranks=1, micro=2, unit=1, batch=8, seed=0):
    return DataOrder(data, seed=seed, batch_size=batch, micro_batch_size=micro, ranks=ranks, unit=unit)


def test_every_sample_comes_once_an_epoch():
    data = entries(4, 4, 4, 4)
    drawn = [i for step in range(4) for batch in order(data).rank_batches(step, 0) for i in batch]
    assert sorted(drawn[:16]) == list(range(16)) == sorted(drawn[16:])
    assert drawn[:16] != drawn[16:]


@pytest.mark.parametrize("unit", [1, 2])
def test_ranks_share_the_batch_that_one_rank_would_take(unit):
    data = entries(5, 3, 4, 2, 6)
    alone = order(data, unit=unit)
    for step in range(6):
        whole = [i for batch in alone.rank_batches(step, 0) for i in batch]
        assert len(whole) == 8
        for ranks in (2, 4):
            split = order(data, ranks=ranks, unit=unit)
            parts = [[i for batch in split.rank_batches(step, r) for i in batch] for r in range(ranks)]
            assert [i for part in parts for i in part] == whole
            assert {len(part) for part in parts} == {8 // ranks}


def test_the_order_is_a_function_of_seed_and_step():
    data = entries(7, 5, 4)
    forwards = order(data)
    later = [forwards.rank_batches(step, 0) for step in range(10)]
    fresh = order(data)
    assert [fresh.rank_batches(step, 0) for step in reversed(range(10))][::-1] == later
    assert order(data, seed=1).rank_batches(0, 0) != later[0]
    stream = order(data).batches(3, 0)
    assert [next(stream) for _ in range(4)] == later[3]


def test_units_keep_edits_of_a_group_together_and_lose_no_sample():
    data = entries(
        4, 6, 3, 1, 2
    )  # units of 4: two whole ones, and 2 + 3 + 1 + 2 left over make two mixed ones
    drawn = [batch for step in range(2) for batch in order(data, micro=4, unit=4).rank_batches(step, 0)]
    assert sorted(i for batch in drawn for i in batch) == list(range(16))
    kinds = Counter(len({data[i].group for i in batch}) == 1 for batch in drawn)
    assert kinds[True] >= 2
    with pytest.raises(ValueError, match="fewer than train.ranking.group_size"):
        order(entries(3), unit=4)
