"""Checkpoints of a training run: each whole or absent, the newest kept."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from core.files import COMPLETE, publish_folder


def save_checkpoint(folder: str | Path, step: int, state: dict[str, Any], recipe: dict, *, keep: int) -> None:
    """Write `folder/step-NNNNNN` and delete all but the newest `keep`.

    `state` holds tensors, numbers, strings, lists and dicts only: it is read back with `weights_only=True`.
    """
    partial = Path(folder) / f".partial-{step:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    torch.save(state, partial / "state.pt")
    (partial / "recipe.json").write_text(json.dumps(recipe, indent=2, sort_keys=True), encoding="utf-8")
    publish_folder(partial, Path(folder) / f"step-{step:06d}")
    for old in complete_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def complete_checkpoints(folder: str | Path) -> list[Path]:
    """Finished checkpoints in `folder`, oldest first."""
    return sorted(path.parent for path in Path(folder).glob(f"step-*/{COMPLETE}"))


def load_checkpoint(path: str | Path) -> tuple[dict[str, Any], dict]:
    """(state, recipe) of one checkpoint. Raises FileNotFoundError for one that was never completed."""
    path = Path(path)
    if not (path / COMPLETE).is_file():
        raise FileNotFoundError(f"{path}: not a complete checkpoint (no {COMPLETE} file); use an earlier one")
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    return state, json.loads((path / "recipe.json").read_text(encoding="utf-8"))
