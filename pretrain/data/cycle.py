"""A fixed mixture in an endless order, without a count to keep: which of several comes n-th, and how often before."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

LENGTH = 4096
"""Slots of a cycle: a share is met to 1 in 4096, and one below half of that is never drawn."""


class Cycle:
    """Every LENGTH draws hold each choice the same number of times, in an order of their own.

    `slots[k]`: draws of choice k in a cycle, by largest remainder; 0 for a share that is too small for one.
    """

    def __init__(self, weights: Sequence[float], key: int) -> None:
        """Weights need not sum to 1. Raises ValueError when they are all 0 or one is negative."""
        shares = np.asarray(weights, dtype=np.float64)
        if (shares < 0).any() or not shares.sum() > 0:
            raise ValueError(f"weights {list(weights)} must not be negative, and one must be above 0")
        exact = shares / shares.sum() * LENGTH
        slots = np.floor(exact).astype(np.int64)
        for k in np.argsort(-(exact - slots), kind="stable")[: LENGTH - slots.sum()]:
            slots[k] += 1
        self.slots = slots
        self._key = key
        self._order = lru_cache(maxsize=4)(self._make_order)

    def draw(self, number: int) -> tuple[int, int]:
        """(k, how many of the draws before `number` were k) of the 0-based draw `number`."""
        cycle, place = divmod(number, LENGTH)
        choices, before = self._order(cycle)
        choice = int(choices[place])
        return choice, cycle * int(self.slots[choice]) + int(before[place])

    def _make_order(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([self._key, cycle])
        choices = rng.permutation(np.repeat(np.arange(len(self.slots)), self.slots))
        before = np.empty(LENGTH, dtype=np.int64)
        for k, slots in enumerate(self.slots):
            before[choices == k] = np.arange(slots)
        return choices, before
