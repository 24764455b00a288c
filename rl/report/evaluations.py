"""Held-out scores over the run: means with intervals, and changes paired by prompt since before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.statistics import Difference, bootstrap_mean, paired_bootstrap
from rl.report.reading import Notes, Record, column, finite, number, read_object
from rl.report.runs import Run, reward_name


@dataclass(frozen=True)
class Scores:
    """Per-prompt scores (None: not scored) of one evaluation, `moment`. `name` is a task, or `task/label` for an
    independent reward (one of weight 0)."""

    name: str
    moment: str
    step: int
    guidance_scale: float
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Change:
    """The paired change of one score between two moments; `over` says which part of the run lies between."""

    over: str
    name: str
    difference: Difference


def read_scores(run: Run) -> list[Scores]:
    """All evaluations of a run, by step; those that should be there and are not become notes."""
    found: list[Scores] = []
    for path in sorted((run.path / "evaluations").glob("*/*.json")):
        document = read_object(path, run.notes)
        if document is not None:
            found += _scores(document, path, independent_rewards(run.config), run.notes)
    present = {(scores.moment, scores.name) for scores in found}
    for moment in expected_moments(run):
        for task in _tasks(run.config):
            if (moment, task) not in present:
                run.notes.append(f"evaluations/{moment}/{task}.json is missing, so its scores are gaps")
    return sorted(found, key=lambda scores: (scores.step, scores.name))


def expected_moments(run: Run) -> list[str]:
    """`before`, and `after_<stage>` for each stage that the run has left behind."""
    done, moments = run.done, ["before"] if run.metrics else []
    names = [stage.name for stage in run.stages]
    for i, stage in enumerate(run.stages):
        later = any(name in done for name in names[i + 1 :])
        if done.get(stage.name) and (later or run.summary is not None):
            moments.append(f"after_{stage.name}")
    return moments


def independent_rewards(config: Record) -> dict[str, list[str]]:
    """Task -> labels of its evaluation's rewards of weight 0, which score without having a say in training."""
    labels: dict[str, list[str]] = {}
    for task in _evaluation_tasks(config):
        rewards = [reward for reward in task.get("rewards") or [] if isinstance(reward, dict)]
        labels[str(task.get("task"))] = [reward_name(r) for r in rewards if r.get("weight") == 0]
    return labels


def evaluation_curves(run: Run, scores: Sequence[Scores]) -> dict[str, list[dict[str, Any]]]:
    """Name -> points `{"step", "stage", "mean", "low", "high", "n", "change"}` in the order of steps.

    Means and intervals are those of metrics.jsonl where it has them, else of the per-prompt scores; `change` is
    the paired change since `before` as `[mean, low, high]`.
    """
    points: dict[str, dict[tuple[int, str], dict[str, Any]]] = {}
    for record in run.metrics:
        for name in _evaluated(record):
            stage = str(record.get("stage"))
            values = {key: number(record.get(f"evaluation/{name}/{key}")) for key in ("mean", "low", "high")}
            n = number(record.get(f"evaluation/{name}/num_prompts"))
            points.setdefault(name, {})[record["step"], stage] = {
                "step": record["step"], "stage": stage, **values, "n": n, "change": None
            }  # fmt: skip
    before = {s.name: s for s in scores if s.moment == "before"}
    for entry in scores:
        if entry.moment.startswith("before_guidance"):
            continue
        stage = stage_of(entry, run)
        point = points.setdefault(entry.name, {}).setdefault((entry.step, stage), {})
        if not point:
            point |= _point(entry, stage)
        first = before.get(entry.name)
        if first is not None and len(first.values) == len(entry.values):
            change = paired_bootstrap(first.values, entry.values)
            point["change"] = [number(change.mean), number(change.low), number(change.high)]
    return {
        name: [found[key] for key in sorted(found, key=lambda key: key[0])]
        for name, found in sorted(points.items())
    }


def changes(run: Run, scores: Sequence[Scores]) -> list[Change]:
    """Over each finished stage and over the whole run so far, by task and independent reward."""
    by_moment = {(s.moment, s.name): s for s in scores if not s.moment.startswith("before_guidance")}
    names = list(dict.fromkeys(s.name for s in scores))
    found: list[Change] = []
    earlier = "before"
    for stage in run.stages:
        moment = f"after_{stage.name}"
        for name in names:
            change = _change(
                f"stage {stage.name}", by_moment.get((earlier, name)), by_moment.get((moment, name))
            )
            found += [change] if change else []
        earlier = moment
    for name in names:
        last = [
            s for (moment, found_name), s in by_moment.items() if found_name == name and moment != "before"
        ]
        title = "whole run" if run.summary is not None else "so far"
        change = _change(title, by_moment.get(("before", name)), last[-1] if last else None)
        found += [change] if change else []
    return found


def base_guidance(scores: Sequence[Scores]) -> dict[str, list[dict[str, Any]]]:
    """Task -> the untrained model's mean at further guidance scales, which tells guidance from learning."""
    points: dict[str, list[dict[str, Any]]] = {}
    for entry in scores:
        if entry.moment.startswith("before_guidance"):
            mean = number(bootstrap_mean(entry.values, resamples=1).mean)
            points.setdefault(entry.name, []).append({"scale": entry.guidance_scale, "mean": mean})
    return points


def stage_of(scores: Scores, run: Run) -> str:
    """The stage a moment belongs to: that of its step's training record, `before` at step 0."""
    if scores.moment.startswith("after_"):
        return scores.moment.removeprefix("after_")
    stages = [str(r.get("stage")) for r in run.metrics if r["step"] == scores.step and "reward/mean" in r]
    return stages[-1] if stages else "before"


def _evaluated(record: Record) -> list[str]:
    """The tasks that a record of metrics.jsonl evaluated."""
    return [
        key.split("/")[1]
        for key in record
        if key.startswith("evaluation/") and key.endswith("/mean") and key.count("/") == 2
    ]


def _change(over: str, before: Scores | None, after: Scores | None) -> Change | None:
    if before is None or after is None or len(before.values) != len(after.values):
        return None
    return Change(over, before.name, paired_bootstrap(before.values, after.values))


def _point(scores: Scores, stage: str) -> dict[str, Any]:
    estimate = bootstrap_mean(scores.values)
    return {
        "step": scores.step,
        "stage": stage,
        "mean": number(estimate.mean),
        "low": number(estimate.low),
        "high": number(estimate.high),
        "n": estimate.n,
        "change": None,
    }


def _scores(document: Record, path: Path, independent: dict[str, list[str]], notes: Notes) -> list[Scores]:
    """The scores of one file: the task's own, and one entry for each independent reward."""
    rewards, step = column(document.get("rewards")), document.get("step")
    if rewards is None or not isinstance(step, int):
        notes.append(f"evaluations/{path.parent.name}/{path.name} has no scores and is left out")
        return []
    task, moment, guidance = path.stem, path.parent.name, finite(document.get("guidance_scale")) or 0.0
    components = document.get("components")
    columns: dict[str, list[float | None] | None] = {task: rewards}
    for label in independent.get(task, []):
        columns[f"{task}/{label}"] = column(components.get(label)) if isinstance(components, dict) else None
    return [
        Scores(name, moment, step, guidance, tuple(values))
        for name, values in columns.items()
        if values is not None
    ]


def _evaluation_tasks(config: Record) -> list[Record]:
    evaluation = config.get("evaluation")
    tasks = evaluation.get("tasks") if isinstance(evaluation, dict) else None
    return [task for task in tasks if isinstance(task, dict)] if isinstance(tasks, list) else []


def _tasks(config: Record) -> list[str]:
    return [str(task.get("task")) for task in _evaluation_tasks(config)]
