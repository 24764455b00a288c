"""What an evaluation leaves behind: report.json, predictions.jsonl, calibration.png, and a table for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from core.files import atomic_write_json, atomic_write_text
from core.statistics import Difference, Estimate
from rewards.editreward.data.index import Entry
from rewards.editreward.evaluate.metrics import Scored
from rewards.editreward.evaluate.pairs import PairResult
from rewards.editreward.evaluate.probes import ProbeResult

REPORT, PREDICTIONS, CALIBRATION = "report.json", "predictions.jsonl", "calibration.png"
_BINS = 10


@dataclass(frozen=True)
class Report:
    """All figures of one evaluation. `by_edit_type`: type -> name -> estimate. `against`: minus the other model."""

    model: str
    split: str
    samples: int
    groups: int
    sources: int
    unscored: int
    tie_threshold: float
    overall: Mapping[str, Estimate]
    within_groups: Mapping[str, Estimate]
    by_edit_type: Mapping[str, Mapping[str, Estimate]]
    probes: Sequence[ProbeResult]
    pair_sets: Sequence[PairResult]
    against: Mapping[str, Difference] = field(default_factory=dict)

    @property
    def failed_probes(self) -> list[str]:
        return [probe.name for probe in self.probes if not probe.passed]


def write_report(report: Report, folder: Path) -> None:
    """`report.json` with every field."""
    atomic_write_json(folder / REPORT, asdict(report))


def write_predictions(
    entries: Sequence[Entry], labels: Sequence[float], scores: Sequence[float | None], folder: Path
) -> None:
    """One line a sample, so that another model can be compared with this one without scoring again."""
    lines = [
        json.dumps(
            {
                "shard": Path(entry.shard).name, "key": entry.key, "source": entry.source, "group": entry.group,
                "edit_type": entry.edit_type, "label": label, "score": score,
            },
            ensure_ascii=False,
        )
        for entry, label, score in zip(entries, labels, scores, strict=True)
    ]  # fmt: skip
    atomic_write_text(folder / PREDICTIONS, "".join(line + "\n" for line in lines))


def read_predictions(path: Path) -> dict[tuple[str, str], float]:
    """(shard name, key) -> score of an earlier evaluation. Raises ValueError for a file of another kind."""
    found: dict[tuple[str, str], float] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record: dict[str, Any] = json.loads(line)
            if record["score"] is not None:
                found[record["shard"], record["key"]] = float(record["score"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a prediction ({error!r})") from error
    return found


def plot_calibration(scored: Scored, folder: Path) -> None:
    """Mean label in ten equally filled bins of the predicted score, with its standard error, over the diagonal."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    order = np.argsort(scored.predicted, kind="stable")
    bins = [part for part in np.array_split(order, min(_BINS, len(order))) if len(part)]
    x = [float(scored.predicted[part].mean()) for part in bins]
    y = [float(scored.target[part].mean()) for part in bins]
    error = [float(scored.target[part].std() / np.sqrt(len(part))) for part in bins]
    figure = Figure(figsize=(4.5, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    low = min(scored.target.min(), scored.predicted.min())
    high = max(scored.target.max(), scored.predicted.max())
    axes.plot([low, high], [low, high], color="0.7", linewidth=1)
    axes.scatter(scored.predicted, scored.target, s=4, color="0.8")
    axes.errorbar(x, y, yerr=error, marker="o", capsize=3)
    axes.set_xlabel("predicted score")
    axes.set_ylabel("label")
    axes.set_title(f"{len(scored.target)} samples in {len(bins)} bins")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / CALIBRATION)


def table(report: Report) -> list[str]:
    """The report as lines."""
    lines = [
        f"{report.model}, split {report.split}: {report.samples} samples, {report.groups} groups, "
        f"{report.sources} sources" + (f", {report.unscored} not scored" if report.unscored else "")
    ]
    lines += [f"  {name:14} {_show(value)}" for name, value in report.overall.items()]
    lines.append("averaged within (source, instruction) groups")
    lines += [f"  {name:14} {_show(value)}" for name, value in report.within_groups.items()]
    for kind, figures in report.by_edit_type.items():
        shown = ", ".join(
            f"{name} {_show(figures[name])}" for name in ("spearman", "pairwise") if name in figures
        )
        lines.append(f"  {kind:14} {shown}")
    if report.against:
        lines.append("difference to the other model, within groups")
        lines += [
            f"  {name:14} {_number(d.mean, '+')} [{_number(d.low, '+')}, {_number(d.high, '+')}]"
            for name, d in report.against.items()
        ]
    for pairs in report.pair_sets:
        lines.append(
            f"pair set {pairs.name}: {_show(pairs.accuracy)}, with ties {_show(pairs.accuracy_ties)}"
        )
    for probe in report.probes:
        verdict = "passed" if probe.passed else "FAILED"
        lines.append(f"probe {probe.name:12} drop {_show(probe.drop)} std, needs {probe.needed:g}: {verdict}")
    return lines


def _show(value: Estimate) -> str:
    interval = "" if value.low is None else f" [{_number(value.low)}, {_number(value.high)}]"
    return _number(value.mean) + interval


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.3f}"
