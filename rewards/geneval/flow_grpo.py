"""The dense GenEval score of Flow-GRPO's reward server (Liu et al. 2025), faults and all, for comparison.

Its faults: the count part falls to -14 when 16 objects are found where one is asked; a wrong relation adds a
0 and then a 1 all the same, so it still earns .75; exclude clauses are not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

from rewards.geneval.clauses import Found, pairs_in_relation


def flow_grpo_score(found: Sequence[Found]) -> float:
    """The server's mean over its parts (from -14 to 1); 0 without include clauses."""
    parts: list[float] = []
    matched: list[bool] = []
    for item in found:
        parts.append(1 - abs(item.n - item.count) / item.count)
        good = item.n == item.count
        if not good:
            # One zero stands for colour and position together.
            parts += [0.0] if item.color or item.position else []
        elif item.right_colors is not None:
            parts.append(item.right_colors / item.count)
            good = item.colors_right
        if good and item.position:
            relation, target = item.position
            if not matched[target]:
                good = False
                parts.append(0.0)
            else:
                good = all(pairs_in_relation(relation, item.group, found[target].group))
                parts += [1.0] if good else [0.0, 1.0]
        matched.append(good)
    return sum(parts) / len(parts) if parts else 0.0
