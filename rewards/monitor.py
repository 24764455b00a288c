"""Watches the rewards of a stage over time and stops the run when they no longer say anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewards.base import FatalRewardError, RewardSpec, reward_label
from rewards.scoring import GroupScore

WINDOW_GROUPS = 64
FEWEST_GROUPS = 8


class RewardMonitor:
    """Stops on a reward that is missing too often, or that gives one and the same score step after step.

    The share of missing samples is taken over the last 64 groups and judged from the eighth on, so that one
    lost group does not end a small run. Rewards of weight 0 are watched but never stop the run. A stage starts with
    nothing seen.

    `seen` is kept up to date in place, so that a run which is resumed again and again still notices. By label:
    `missing`, [missing samples, samples] of each group in the window; `constant`, [the one value, for how many steps].
    """

    def __init__(self, specs: Sequence[RewardSpec], seen: dict[str, Any] | None = None) -> None:
        self._specs = {reward_label(spec): spec for spec in specs}
        self._seen = {} if seen is None else seen
        for label in self._specs:
            self._seen.setdefault(label, {"missing": [], "constant": None})

    def observe(self, groups: Sequence[GroupScore]) -> None:
        """Take in all groups of one step, dropped ones included.

        Raises FatalRewardError when a share of missing scores or a run of equal scores is over its limit.
        """
        problems = [problem for label in self._specs for problem in self._observe_reward(label, groups)]
        if problems:
            raise FatalRewardError("\n".join(problems))

    def missing_shares(self) -> dict[str, float]:
        """Share of missing samples in the window, per label; a reward that saw no sample is left out."""
        return {
            label: sum(missing for missing, _ in window) / sum(total for _, total in window)
            for label in self._specs
            if (window := self._seen[label]["missing"])
        }

    def _observe_reward(self, label: str, groups: Sequence[GroupScore]) -> list[str]:
        spec, window = self._specs[label], self._seen[label]["missing"]
        window.extend([group.components[label].count(None), len(group.components[label])] for group in groups)
        del window[:-WINDOW_GROUPS]
        self._count_constant(label, [s for group in groups for s in group.components[label] if s is not None])
        if spec.weight == 0:
            return []
        problems = []
        share = self.missing_shares().get(label, 0.0)
        if len(window) >= FEWEST_GROUPS and share > spec.max_missing_share:
            causes = {
                key.rpartition("/")[2] for g in groups for key in g.failures if key.startswith(f"{label}/")
            }
            problems.append(
                f"reward {label!r}: {share:.0%} of the samples in the last {len(window)} groups are missing, "
                f"more than max_missing_share {spec.max_missing_share} (causes this step: {sorted(causes)})"
            )
        value, steps = self._seen[label]["constant"] or (0.0, 0)
        if 0 < spec.constant_steps <= steps:
            problems.append(
                f"reward {label!r}: every score of the last {steps} steps is {value}, which teaches nothing; "
                "mend the reward, or set its constant_steps to 0 if this is meant"
            )
        return problems

    def _count_constant(self, label: str, scores: Sequence[float]) -> None:
        """A step with fewer than two scores says nothing either way."""
        if len(scores) < 2:
            return
        value, steps = self._seen[label]["constant"] or (scores[0], 0)
        same = [scores[0], steps + 1 if scores[0] == value else 1]
        self._seen[label]["constant"] = same if len(set(scores)) == 1 else None
