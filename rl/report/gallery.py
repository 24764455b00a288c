"""The same fixed prompts over the steps of a run, and the best and the worst group of its steps."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rl.record.groups import GROUPS_FILE, GROUPS_FOLDER, GroupRecord, best_and_worst, picture_path
from rl.report.pictures import Shelf, cut_grid
from rl.report.reading import column, number, read_lines, thinned
from rl.report.runs import Run

MOST_GROUP_STEPS, MOST_FLAT = 400, 50
_NO_SPREAD = 1e-12  # as in rl.loop.advantages


def gallery(run: Run, shelf: Shelf, budget: int) -> dict[str, Any]:
    """Task -> `{"samples": [{"prompt", "seed"}], "frames": [{"step", "stage", "cells"}]}` within `budget` characters.

    `cells` has one entry a sample, `[picture, reference, reward]` or None where that step lacks the sample. Where
    the pictures of all steps would take more than the budget, an even choice of the steps is kept, with a note.
    """
    grids = {
        folder.name: sorted(folder.glob("step_*.png"), key=_step)
        for folder in sorted((run.path / "samples").glob("*/"))
        if folder.is_dir()
    }
    if not any(grids.values()):
        run.notes.append("samples/ has no grids, so there is no gallery")
    tasks = {}
    for task, paths in grids.items():
        kept = _that_fit(paths, budget // len(grids), run)
        samples: dict[tuple[str, str], int] = {}
        frames = []
        for path in kept:
            found = cut_grid(path, shelf, run.notes)
            if found is None:
                continue
            cells = {}
            for cut in found[1]:
                place = samples.setdefault((cut.prompt, cut.seed), len(samples))
                cells[place] = [cut.picture, cut.reference, cut.reward]
            frames.append((_step(path), str(found[0].get("stage", "")), cells))
        if frames:
            tasks[task] = {
                "samples": [{"prompt": prompt, "seed": seed} for prompt, seed in samples],
                "frames": [
                    {"step": step, "stage": stage, "cells": [cells.get(i) for i in range(len(samples))]}
                    for step, stage, cells in frames
                ],
            }
    return tasks


def read_groups(run: Run) -> list[GroupRecord]:
    """Every group on record; what is none becomes a note."""
    if not (run.path / GROUPS_FILE).is_file():
        run.notes.append(f"{GROUPS_FILE} is missing, so the best and the worst groups are not known")
        return []
    records = []
    for line in read_lines(run.path / GROUPS_FILE, run.notes):
        record = _record(line)
        if record is None:
            run.notes.append(f"{GROUPS_FILE}: a record of step {line['step']} is not a group and left out")
        else:
            records.append(record)
    return records


def flat_prompts(records: list[GroupRecord]) -> dict[str, Any]:
    """Prompts that were scored and never had spread, so that nothing was ever learned from them: `{"count", "of",
    "shown": [{"stage", "prompt", "groups", "mean"}]}`, those drawn most often first."""
    drawn: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for record in records:
        rewards = _scored(record)
        if rewards:
            drawn[record.stage, record.prompt].append(rewards)
    flat = [(key, found) for key, found in drawn.items() if all(map(_is_flat, found))]
    flat.sort(key=lambda entry: (-len(entry[1]), entry[0]))
    return {
        "count": len(flat),
        "of": len(drawn),
        "shown": [
            {
                "stage": stage,
                "prompt": prompt,
                "groups": len(found),
                "mean": number(fmean(r[0] for r in found)),
            }
            for (stage, prompt), found in flat[:MOST_FLAT]
        ],
    }


def _scored(record: GroupRecord) -> list[float]:
    return [] if record.dropped else [reward for reward in record.rewards if reward is not None]


def _is_flat(rewards: list[float]) -> bool:
    return max(rewards) - min(rewards) <= _NO_SPREAD


def groups(run: Run, records: list[GroupRecord], shelf: Shelf, budget: int) -> list[dict[str, Any]]:
    """Per step `{"step", "stage", "groups", "equal", "best", "worst"}`: how many groups, how many without spread.

    Best and worst are by mean reward, as `{"group", "prompt", "mean", "rewards", "components", "pictures", ...}`;
    `pictures` is None where the run kept none.
    """
    by_step: dict[int, list[GroupRecord]] = defaultdict(list)
    for record in records:
        by_step[record.step].append(record)
    pictured = [path for path in sorted((run.path / GROUPS_FOLDER).glob("step_*.png"), key=_step)]
    kept_pictures = {path.name for path in _that_fit(pictured, budget, run)}
    steps = thinned(sorted(by_step), MOST_GROUP_STEPS)
    if len(steps) < len(by_step):
        run.notes.append(f"{len(steps)} of {len(by_step)} steps with groups are shown; {GROUPS_FILE} has all")
    return [_step_entry(step, by_step[step], run, shelf, kept_pictures) for step in steps]


def _step_entry(
    step: int, records: list[GroupRecord], run: Run, shelf: Shelf, kept_pictures: set[str]
) -> dict[str, Any]:
    ends = best_and_worst(records)
    entries = [_group_entry(record, run, shelf, kept_pictures) for record in ends]
    return {
        "step": step,
        "stage": records[0].stage,
        "groups": len(records),
        "equal": sum(_is_flat(rewards) for rewards in map(_scored, records) if rewards),
        "best": entries[0] if entries else None,
        "worst": entries[1] if len(entries) > 1 else None,
    }


def _group_entry(record: GroupRecord, run: Run, shelf: Shelf, kept_pictures: set[str]) -> dict[str, Any]:
    path = picture_path(run.path, record.step, record.group)
    found = cut_grid(path, shelf, run.notes) if path.name in kept_pictures else None
    return {
        "group": record.group,
        "prompt": record.prompt,
        "mean": number(record.mean),
        "dropped": record.reason if record.dropped else "",
        "rewards": [number(reward) for reward in record.rewards],
        "components": {
            name: [number(value) for value in values] for name, values in record.components.items()
        },
        "pictures": [cut.picture for cut in found[1]] if found else None,
        "reference": found[1][0].reference if found and found[1] else None,
    }


def _record(line: dict[str, Any]) -> GroupRecord | None:
    """A group from its line, or None when a field is of another kind than the run writes."""
    rewards, components = column(line.get("rewards")), line.get("components")
    if rewards is None or not isinstance(line.get("group"), int) or not isinstance(components, dict):
        return None
    columns = {str(name): column(values) or [] for name, values in components.items()}
    if any(len(values) != len(rewards) for values in columns.values()):
        return None
    return GroupRecord(
        line["step"],
        str(line.get("stage")),
        line["group"],
        str(line.get("prompt")),
        rewards,
        columns,
        bool(line.get("dropped")),
        str(line.get("reason", "")),
    )


def _that_fit(paths: list[Path], budget: int, run: Run) -> list[Path]:
    """As many of the grids, evenly chosen, as `budget` characters hold, judged by what the last adds to the first."""
    if not paths:
        return []
    trial = Shelf()
    cut_grid(paths[0], trial, [])
    first = trial.size
    cut_grid(paths[-1], trial, [])
    kept = thinned(paths, max(2, 1 + (budget - first) // max(1, trial.size - first)))
    if len(kept) < len(paths):
        folder = paths[0].parent.relative_to(run.path).as_posix()
        run.notes.append(
            f"{len(kept)} of the {len(paths)} grids in {folder}/ are shown, to keep the page small"
        )
    return kept


def _step(path: Path) -> int:
    """`step_000010.png` and `step_000010_7.png` are of step 10; -1 for any other name."""
    part = path.stem.split("_")[1]
    return int(part) if part.isdigit() else -1
