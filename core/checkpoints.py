"""Checkpoints of any training run: `run_dir/checkpoints/step_NNNNNNN`, each complete or absent.

They sort by number. Where a run continues from an older one, later ones go to `run_dir/abandoned/N/`: they belong to
steps that will be done again, and `--resume auto` must not come back to them.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from core.files import new_folder, verify_folder
from core.recipe import ConfigError

log = logging.getLogger(__name__)
CHECKPOINTS, BEST, ABANDONED = "checkpoints", "best", "abandoned"


class CheckpointError(ConfigError):
    """A checkpoint cannot be used; says which and why."""


def step_folders(folder: Path) -> dict[Path, int]:
    """The folders `step_N` or `step-N` with their numbers, fewest steps first."""
    named = ((path, re.fullmatch(r"step[-_](\d+)", path.name)) for path in folder.glob("step*"))
    found = {path: int(match[1]) for path, match in named if match and path.is_dir()}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def publish_step(folder: Path, step: int, fill: Callable[[Path], None], *, keep: int) -> Path:
    """Let `fill` write a folder, publish it as `folder/step_<n>`; only then the oldest but `keep` go."""
    final = folder / f"step_{step:07d}"
    with new_folder(final) as temporary:
        fill(temporary)
    prune(folder, step, keep=keep)
    return final


def prune(folder: Path, step: int, *, keep: int, spare: Collection[Path] = ()) -> None:
    """Delete all but `spare` and the last `keep` of those up to `step`, which was just written and so stays whatever
    else is."""
    for old in [path for path, number in step_folders(folder).items() if number <= step][:-keep]:
        if old not in spare:
            shutil.rmtree(old)


def find_step(run_dir: Path, resume: str | None, check: Callable[[Path], None]) -> Path | None:
    """The checkpoint to continue from; None to start afresh. `check` raises for one that another recipe wrote.

    Raises ConfigError for a run that exists and was not asked to continue, and CheckpointError as
    `resume_folder` does.
    """
    if resume is None:
        if (run_dir / "metrics.jsonl").exists():
            raise ConfigError([f"{run_dir} holds an earlier run; add --resume auto, or set another name="])
        return None
    found = resume_folder(run_dir, resume, step_folders(run_dir / CHECKPOINTS))
    if found is not None:
        check(found)
    return found


def resume_folder(run_dir: Path, resume: str, known: Mapping[Path, int]) -> Path | None:
    """The named folder, which must be sound, or with `auto` the sound one of `known` (path: steps) with most steps.

    None where there is none at all. Raises CheckpointError for a named one that is damaged, and where all are: to start
    afresh would write over what they may still be saved from.
    """
    if resume != "auto":
        if problems := verify_folder(resume):
            raise CheckpointError(problems)
        return Path(resume)
    damage = []
    for candidate in sorted(known, key=lambda path: known[path], reverse=True):
        problems = verify_folder(candidate)
        if not problems:
            return candidate
        log.warning("passing over a damaged checkpoint: %s", problems[0])
        damage.append(f"{problems[0]}{f' (and {len(problems) - 1} more)' if problems[1:] else ''}")
    if damage:
        remedy = "restore one of them, or move them away to start from step 0, or set another name="
        raise CheckpointError([f"no checkpoint of {run_dir} can be used; {remedy}", *damage])
    log.info("no checkpoint in %s: starting at step 0", run_dir / CHECKPOINTS)
    return None


def later_steps(folder: Path, step: int) -> list[Path]:
    """The folders `step_N` of more than `step` steps."""
    return [path for path, number in step_folders(folder).items() if number > step]


def set_aside(run_dir: Path, later: Sequence[Path], *, why: str = "of steps that will be done again") -> None:
    """Move what the run will do again, or can no longer use, to `run_dir/abandoned/N/`, the last one first."""
    if not later:
        return
    home = next(home for number in count(1) if not (home := run_dir / ABANDONED / f"{number}").exists())
    for path in reversed(later):
        target = home / path.relative_to(run_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(path, target)
        log.warning("%s is %s; it was moved to %s", path, why, target)


def check_same_keys(
    before: Mapping[str, Any], now: Mapping[str, Any], *, free: tuple[str, ...], when: str
) -> None:
    """Raise ConfigError naming each key that would change what is computed; those that begin with `free` may differ."""
    problems = [
        f"{key} was {before.get(key)!r} when {when} was written and is {now.get(key)!r} now; set it "
        "back, or start a new run under another name"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(free)
    ]
    if problems:
        raise ConfigError(problems)


def next_multiple(step: int, every: int) -> int:
    """The first multiple of `every` behind `step`."""
    return (step // every + 1) * every
