"""One number of a table, kept as what each prompt gave to it, so that an interval can resample the prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeAlias

from rewards.benchmarks.items import ScoredItem

Contribution: TypeAlias = tuple[float, float]
"""(sum, weight) of one prompt: the sum of what was measured on it, and how often it was."""


@dataclass(frozen=True)
class Figure:
    """The unweighted mean over `strata` of sum / weight.

    strata: by group, one contribution per prompt; a weight of 0 is a prompt of which nothing was scored. A
    figure with a stratum in which nothing was scored has no value: the mean of the other groups is not it.
    expected, missing: pictures that the figure asks for, and how many of them gave nothing.
    decimals: to how many decimals a public script rounds the mean of each stratum and their mean; None for not.
    """

    name: str
    strata: Mapping[str, tuple[Contribution, ...]]
    expected: int
    missing: int
    decimals: int | None = None

    @property
    def value(self) -> float | None:
        """The figure; None when a group has nothing in it."""
        means = [stratum_mean(rows) for rows in self.strata.values()]
        if not means or any(mean is None for mean in means):
            return None
        return self._rounded(fmean(self._rounded(mean) for mean in means if mean is not None))

    @property
    def prompts(self) -> int:
        """Prompts of which at least one picture was scored."""
        return sum(weight > 0 for rows in self.strata.values() for _, weight in rows)

    def _rounded(self, value: float) -> float:
        return value if self.decimals is None else round(value, self.decimals)


def stratum_mean(rows: Sequence[Contribution]) -> float | None:
    """Sum over weight; None when nothing was scored."""
    weight = sum(weight for _, weight in rows)
    return sum(total for total, _ in rows) / weight if weight else None


def image_mean(name: str, key: str, groups: Mapping[str, Iterable[ScoredItem]], scale: float = 1.0) -> Figure:
    """The mean over groups of the mean over their pictures of the value `key`, times `scale`."""
    return figure(name, groups, lambda item: [scale * value for value in item.values(key)])


def figure(
    name: str,
    groups: Mapping[str, Iterable[ScoredItem]],
    measure: Callable[[ScoredItem], Sequence[float]],
    *,
    decimals: int | None = None,
) -> Figure:
    """A figure of what `measure` finds on each item: one number per scored picture."""
    strata: dict[str, tuple[Contribution, ...]] = {}
    expected = missing = 0
    for group, members in groups.items():
        rows = []
        for item in members:
            found = measure(item)
            rows.append((float(sum(found)), float(len(found))))
            expected += len(item.images)
            missing += len(item.images) - len(found)
        strata[group] = tuple(rows)
    return Figure(name, strata, expected, missing, decimals)


def by_group(scored: Sequence[ScoredItem], groups: Iterable[str] = ()) -> dict[str, list[ScoredItem]]:
    """The items by group: all of `groups`, empty ones too, in that order, then others as they come."""
    found: dict[str, list[ScoredItem]] = {group: [] for group in groups}
    for item in scored:
        found.setdefault(item.item.group, []).append(item)
    return found


def only_scored(groups: Mapping[str, Sequence[ScoredItem]], key: str) -> dict[str, list[ScoredItem]]:
    """What public scripts see of the groups: the prompts of which `key` was found, and no group without any."""
    kept = {group: [item for item in members if item.values(key)] for group, members in groups.items()}
    return {group: members for group, members in kept.items() if members}
