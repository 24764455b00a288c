"""What the judge said, in numbers: outcomes, the labels' spread, and how far it agrees with itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from core.agreement import agreement
from rewards.editreward.data.label_questions import DIMENSIONS
from rewards.editreward.data.label_run import FIRST, SECOND

FEWEST = 3
"""Pairs from which a rank correlation is stated."""


def make_report(provenances: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """From the provenance of all labelled edits.

    `agreement` is over the edits that both opinions graded: Spearman's rank correlation (None below `FEWEST` pairs,
    or where one side never varies) and the mean absolute difference in label units.
    """
    outcomes: dict[str, Counter[str]] = {FIRST: Counter(), SECOND: Counter()}
    labels: list[Mapping[str, float]] = []
    pairs: list[tuple[Mapping[str, float], Mapping[str, float]]] = []
    for provenance in provenances:
        said = {name: provenance[name] for name in (FIRST, SECOND) if name in provenance}
        for name, opinion in said.items():
            outcomes[name][opinion["outcome"]] += 1
        if said[FIRST]["outcome"] == "ok":
            labels.append(said[FIRST]["scores"])
            if SECOND in said and said[SECOND]["outcome"] == "ok":
                pairs.append((said[FIRST]["scores"], said[SECOND]["scores"]))
    return {
        "outcomes": {name: dict(sorted(counts.items())) for name, counts in outcomes.items()},
        "labels": {name: _spread([each[name] for each in labels]) for name in DIMENSIONS},
        "agreement": {
            "pairs": len(pairs),
            **{name: _agreement([(a[name], b[name]) for a, b in pairs]) for name in DIMENSIONS},
        },
    }


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """The report for the log."""
    counts = report["outcomes"][FIRST]
    lines = [
        f"{sum(counts.values())} edits: " + ", ".join(f"{name} {count}" for name, count in counts.items())
    ]
    for name in DIMENSIONS:
        spread, agreement = report["labels"][name], report["agreement"][name]
        lines.append(
            f"  {name}: mean {_shown(spread['mean'])}, deviation {_shown(spread['deviation'])}; asked twice: "
            f"Spearman {_shown(agreement['spearman'])}, "
            f"mean absolute difference {_shown(agreement['mean_absolute_difference'])}"
        )
    return [*lines, f"  asked twice and graded both times: {report['agreement']['pairs']}"]


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"mean": None, "deviation": None}
    return {"mean": float(np.mean(values)), "deviation": float(np.std(values))}


def _agreement(pairs: Sequence[tuple[float, float]]) -> dict[str, float | None]:
    if not pairs:
        return {"spearman": None, "mean_absolute_difference": None}
    first, second = np.array(pairs, dtype=np.float64).T
    figures = agreement(first, second)
    varied = len(pairs) >= FEWEST and np.ptp(first) > 0 and np.ptp(second) > 0
    return {"spearman": figures["spearman"] if varied else None, "mean_absolute_difference": figures["mae"]}


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
