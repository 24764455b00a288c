"""What a run came to: `summary.json` for programs, one table for people."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from core.files import atomic_write_json
from core.statistics import Difference

SUMMARY_FILE = "summary.json"
WIDTH = 100
"""Columns that the printed table may take, whatever the terminal's width."""


@dataclass(frozen=True)
class StageSummary:
    """One stage. `evaluations` maps task ("edit", "t2i") to the change over this stage, paired by prompt; a reward of
    weight 0 has its own entry `task/label`.

    `reward_mean` is the mean training reward of the last step, None when nothing was scored in it;
    `missing_share` is the share of the stage's samples that no reward scored.
    """

    name: str
    task: str
    steps: int
    seconds: float
    evaluations: Mapping[str, Difference]
    reward_mean: float | None = None
    missing_share: float = 0.0


@dataclass(frozen=True)
class GuidancePoint:
    """Evaluation mean of the untrained base at one guidance scale, over `num_prompts` prompts."""

    guidance_scale: float
    mean: float | None
    num_prompts: int


@dataclass(frozen=True)
class BestCheckpoint:
    """A checkpoint folder with its held-out score: of `reward`, or of the whole `task` where that is None."""

    path: str
    step: int
    task: str
    reward: str | None
    score: float

    def __str__(self) -> str:
        by = self.task if self.reward is None else f"{self.task}/{self.reward}"
        return (
            f"step {self.step}, {by} {_number(self.score)} on held-out prompts; draw with it: "
            f"python -m models.generate --adapter {self.path}/adapter"
        )


@dataclass(frozen=True)
class RunSummary:
    """A whole run. `images` were sampled for training and evaluation together; `seconds` is the run's length.

    `total` maps task to the change from before the first stage to after the last. `base_guidance` maps task
    to the base's figures by guidance scale, which tells distilled guidance from a better policy. `version` is
    that of the package, `commit` None outside a git checkout. `finished` False: what the run came to until it stopped.
    `changes`: what the run read that was another at a resume.
    `best`: by `checkpoint.keep_best`.
    """

    name: str
    stages: tuple[StageSummary, ...]
    images: int
    seconds: float
    version: str
    commit: str | None = None
    total: Mapping[str, Difference] = field(default_factory=dict)
    base_guidance: Mapping[str, tuple[GuidancePoint, ...]] = field(default_factory=dict)
    restarts: int = 0
    learner_restarts: int = 0
    finished: bool = True
    changes: tuple[str, ...] = ()
    best: BestCheckpoint | None = None


def run_finished(folder: str | Path) -> bool:
    """Whether a run folder holds the summary of a whole run: one that was stopped or failed has its summary so far."""
    path = Path(folder) / SUMMARY_FILE
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("finished", True)


def summary_document(summary: RunSummary) -> dict[str, Any]:
    """The summary in the form of `summary.json`.

    `{"stages": [{"name", "task", "steps", "seconds", "evaluations": {TASK: {"before", "after", "difference",
    "low", "high", "num_prompts", "missing"}}, ...}], "images", "seconds", ...}`; `low` and `high` bound the
    difference at 95 %. Null means that there was nothing to measure.
    """
    document = asdict(summary)
    document["total"] = _evaluations(summary.total)
    for stage, entry in zip(summary.stages, document["stages"], strict=True):
        entry["evaluations"] = _evaluations(stage.evaluations)
    return document


def write_summary(summary: RunSummary, folder: str | Path) -> Path:
    """Write `folder/summary.json` atomically and return its path."""
    path = Path(folder) / SUMMARY_FILE
    atomic_write_json(path, summary_document(summary))
    return path


def print_summary(summary: RunSummary, *, file: TextIO | None = None) -> None:
    """Print the summary table, at most `WIDTH` columns wide, to `file` (standard output by default)."""
    console = Console(file=file, width=WIDTH, highlight=False)
    console.print(_changes_table(summary))
    if summary.base_guidance:
        console.print(_guidance_table(summary.base_guidance))
    if summary.best is not None:
        console.print(Text(f"Best checkpoint: {summary.best}"), soft_wrap=True)
    commit = f", commit {summary.commit[:12]}" if summary.commit else ""
    learner = _restarts(summary.learner_restarts, "learner") if summary.learner_restarts else ""
    console.print(
        Text(
            f"{summary.images:,} images in {duration(summary.seconds)}, {_restarts(summary.restarts, 'worker')}"
            f"{learner}version {summary.version}{commit}"
        )
    )


def _restarts(count: int, whose: str) -> str:
    return f"{count} {whose} restart{'' if count == 1 else 's'}, "


def duration(seconds: float) -> str:
    """Seconds as people read them: 42 s, 3m 05s, 2h 07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    minutes = round(seconds / 60)
    return f"{minutes // 60}h {minutes % 60:02d}m"


def _evaluations(differences: Mapping[str, Difference]) -> dict[str, dict[str, float | int | None]]:
    return {
        task: {
            "before": change.before,
            "after": change.after,
            "difference": change.mean,
            "low": change.low,
            "high": change.high,
            "num_prompts": change.n,
            "missing": change.missing,
        }
        for task, change in differences.items()
    }


def _changes_table(summary: RunSummary) -> Table:
    """One row per stage and evaluated task, then the whole run."""
    table = _table(f"Run {summary.name}")
    table.caption = "Held-out prompts. Intervals: paired bootstrap over prompts, not over training seeds."
    table.add_column("stage", min_width=10, max_width=16, overflow="fold")
    for header in ("steps", "time", "reward"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("task", no_wrap=True)
    for header in ("before", "after", "difference (95 %)", "prompts"):
        table.add_column(header, justify="right", no_wrap=True)
    for stage in summary.stages:
        head = (stage.name, str(stage.steps), duration(stage.seconds), _number(stage.reward_mean))
        _add_rows(table, head, stage.evaluations)
        table.add_section()
    if summary.total:
        steps = sum(stage.steps for stage in summary.stages)
        _add_rows(table, ("whole run", str(steps), duration(summary.seconds), ""), summary.total)
    return table


def _add_rows(table: Table, head: tuple[str, ...], evaluations: Mapping[str, Difference]) -> None:
    """The rows of one stage; what belongs to the stage stands in its first row only."""
    cells = [Text(cell) for cell in head]
    if not evaluations:
        table.add_row(*cells, "-")
    for task, change in evaluations.items():
        interval = "" if change.low is None else f" [{_number(change.low, '+')}, {_number(change.high, '+')}]"
        prompts = f"{change.n}/{change.n + change.missing}" if change.missing else f"{change.n}"
        table.add_row(
            *cells,
            Text(task),
            _number(change.before),
            _number(change.after),
            Text(_number(change.mean, "+") + interval),
            prompts,
        )
        cells = [Text("") for _ in head]


def _guidance_table(points: Mapping[str, tuple[GuidancePoint, ...]]) -> Table:
    """The base's evaluation by guidance scale, one row per task."""
    scales = sorted({point.guidance_scale for row in points.values() for point in row})
    table = _table("Base model by guidance scale")
    table.add_column("task", no_wrap=True)
    for scale in scales:
        table.add_column(f"{scale:g}", justify="right")
    for task, row in points.items():
        means = {point.guidance_scale: point.mean for point in row}
        table.add_row(Text(task), *(_number(means.get(scale)) for scale in scales))
    return table


def _table(title: str) -> Table:
    return Table(
        title=Text(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        min_width=len(title),
    )


def _number(value: float | None, sign: str = "") -> str:
    """Three decimals, four digits from 100 on, so that rewards on any scale keep the table narrow."""
    if value is None:
        return "-"
    return f"{value:{sign}.3f}" if abs(value) < 100 else f"{value:{sign}.4g}"
