"""Equal shares: the invariants of rl/learner/batching.py over many random sizes, and its worked example."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl.learner.batching import SampleRef, TrainBatch, TrainSample, make_train_batch, trained_positions
from rollout.sampler import Conditioning, Trajectory
from rollout.shapes import Shape


def ref(group: int, k: int, positions: tuple[int, ...] = (0, 1)) -> SampleRef:
    return SampleRef(group, k, f"trajectory {group}", k, f"conditioning {group}", positions, float(k))


def random_samples(rng: random.Random) -> list[SampleRef]:
    """Groups with gaps in their ids and with members missing, in the order of landing."""
    size = rng.randint(1, 6)
    groups = rng.sample(range(50), rng.randint(0, 9))
    samples = [ref(g, k) for g in groups for k in range(size) if rng.random() < 0.8]
    rng.shuffle(samples)
    return samples


@pytest.mark.parametrize("seed", range(60))
def test_the_invariants(seed):
    rng = random.Random(seed)
    samples = random_samples(rng)
    updates, ranks, micro = rng.randint(1, 4), rng.randint(1, 5), rng.randint(1, 4)
    batch = make_train_batch(samples, updates, ranks, micro)
    trained = []
    for shares in batch.updates:
        assert len(shares) == ranks
        lengths = {len(share.samples) for share in shares}
        assert len(lengths) == 1, "ranks with unequal counts deadlock in their collectives"
        assert lengths.pop() % micro == 0
        real = [s for share in shares for s in share.samples if s.weight > 0]
        assert {share.count for share in shares} == {len(real)}
        assert real == sorted(real, key=lambda s: (s.group, s.k))
        assert {s.weight for share in shares for s in share.samples} <= {0.0, 1.0}
        trained.append(real)
    assert sorted(s for part in trained for s in map(_identity, part)) == sorted(map(_identity, samples))
    groups = Counter(group for part in trained for group in {s.group for s in part})
    assert set(groups.values()) <= {1}, "a group must not be split over updates"
    assert batch.num_samples == len(samples)
    assert len(batch.updates) == min(updates, len(groups))


def _identity(sample: SampleRef) -> tuple[int, int]:
    return sample.group, sample.k


@pytest.mark.parametrize("seed", range(10))
def test_the_order_of_arrival_does_not_matter(seed):
    rng = random.Random(seed)
    samples = random_samples(rng)
    shuffled = rng.sample(samples, len(samples))
    assert make_train_batch(samples, 2, 3, 2) == make_train_batch(shuffled, 2, 3, 2)


SHAPES = [Shape((32, 32)), Shape((32, 32), ((32, 32),)), Shape((16, 64)), Shape((64, 16))]


@given(
    groups=st.lists(st.tuples(st.sampled_from(SHAPES), st.integers(1, 6)), max_size=9),
    updates=st.integers(1, 4),
    ranks=st.integers(1, 5),
    micro=st.integers(1, 4),
    rng=st.randoms(use_true_random=False),
)
def test_the_invariants_of_several_shapes(groups, updates, ranks, micro, rng):
    samples = [replace(ref(g, k), shape=shape) for g, (shape, size) in enumerate(groups) for k in range(size)]
    shuffled = rng.sample(samples, len(samples))
    batch = make_train_batch(shuffled, updates, ranks, micro)
    trained = []
    for shares in batch.updates:
        real = [s for share in shares for s in share.samples if s.weight > 0]
        alike = Counter(s.shape for s in real)
        (length,) = {len(share.samples) for share in shares}
        micro_batches = [
            share.samples[i : i + micro] for share in shares for i in range(0, len(share.samples), micro)
        ]
        assert length % micro == 0 and all(len({s.shape for s in one}) == 1 for one in micro_batches)
        assert {share.count for share in shares} == {len(real)}
        if len(alike) > 1:  # no more than it takes
            needed = sum(-(-count // micro) for count in alike.values())
            assert length == -(-needed // ranks) * micro
        trained += real
    assert sorted(map(_identity, trained)) == sorted(map(_identity, samples))
    alone = [replace(sample, shape=None) for sample in shuffled]
    if len({sample.shape for sample in samples}) == 1:
        assert _bare(batch) == make_train_batch(alone, updates, ranks, micro), "one shape: as without"


def _bare(batch):
    return TrainBatch(
        tuple(
            tuple(replace(s, samples=tuple(replace(one, shape=None) for one in s.samples)) for s in shares)
            for shares in batch.updates
        )
    )


def test_micro_batches_of_several_shapes_by_hand():
    """5 squares and 3 wide ones on 2 ranks in micro-batches of 2: two full ones and a padded one, then two."""
    square, wide = Shape((32, 32)), Shape((64, 16))
    samples = [replace(ref(0, k), shape=square) for k in range(5)]
    samples += [replace(ref(1, k), shape=wide) for k in range(3)]
    (shares,) = make_train_batch(samples, 1, 2, 2).updates
    assert [[(s.group, s.k, s.weight) for s in share.samples] for share in shares] == [
        [(0, 0, 1), (0, 1, 1), (0, 4, 1), (0, 4, 0), (1, 2, 1), (1, 2, 0)],
        [(0, 2, 1), (0, 3, 1), (1, 0, 1), (1, 1, 1), (1, 0, 0), (1, 1, 0)],
    ]
    assert [share.count for share in shares] == [8, 8]


def test_updates_of_a_whole_batch_are_equal():
    samples = [ref(g, k) for g in range(6) for k in range(4)]
    batch = make_train_batch(samples, 3, 2, 4)
    assert [shares[0].count for shares in batch.updates] == [8, 8, 8]
    assert all(s.weight == 1.0 for shares in batch.updates for share in shares for s in share.samples)


def test_the_worked_example_of_the_module():
    """5 groups of 4, 2 updates, 2 ranks, micro-batch 4."""
    batch = make_train_batch([ref(g, k) for g in range(5) for k in range(4)], 2, 2, 4)
    first, second = batch.updates
    assert [share.count for share in first] == [12, 12]
    assert [[s.weight for s in share.samples] for share in first] == [[1.0] * 6 + [0.0] * 2] * 2
    assert {s.group for share in first for s in share.samples} == {0, 1, 2}
    assert [[s.weight for s in share.samples] for share in second] == [[1.0] * 4] * 2


def test_a_rank_without_samples_gets_padding_alone():
    shares = make_train_batch([ref(0, 0), ref(0, 1)], 1, 4, 2).updates[0]
    assert [sum(s.weight for s in share.samples) for share in shares] == [1.0, 1.0, 0.0, 0.0]
    assert all(len(share.samples) == 2 and share.count == 2 for share in shares)


def test_nothing_to_train_is_an_empty_batch():
    batch = make_train_batch([], 2, 3, 4)
    assert batch.updates == ()
    assert batch.num_samples == 0


def test_unequal_numbers_of_steps_are_refused():
    with pytest.raises(ValueError, match="the same number of steps"):
        make_train_batch([ref(0, 0), ref(0, 1, (0,))], 1, 1, 1)


def test_trained_positions_leave_out_the_end_of_the_schedule():
    assert trained_positions(range(10), 10, 1, 0, seed=0) == tuple(range(9))
    assert trained_positions(range(10), 10, 0, 0, seed=0) == tuple(range(10))
    assert trained_positions((6, 7, 8, 9), 10, 2, 0, seed=0) == (0, 1)
    assert trained_positions((8, 9), 10, 2, 0, seed=0) == ()


def test_drawn_positions_are_a_function_of_the_seed():
    drawn = [trained_positions(range(10), 10, 1, 3, seed=seed) for seed in range(60)]
    assert drawn == [trained_positions(range(10), 10, 1, 3, seed=seed) for seed in range(60)]
    assert all(len(set(p)) == 3 and list(p) == sorted(p) and max(p) < 9 for p in drawn)
    assert {position for p in drawn for position in p} == set(range(9))


def test_a_sample_takes_its_row_of_the_trajectory():
    latents = torch.arange(3 * 3 * 4 * 2 * 2, dtype=torch.float32).reshape(3, 3, 4, 2, 2)
    trajectory = Trajectory(
        latents, torch.arange(6.0).reshape(3, 2), (1, 2), torch.linspace(1, 0, 5), latents[:, 0]
    )
    conditioning = Conditioning(torch.zeros(2, 3), torch.zeros(4))
    sample = TrainSample.of(SampleRef(7, 5, None, 2, None, (0,), 0.25, 1.0), trajectory, conditioning)
    assert torch.equal(sample.latents, latents[2])
    assert sample.log_probs.tolist() == [4.0, 5.0]
    assert (sample.group, sample.k, sample.steps, sample.positions) == (7, 5, (1, 2), (0,))
    assert (sample.advantage, sample.weight, sample.conditioning) == (0.25, 1.0, conditioning)
