"""Which samples make up the batch of a step: a pure function of (seed, step), so there is no state to save.

The step gives the task. Within a task, batches go to buckets, and the samples of a bucket to sources, by fixed cycles
whose counts are known without a look at the past; the n-th sample of a source's bucket is the n-th of a permutation
per epoch. So every sample of a bucket comes once an epoch of that bucket.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from core.failures import DataError
from models.latents import ASPECT_RATIOS
from pretrain.data.buckets import area_at, areas, bucket_size, crop_losses, nearest_buckets
from pretrain.data.config import TASKS, DataConfig
from pretrain.data.sources import Source

log = logging.getLogger(__name__)

CYCLE_LENGTH = 4096
"""Slots of a cycle: a share is met to 1 in 4096, and one below half of that is never drawn."""
_FEISTEL_ROUNDS = 4
_MASK = (1 << 64) - 1
_BUCKETS, _SOURCES, _EPOCH, _REPLACEMENT = range(1, 5)


@dataclass(frozen=True)
class Plan:
    """A global batch: its task, bucket and size in pixels. `number`: batches of this task and bucket before it."""

    task: Literal["t2i", "edit"]
    bucket: int
    height: int
    width: int
    number: int


@dataclass(frozen=True)
class Draw:
    """One sample: the source's number in the recipe, and the sample's in the source."""

    source: int
    ordinal: int


class BatchOrder:
    """The global order of a recipe's samples."""

    def __init__(self, data: DataConfig, sources: Sequence[Source], *, seed: int, batch_size: int) -> None:
        """Raises DataError for a task without a usable sample."""
        self._data, self._seed, self._batch_size = data, seed, batch_size
        self._members: dict[tuple[int, int], np.ndarray] = {}
        self.left_out = [self._assign(i, source) for i, source in enumerate(sources)]
        self._bucket_cycle: dict[str, Cycle] = {}
        self._source_cycle: dict[tuple[str, int], Cycle] = {}
        for number, task in enumerate(TASKS):
            if (data.edit_share if task == "edit" else 1 - data.edit_share) > 0:
                self._mix(number, task, sources)

    def counts(self, source: int) -> dict[int, int]:
        """Samples of a source by bucket."""
        return {bucket: len(members) for (owner, bucket), members in self._members.items() if owner == source}

    def plan(self, step: int) -> Plan:
        """The batch of a 0-based step."""
        edits = int(step * self._data.edit_share)
        # As worlds.shapes.training.kontext.task_of spreads them.
        is_edit = int((step + 1) * self._data.edit_share) > edits
        task: Literal["t2i", "edit"] = "edit" if is_edit else "t2i"
        bucket, number = self._bucket_cycle[task].draw(edits if is_edit else step - edits)
        area = area_at(self._data.resolution, step)
        return Plan(task, bucket, *bucket_size(bucket, area, self._data.multiple), number)

    def draw(self, plan: Plan, place: int) -> Draw:
        """The sample at a place of the global batch."""
        cycle = self._source_cycle[plan.task, plan.bucket]
        source, count = cycle.draw(plan.number * self._batch_size + place)
        members = self._members[source, plan.bucket]
        epoch, position = divmod(count, len(members))
        key = mixed(self._seed, _EPOCH, source, plan.bucket, epoch)
        return Draw(source, int(members[permuted(position, len(members), key)]))

    def replacement(self, draw: Draw, plan: Plan, step: int, place: int, attempt: int) -> Draw:
        """What stands in for a broken sample: one of its source and bucket, by (seed, step, place, attempt)."""
        members = self._members[draw.source, plan.bucket]
        number = mixed(self._seed, _REPLACEMENT, step, place, attempt) % len(members)
        return Draw(draw.source, int(members[number]))

    def _assign(self, number: int, source: Source) -> int:
        """Put every sample into its bucket; returns how many would lose too much there."""
        config = self._data
        if config.sources[number].weight == 0:
            return 0
        buckets = nearest_buckets(source.widths, source.heights, bucketed=config.aspect_buckets)
        left_out = 0
        for bucket in range(len(ASPECT_RATIOS)):
            members = np.flatnonzero(buckets == bucket).astype(np.uint32)
            widths, heights = source.widths[members], source.heights[members]
            fits = np.ones(len(members), dtype=bool)
            for area in areas(config.resolution):  # a sample stays throughout: the worst size decides
                size = bucket_size(bucket, area, config.multiple)
                fits &= crop_losses(widths, heights, size) <= config.max_crop_loss
            left_out += int((~fits).sum())
            if fits.any():
                self._members[number, bucket] = members[fits]
        if left_out:
            log.warning(
                "data.sources[%d]: left out %d of %d samples that would lose more than data.max_crop_loss=%s",
                number, left_out, len(source), config.max_crop_loss,
            )  # fmt: skip
        return left_out

    def _mix(self, number: int, task: str, sources: Sequence[Source]) -> None:
        """The cycles of a task. A source's weight is spread over its buckets by their numbers of samples."""
        configs = self._data.sources
        mass = np.zeros((len(ASPECT_RATIOS), len(sources)))
        for (source, bucket), members in self._members.items():
            if configs[source].task == task:
                usable = sum(len(m) for (s, _), m in self._members.items() if s == source)
                mass[bucket, source] = configs[source].weight * len(members) / usable
        if not mass.any():
            raise DataError(f"no usable sample of task {task}: see data.sources and data.max_crop_loss")
        by_bucket = Cycle(mass.sum(axis=1), mixed(self._seed, _BUCKETS, number))
        self._bucket_cycle[task] = by_bucket
        for bucket in np.flatnonzero(mass.sum(axis=1)):
            if not by_bucket.slots[bucket]:
                log.warning(
                    "%s: bucket %s:%s holds too few samples for a batch in its cycle and is left out",
                    task, *ASPECT_RATIOS[bucket],
                )  # fmt: skip
            key = mixed(self._seed, _SOURCES, number, int(bucket))
            self._source_cycle[task, int(bucket)] = Cycle(mass[bucket], key)


class Cycle:
    """A fixed mixture in an endless order, without a count to keep: which choice comes n-th, and how often before.

    Every CYCLE_LENGTH draws hold each choice the same number of times, in an order of their own.

    `slots[k]`: draws of choice k in a cycle, by largest remainder; 0 for a share that is too small for one.
    """

    def __init__(self, weights: Sequence[float], key: int) -> None:
        """Weights need not sum to 1. Raises ValueError when they are all 0 or one is negative."""
        shares = np.asarray(weights, dtype=np.float64)
        if (shares < 0).any() or not shares.sum() > 0:
            raise ValueError(f"weights {list(weights)} must not be negative, and one must be above 0")
        exact = shares / shares.sum() * CYCLE_LENGTH
        slots = np.floor(exact).astype(np.int64)
        for k in np.argsort(-(exact - slots), kind="stable")[: CYCLE_LENGTH - slots.sum()]:
            slots[k] += 1
        self.slots = slots
        self._key = key
        self._order = lru_cache(maxsize=4)(self._make_order)

    def draw(self, number: int) -> tuple[int, int]:
        """(k, how many of the draws before `number` were k) of the 0-based draw `number`."""
        cycle, place = divmod(number, CYCLE_LENGTH)
        choices, before = self._order(cycle)
        choice = int(choices[place])
        return choice, cycle * int(self.slots[choice]) + int(before[place])

    def _make_order(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([self._key, cycle])
        choices = rng.permutation(np.repeat(np.arange(len(self.slots)), self.slots))
        before = np.empty(CYCLE_LENGTH, dtype=np.int64)
        for k, slots in enumerate(self.slots):
            before[choices == k] = np.arange(slots)
        return choices, before


def permuted(index: int, size: int, key: int) -> int:
    """Where `index` of range(size) goes in the permutation that `key` names: in O(1), whatever the size.

    A Feistel network permutes the next power of four; indices that land outside are sent through again until they
    land inside (cycle walking), which takes fewer than four rounds on average.

    Raises:
        ValueError: the index is not in range(size).
    """
    if not 0 <= index < size:
        raise ValueError(f"index {index} is not in range({size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        index = _feistel(index, half, key)
        if index < size:
            return index


def mixed(*values: int) -> int:
    """A hash of whole numbers, 64 bits: keys and draws from (seed, step, place, ...)."""
    state = 0
    for value in values:
        state = _scrambled(state ^ _scrambled((value & _MASK) + 1))
    return state


def _feistel(index: int, half: int, key: int) -> int:
    mask = (1 << half) - 1
    left, right = index >> half, index & mask
    for number in range(_FEISTEL_ROUNDS):
        left, right = right, left ^ (mixed(key, number, right) & mask)
    return left << half | right


def _scrambled(value: int) -> int:
    """SplitMix64: one step of its state and its finaliser."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31
