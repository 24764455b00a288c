"""What a run folder says about the run itself: its recipe, how far it is, and what it should have written by now."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from core.run_status import STATUS_FILE
from rewards.base import RewardSpec, reward_label
from rl.record.metrics import METRICS_FILE
from rl.record.summary import SUMMARY_FILE, BestCheckpoint
from rl.report.reading import Notes, Record, read_lines, read_object


@dataclass(frozen=True)
class PlannedStage:
    """A stage of the recipe; `steps` planned. `parts`: names of its curves, one a task."""

    name: str
    task: str
    steps: int
    rewards: tuple[str, ...]
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """A run folder. `label` tells it from the other runs of the page; `summary` is that of a finished run, `status`
    what the run last said of itself; `notes` grow while it is read."""

    path: Path
    label: str
    config: Record
    stages: tuple[PlannedStage, ...]
    metrics: list[Record]
    summary: Record | None
    status: Record
    alarms: list[str]
    notes: Notes = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """The last step on record; 0 before training."""
        return max((record["step"] for record in self.metrics), default=0)

    @property
    def done(self) -> dict[str, int]:
        """Stage -> steps on record."""
        steps: dict[str, int] = {}
        for record in self.metrics:
            if "reward/mean" in record:
                steps[str(record.get("stage"))] = steps.get(str(record.get("stage")), 0) + 1
        return steps


def read_run(path: Path, label: str) -> Run:
    """Read a run folder. Raises FileNotFoundError when it is not one: it has neither a recipe nor metrics."""
    if not (path / "config.yaml").is_file() and not (path / METRICS_FILE).is_file():
        raise FileNotFoundError(
            f"{path} is no run folder: it has neither config.yaml nor {METRICS_FILE}; name the folder that "
            "`python -m rl.train` made (<output_dir>/<name>)"
        )
    notes: Notes = []
    config = _read_config(path / "config.yaml", notes)
    alarms, summary = path / "alarms.txt", read_object(path / SUMMARY_FILE, notes)
    notes += _best_checkpoint(summary)
    return Run(
        path=path,
        label=label,
        config=config,
        stages=tuple(_stages(config)),
        metrics=read_lines(path / METRICS_FILE, notes),
        summary=summary if summary is None or summary.get("finished", True) else None,
        status=read_object(path / STATUS_FILE, notes) or {},
        alarms=alarms.read_text(encoding="utf-8", errors="replace").splitlines() if alarms.is_file() else [],
        notes=notes,
    )


def run_labels(paths: list[Path]) -> list[str]:
    """A short name for each folder: its own, with as many of its parents as tell it from the others."""
    parts = [path.absolute().parts for path in paths]
    for depth in range(1, max(len(p) for p in parts) + 1):
        labels = ["/".join(p[-depth:]) for p in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{'/'.join(p[-1:])} ({i})" for i, p in enumerate(parts, start=1)]


def run_state(run: Run) -> str:
    """One line: finished, or how far it came, how it ended and how it goes on."""
    planned = sum(stage.steps for stage in run.stages)
    steps = f"{run.last_step} of {planned} steps" if planned else f"{run.last_step} steps"
    if run.summary is not None:
        return f"finished, {steps}"
    state, cause, command = (run.status.get(key) for key in ("state", "cause", "resume_command"))
    if state not in ("stopped", "failed"):
        return f"not finished, {steps}"
    return f"not finished, {steps}; {state} ({cause}), continue with: {command}"


def reward_name(reward: Any) -> str:
    """The label under which a reward of the recipe is logged."""
    if not isinstance(reward, dict):
        return "?"
    return reward_label(RewardSpec(str(reward.get("name", "?")), label=reward.get("label")))


def _best_checkpoint(summary: Record | None) -> list[str]:
    """A line for the best checkpoint of `checkpoint.keep_best`, if the summary, of whatever form, names one."""
    try:
        return [f"best checkpoint: {BestCheckpoint(**summary['best'])}"]  # type: ignore[index]
    except (KeyError, TypeError):
        return []


def _stages(config: Record) -> list[PlannedStage]:
    stages = config.get("stages")
    return [
        _stage(stage) for stage in (stages if isinstance(stages, list) else []) if isinstance(stage, dict)
    ]


def _stage(stage: Record) -> PlannedStage:
    name, listed = str(stage.get("name", "?")), stage.get("parts")
    parts = [part for part in listed if isinstance(part, dict)] if isinstance(listed, list) else []
    rewards = [reward for part in parts or [stage] for reward in part.get("rewards") or []]
    return PlannedStage(
        name,
        str(stage.get("task", "?")),
        stage["steps"] if isinstance(stage.get("steps"), int) else 0,
        tuple(map(reward_name, rewards)),
        tuple(f"{name}.{part.get('task', '?')}" for part in parts) or (name,),
    )


def _read_config(path: Path, notes: Notes) -> Record:
    if not path.is_file():
        notes.append("config.yaml is missing, so the plan of the run is not known")
        return {}
    try:
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # whatever YAML, its encoding or OmegaConf find wrong with a damaged file
        notes.append(f"config.yaml cannot be read ({' '.join(str(error).split())})")
        return {}
    return {str(key): value for key, value in config.items()} if isinstance(config, dict) else {}
