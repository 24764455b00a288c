"""What the paper's Table 4 says about pairs of rows, and whether a grid of ours says the same.

| paper | ours, on the shapes world |
|---|---|
| GenEval | GenEval's rules on the classical detector |
| DPG-Bench | the same prompts and pictures by the second, independent scorer |
| GEdit-EN | the exact edit verifier |
| ImgEdit | the same edits by the second scorer |

So our second columns check the first by another method; they are not other benchmarks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from core.statistics import Estimate
from rl.sweep.scores import GridScores
from rl.sweep.table import signed

METRICS = {
    "GenEval": "t2i",
    "DPG": "t2i/geneval_shapes_template",
    "GEdit-EN": "edit",
    "ImgEdit": "edit/edit_shapes_template",
}
"""The paper's columns, and ours that stand for them."""

NONE, JUDGE, EDITREWARD = "none", "judge edit", "EditReward edit"
GENEVAL, JUDGE_BOTH, EDITREWARD_BOTH = "GenEval only", "judge + GenEval", "EditReward + GenEval"
JOINT = "joint"

PAPER: dict[str, tuple[float, float, float, float]] = {
    NONE: (0.83, 83.68, 6.31, 3.95),
    JUDGE: (0.83, 84.15, 6.55, 4.04),
    EDITREWARD: (0.83, 83.99, 6.59, 4.00),
    GENEVAL: (0.87, 83.97, 6.40, 3.95),
    JUDGE_BOTH: (0.89, 84.23, 6.54, 3.99),
    EDITREWARD_BOTH: (0.89, 84.36, 6.59, 4.00),
}
"""Table 4, columns as in METRICS. Its rows as ours call them; `joint` is ours alone."""

COMPARISONS = (
    (JUDGE, NONE),
    (EDITREWARD, NONE),
    (GENEVAL, NONE),
    (JUDGE_BOTH, NONE),
    (EDITREWARD_BOTH, NONE),
    (EDITREWARD, JUDGE),
    (EDITREWARD_BOTH, JUDGE_BOTH),
    (JUDGE_BOTH, JUDGE),
    (EDITREWARD_BOTH, EDITREWARD),
    (JUDGE_BOTH, GENEVAL),
    (EDITREWARD_BOTH, GENEVAL),
)
"""Each reward against none, the two editing rewards, and what the second stage and the first add."""

OURS = ((JOINT, NONE), (EDITREWARD_BOTH, JOINT))
"""Comparisons with the row that the paper does not have."""

HOLDS, REVERSED, OPEN, UNMEASURED = "holds", "reversed", "open", "not measured"


@dataclass(frozen=True)
class Direction:
    """One pair of rows on one metric: the paper's difference, ours with its interval, and how they agree."""

    later: str
    earlier: str
    metric: str
    paper: float
    ours: Estimate
    verdict: str


def verdict(paper: float, ours: Estimate) -> str:
    """How our interval stands to the sign of the paper's printed difference.

    A rise or fall holds when the whole interval lies on its side of 0, is reversed when it lies on the other, and is
    open when it holds 0. A tie holds as long as the interval holds 0, and is reversed otherwise; so few data let
    every tie hold.
    """
    if ours.low is None or ours.high is None:
        return UNMEASURED
    if paper == 0:
        return HOLDS if ours.low <= 0 <= ours.high else REVERSED
    low, high = (ours.low, ours.high) if paper > 0 else (-ours.high, -ours.low)
    return HOLDS if low > 0 else REVERSED if high < 0 else OPEN


def directions(scores: GridScores) -> list[Direction]:
    """Every comparison on every metric, in order."""
    rows = {row.name: row for row in scores.grid.rows}
    found = []
    for later, earlier in COMPARISONS:
        for column, (name, metric) in enumerate(METRICS.items()):
            # The paper prints two decimals; what is left behind them is rounding.
            paper = round(PAPER[later][column] - PAPER[earlier][column], 2)
            ours = scores.compare(rows[later], rows[earlier], metric)
            found.append(Direction(later, earlier, name, paper, ours, verdict(paper, ours)))
    return found


def best_rows(values: Mapping[str, float]) -> list[str]:
    """The row, or the rows that tie, with the highest value."""
    top = max(values.values())
    return [row for row, value in values.items() if value == top]


def direction_table(found: list[Direction]) -> list[str]:
    """One line a comparison: for every metric the paper's difference, ours, and the verdict."""
    lines = ["| comparison | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for later, earlier in COMPARISONS:
        cells = [d for d in found if (d.later, d.earlier) == (later, earlier)]
        told = [f"{arrow(d.paper)}; {signed(d.ours)}; {emphasis(d.verdict)}" for d in cells]
        lines.append(f"| {later} − {earlier} | " + " | ".join(told) + " |")
    return lines


def arrow(paper: float) -> str:
    """The paper's difference in words."""
    return "tie" if paper == 0 else f"{'rises' if paper > 0 else 'falls'} by {abs(paper):g}"


def emphasis(told: str) -> str:
    return f"**{told}**" if told == REVERSED else told
