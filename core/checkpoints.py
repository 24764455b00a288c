"""Checkpoints of a supervised training run: `run_dir/checkpoints/step_NNNNNNN`, each complete or absent."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from core.files import publish_folder, verify_folder
from core.recipe import ConfigError

log = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"


def publish_step(folder: Path, step: int, fill: Callable[[Path], None], *, keep: int) -> Path:
    """Let `fill` write a folder, publish it as `folder/step_<n>`; only then the oldest but `keep` go."""
    final = folder / f"step_{step:07d}"
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    fill(temporary)
    publish_folder(temporary, final)
    for old in sorted(folder.glob("step_*"))[:-keep]:
        shutil.rmtree(old)
    return final


def find_step(run_dir: Path, resume: str | None, check: Callable[[Path], None]) -> Path | None:
    """The checkpoint to continue from; None to start afresh. `check` raises for one that another recipe wrote.

    Raises ConfigError for a run that exists and was not asked to continue, and for a folder that is damaged (with
    `auto` an older sound one is taken instead, since it continues to the same result).
    """
    if resume is None:
        if (run_dir / "metrics.jsonl").exists():
            raise ConfigError([f"{run_dir} holds an earlier run; add --resume auto, or set another name="])
        return None
    newest_first = sorted((run_dir / CHECKPOINTS).glob("step_*"), reverse=True)
    for candidate in newest_first if resume == "auto" else [Path(resume)]:
        problems = verify_folder(candidate)
        if not problems:
            check(candidate)
            return candidate
        if resume != "auto":
            raise ConfigError(problems)
        log.warning("passing over a damaged checkpoint: %s", problems[0])
    return None


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
