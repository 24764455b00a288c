"""Order, buckets and mixture: what comes when, without a look at files."""

from collections import Counter

import numpy as np
import pytest

from core.failures import DataError
from models.latents import ASPECT_RATIOS
from pretrain.data.buckets import bucket_size, crop_box, crop_loss, nearest_buckets
from pretrain.data.config import DataConfig, Resolution, SourceConfig
from pretrain.data.order import CYCLE_LENGTH, BatchOrder, Cycle, permuted
from worlds.shapes.training.kontext import task_of

WIDE = ASPECT_RATIOS.index((16, 9))


class Sizes:
    """A source that has sizes only."""

    known_corrupt, digest = 0, ""

    def __init__(self, *sizes: tuple[int, int]):
        self.widths, self.heights = np.array(sizes, dtype=np.int32).T

    def __len__(self):
        return len(self.widths)


def order_of(*sources, batch_size=4, seed=0, **keys):
    """BatchOrder over (task, weight, sizes) triples."""
    configs = [SourceConfig(kind="shapes", task=task, weight=weight) for task, weight, _ in sources]
    tasks = {task for task, _, _ in sources}
    share = 0.5 if len(tasks) == 2 else float("edit" in tasks)
    data = DataConfig(**({"sources": configs, "edit_share": share} | keys))
    return BatchOrder(data, [sizes for _, _, sizes in sources], seed=seed, batch_size=batch_size)


def draws(order, step, batch_size=4):
    plan = order.plan(step)
    return [order.draw(plan, place) for place in range(batch_size)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 17, 100, 1025])
def test_a_permutation_takes_every_index_once(size):
    shuffled = [permuted(i, size, key=5) for i in range(size)]
    assert sorted(shuffled) == list(range(size))
    if size > 16:
        assert shuffled != list(range(size))
        assert shuffled != [permuted(i, size, key=6) for i in range(size)]


def test_a_permutation_spreads_evenly():
    """Where the first tenth goes: all tenths alike (chi-square over 10 cells, 99.9 % quantile 27.9)."""
    counts = Counter(permuted(i, 10_000, key=1) // 1000 for i in range(1000))
    assert sum((counts[k] - 100) ** 2 / 100 for k in range(10)) < 27.9


def test_an_index_outside_is_refused():
    with pytest.raises(ValueError, match="5 is not in range"):
        permuted(5, 5, key=0)


def test_a_cycle_counts_what_came_before():
    cycle = Cycle([3, 0, 1], key=2)
    seen: Counter[int] = Counter()
    for number in range(2 * CYCLE_LENGTH + 50):
        choice, before = cycle.draw(number)
        assert before == seen[choice]
        seen[choice] += 1
        if number == CYCLE_LENGTH - 1:
            assert dict(seen) == {0: CYCLE_LENGTH * 3 // 4, 2: CYCLE_LENGTH // 4}
    assert [cycle.draw(n)[0] for n in range(50)] != [cycle.draw(CYCLE_LENGTH + n)[0] for n in range(50)]


@pytest.mark.parametrize("weights", [[0, 0], [1, -1]])
def test_weights_that_make_no_mixture_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        Cycle(weights, key=0)


def test_tasks_alternate_as_in_the_kontext_stage():
    square = Sizes((64, 64))
    for share in (0.5, 0.25, 0.9):
        order = order_of(("t2i", 1, square), ("edit", 1, square), edit_share=share)
        assert [order.plan(step).task for step in range(40)] == [task_of(step, share) for step in range(40)]


def test_every_sample_of_a_bucket_comes_once_an_epoch():
    sizes = [(64, 64)] * 10 + [(160, 90)] * 5
    order = order_of(("t2i", 1, Sizes(*sizes)))
    came: dict[int, list[int]] = {0: [], WIDE: []}
    for step in range(400):
        plan = order.plan(step)
        drawn = draws(order, step)
        came[plan.bucket] += [draw.ordinal for draw in drawn]
    for bucket, members in ((0, range(10)), (WIDE, range(10, 15))):
        epochs = [
            came[bucket][i : i + len(members)]
            for i in range(0, len(came[bucket]) - len(members) + 1, len(members))
        ]
        assert len(epochs) > 20
        assert all(sorted(epoch) == list(members) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 10


def test_a_batch_has_one_bucket_and_tasks_do_not_mix():
    sizes = Sizes(*[(64, 64)] * 6, *[(90, 160)] * 6, *[(96, 64)] * 6)
    order = order_of(("t2i", 1, sizes), ("edit", 1, sizes))
    for step in range(60):
        plan, drawn = order.plan(step), draws(order, step)
        buckets = nearest_buckets(sizes.widths, sizes.heights, bucketed=True)
        assert {draw.source for draw in drawn} == {int(plan.task == "edit")}
        assert {buckets[draw.ordinal] for draw in drawn} == {plan.bucket}


def test_weights_are_shares_of_samples_whatever_the_sizes_of_sources():
    square, mixed = Sizes(*[(64, 64)] * 3), Sizes(*[(64, 64)] * 100, *[(160, 90)] * 100)
    order = order_of(("t2i", 3, square), ("t2i", 1, mixed), ("t2i", 0, square))
    counts = Counter(draw.source for step in range(CYCLE_LENGTH) for draw in draws(order, step))
    total = sum(counts.values())
    assert counts[0] / total == pytest.approx(0.75, abs=0.002)
    assert counts[1] / total == pytest.approx(0.25, abs=0.002)
    assert counts[2] == 0


def test_order_depends_on_the_seed():
    sizes = Sizes(*[(64, 64)] * 50)
    first, second = order_of(("t2i", 1, sizes)), order_of(("t2i", 1, sizes), seed=1)
    assert [draws(first, s) for s in range(5)] != [draws(second, s) for s in range(5)]


def test_resolution_follows_its_schedule_and_keeps_the_samples_in_their_buckets():
    schedule = [
        Resolution(until_step=10, side=256),
        Resolution(until_step=20, area=512 * 512),
        Resolution(side=1024),
    ]
    sizes = Sizes(*[(64, 64)] * 20, *[(160, 90)] * 20)
    order = order_of(("t2i", 1, sizes), resolution=schedule)
    fixed = order_of(("t2i", 1, sizes))
    for step, side in ((0, 256), (9, 256), (10, 512), (19, 512), (20, 1024), (10**6, 1024)):
        plan = order.plan(step)
        assert (plan.height, plan.width) == bucket_size(plan.bucket, side**2, 32)
        assert draws(order, step) == draws(fixed, step)


@pytest.mark.parametrize("side", [256, 320, 384, 512, 640, 768, 1024])
@pytest.mark.parametrize("multiple", [8, 16, 32])
def test_buckets_cut_less_than_a_twentieth_of_their_own_shape(side, multiple):
    """Including 16:9; nothing is padded, so the loss is what the crop leaves outside."""
    for k, (columns, rows) in enumerate(ASPECT_RATIOS):
        height, width = bucket_size(k, side**2, multiple)
        assert height % multiple == width % multiple == 0
        assert abs(np.log(height * width / side**2)) < 0.22
        left, top, right, bottom = crop_box(100 * columns, 100 * rows, (height, width))
        loss = 1 - (right - left) * (bottom - top) / (100 * columns * 100 * rows)
        assert loss == pytest.approx(crop_loss(columns, rows, (height, width)))
        assert loss < 0.05


def test_16_9_batches_lose_less_than_a_twentieth_over_common_sizes():
    """Mean loss over the batches of a stream of 16:9 pictures in the sizes that screens and cameras have."""
    pictures = [(1920, 1080), (1280, 720), (3840, 2160), (1366, 768), (1024, 576), (854, 480), (640, 360)]
    for side in (256, 512, 1024):
        order = order_of(("t2i", 1, Sizes(*pictures)), resolution=[Resolution(side=side)])
        losses = []
        for step in range(10):
            plan = order.plan(step)
            assert plan.bucket == WIDE
            losses += [
                crop_loss(*pictures[draw.ordinal], (plan.height, plan.width)) for draw in draws(order, step)
            ]
        assert max(losses) < 0.05


def test_nearest_bucket_is_the_nearest_in_log_ratio():
    for width, height, expected in (
        (100, 100, (1, 1)),
        (1000, 562, (16, 9)),
        (90, 160, (9, 16)),
        (141, 100, (4, 3)),
        (142, 100, (3, 2)),
    ):
        (bucket,) = nearest_buckets(np.array([width]), np.array([height]), bucketed=True)
        assert ASPECT_RATIOS[bucket] == expected
    assert nearest_buckets(np.array([1000]), np.array([562]), bucketed=False) == [0]


def test_shapes_that_lose_too_much_are_left_out_and_counted(caplog):
    order = order_of(("t2i", 1, Sizes((64, 64), (1000, 1), (1, 1000), (64, 64))))
    assert order.left_out == [2]
    assert {draw.ordinal for step in range(4) for draw in draws(order, step)} == {0, 3}
    assert "left out 2 of 4 samples" in caplog.text
    with pytest.raises(DataError, match="no usable sample of task t2i"):
        order_of(("t2i", 1, Sizes((1000, 1))))


def test_a_bucket_too_small_for_its_cycle_is_left_out_aloud(caplog):
    sizes = Sizes(*[(64, 64)] * 20_000, (160, 90))
    order = order_of(("t2i", 1, sizes))
    assert {order.plan(step).bucket for step in range(CYCLE_LENGTH)} == {0}
    assert "bucket 16:9 holds too few" in caplog.text
