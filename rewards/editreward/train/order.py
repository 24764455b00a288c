"""Which samples make up step s on rank r: a pure function of (seed, step, rank), so there is no state to save.

With the ranking term, up to `group_size` edits of one (source, instruction) stay together as a *unit*. Units are
drawn anew in every epoch: members of a group are shuffled and cut into units; what is left over in groups is cut
into mixed units, whose strangers are not compared. Every sample comes once an epoch, but for the last incomplete
unit. Batches run across epoch borders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from core.seeds import numpy_generator
from rewards.editreward.data.index import Entry

_STREAM = 6  # apart from what else draws from the same seed


class DataOrder:
    """`rank_batches(step, rank)` gives the micro-batches of one rank at one step, as indices into `entries`."""

    def __init__(
        self,
        entries: Sequence[Entry],
        *,
        seed: int,
        batch_size: int,
        micro_batch_size: int,
        ranks: int,
        unit: int,
    ):
        """`unit`: samples kept together, 1 without a ranking term.

        Raises ValueError for fewer entries than one unit.
        """
        if len(entries) < unit:
            raise ValueError(
                f"{len(entries)} training samples are fewer than train.ranking.group_size={unit}"
            )
        self.seed, self.micro, self.ranks, self.unit = seed, micro_batch_size, ranks, unit
        self.units_per_step = batch_size // unit
        self.units_per_epoch = len(entries) // unit
        groups: dict[str, list[int]] = {}
        for i, entry in enumerate(entries):
            groups.setdefault(entry.group, []).append(i)
        self._groups = list(groups.values())
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def rank_batches(self, step: int, rank: int) -> list[list[int]]:
        """Micro-batches of `micro_batch_size` indices at 0-based `step`."""
        first = step * self.units_per_step
        units = [self._unit(first + u) for u in range(self.units_per_step)]
        mine = [
            i
            for unit in units[rank * len(units) // self.ranks : (rank + 1) * len(units) // self.ranks]
            for i in unit
        ]
        return [mine[k : k + self.micro] for k in range(0, len(mine), self.micro)]

    def batches(self, first_step: int, rank: int) -> Iterator[list[int]]:
        """All micro-batches from a step on, without end."""
        step = first_step
        while True:
            yield from self.rank_batches(step, rank)
            step += 1

    def _unit(self, number: int) -> list[int]:
        epoch, place = divmod(number, self.units_per_epoch)
        return self._epoch(epoch)[place]

    def _make_epoch(self, epoch: int) -> list[list[int]]:
        rng = numpy_generator(self.seed, epoch, _STREAM)
        units, rest = [], []
        for group in self._groups:
            members = [group[i] for i in rng.permutation(len(group))]
            whole = len(members) - len(members) % self.unit
            units += [members[k : k + self.unit] for k in range(0, whole, self.unit)]
            rest += members[whole:]
        rest = [rest[i] for i in rng.permutation(len(rest))]
        units += [rest[k : k + self.unit] for k in range(0, len(rest) - self.unit + 1, self.unit)]
        return [units[i] for i in rng.permutation(len(units))]
