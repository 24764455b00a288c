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
WIDEST = 120
"""Columns that the printed tables take at most."""
_FIGURES = 60
"""Of which figures and the spaces between them take so many, and a task's name the rest."""


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


def print_summary(
    summary: RunSummary, folder: Path, *, file: TextIO | None = None, width: int | None = None
) -> None:
    """Print what the run in `folder` came to, and the commands that look at it and draw with it.

    file: standard output by default. width: columns, by default the terminal's, at most `WIDEST`.
    """
    console = Console(file=file, width=width, highlight=False)
    console.width = min(console.width, WIDEST)
    console.print(Text(f"Run {summary.name}: held-out prompts, before and after"))
    labels = [task for changes in _all_evaluations(summary) for task in changes]
    room = min(max([len(label) for label in labels], default=4), console.width - _FIGURES)
    for heading, changes in _blocks(summary):
        console.print(Text(f"\n{heading}"))
        if changes:
            console.print(_changes_table(changes, room))
    if labels:
        console.print(Text("\nIntervals (95 %): paired bootstrap over prompts, not over training seeds."))
    if summary.base_guidance:
        console.print(Text("\nBase model by guidance scale"), _guidance_table(summary.base_guidance))
    console.print()
    for line in _last_lines(summary, folder):
        console.print(Text(line), soft_wrap=True)


def _all_evaluations(summary: RunSummary) -> list[Mapping[str, Difference]]:
    return [*(stage.evaluations for stage in summary.stages), summary.total]


def _blocks(summary: RunSummary) -> list[tuple[str, Mapping[str, Difference]]]:
    """A heading and what was evaluated, for each stage and the whole run."""
    blocks = []
    for stage in summary.stages:
        unscored = f", {stage.missing_share:.1%} of its samples not scored" if stage.missing_share else ""
        heading = (
            f"stage {stage.name} ({stage.task}): {stage.steps} steps in {duration(stage.seconds)}, training reward "
            f"{_number(stage.reward_mean)} in the last{unscored}"
        )
        blocks.append((heading, stage.evaluations))
    if summary.total:
        steps = sum(stage.steps for stage in summary.stages)
        blocks.append((f"whole run: {steps} steps in {duration(summary.seconds)}", summary.total))
    return blocks


def _last_lines(summary: RunSummary, folder: Path) -> list[str]:
    learner = _restarts(summary.learner_restarts, "learner") if summary.learner_restarts else ""
    commit = f", commit {summary.commit[:12]}" if summary.commit else ""
    best = [f"best checkpoint: {summary.best}"] if summary.best is not None else []
    return [
        *best,
        f"results: {folder}",
        f"look:    python -m rl.report {folder}",
        f"draw:    python -m models.generate --adapter {folder / 'adapter'}",
        f"publish: python -m rl.export {folder} NEW_FOLDER",
        f"{summary.images:,} images in {duration(summary.seconds)}, {_restarts(summary.restarts, 'worker')}"
        f"{learner}version {summary.version}{commit}",
    ]


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


def _changes_table(changes: Mapping[str, Difference], room: int) -> Table:
    """One row per evaluated task; `room`: columns for its name."""
    table = _table()
    table.add_column("task", width=room, overflow="fold")
    for header, columns in (("before", 7), ("after", 7), ("difference (95 %)", 26), ("prompts", 9)):
        table.add_column(header, justify="right", no_wrap=True, width=columns)
    for task, change in changes.items():
        interval = "" if change.low is None else f" [{_number(change.low, '+')}, {_number(change.high, '+')}]"
        prompts = f"{change.n}/{change.n + change.missing}" if change.missing else f"{change.n}"
        table.add_row(
            Text(task), _number(change.before), _number(change.after), Text(_number(change.mean, "+") + interval),
            prompts,
        )  # fmt: skip
    return table


def _guidance_table(points: Mapping[str, tuple[GuidancePoint, ...]]) -> Table:
    """The base's evaluation by guidance scale, one row per task."""
    scales = sorted({point.guidance_scale for row in points.values() for point in row})
    table = _table()
    table.add_column("task", no_wrap=True)
    for scale in scales:
        table.add_column(f"{scale:g}", justify="right")
    for task, row in points.items():
        means = {point.guidance_scale: point.mean for point in row}
        table.add_row(Text(task), *(_number(means.get(scale)) for scale in scales))
    return table


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)


def _number(value: float | None, sign: str = "") -> str:
    """Three decimals, four digits from 100 on, so that rewards on any scale keep the table narrow."""
    if value is None:
        return "-"
    return f"{value:{sign}.3f}" if abs(value) < 100 else f"{value:{sign}.4g}"
