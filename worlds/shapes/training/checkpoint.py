"""Atomic checkpoints of a training run: written aside, renamed, and marked complete last."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

_MARKER = "COMPLETE"


def save_checkpoint(folder: str | Path, step: int, state: dict[str, Any], recipe: dict, *, keep: int) -> Path:
    """Write `folder/step-NNNNNN` and delete all but the newest `keep`.

    `state` holds tensors, numbers, strings, lists and dicts only: it is read back with `weights_only=True`.
    A crash at any point leaves either the whole new checkpoint or none of it.
    """
    folder = Path(folder)
    final = folder / f"step-{step:06d}"
    partial = folder / f".partial-{step:06d}"
    for stale in (partial, final):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    with open(partial / "state.pt", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    (partial / "recipe.json").write_text(json.dumps(recipe, indent=2, sort_keys=True), encoding="utf-8")
    os.replace(partial, final)
    with open(final / _MARKER, "w", encoding="utf-8") as file:
        file.write(f"{step}\n")
        file.flush()
        os.fsync(file.fileno())
    for old in complete_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def complete_checkpoints(folder: str | Path) -> list[Path]:
    """Finished checkpoints in `folder`, oldest first."""
    return sorted(path.parent for path in Path(folder).glob(f"step-*/{_MARKER}"))


def load_checkpoint(path: str | Path) -> tuple[dict[str, Any], dict]:
    """(state, recipe) of one checkpoint. Raises FileNotFoundError for one that was never completed."""
    path = Path(path)
    if not (path / _MARKER).is_file():
        raise FileNotFoundError(f"{path}: not a complete checkpoint (no {_MARKER} file); use an earlier one")
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    return state, json.loads((path / "recipe.json").read_text(encoding="utf-8"))
