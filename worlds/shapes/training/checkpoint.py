"""Checkpoints of a training run of the shapes world: whole or absent, see `core/files.py`."""

import json
from pathlib import Path
from typing import Any

import torch

from core.checkpoints import prune
from core.files import COMPLETE, atomic_write_json, new_folder


def save_checkpoint(folder: str | Path, step: int, state: dict[str, Any], recipe: dict, *, keep: int) -> None:
    """Write `folder/step-NNNNNN` and delete all but the newest `keep`.

    `state` holds tensors, numbers, strings, lists and dicts only: it is read back with `weights_only=True`.
    An older checkpoint goes only when the new one is complete.
    """
    with new_folder(Path(folder) / f"step-{step:06d}") as final:
        torch.save(state, final / "state.pt")
        atomic_write_json(final / "recipe.json", recipe)
    prune(Path(folder), step, keep=keep)


def load_checkpoint(path: str | Path) -> tuple[dict[str, Any], dict]:
    """(state, recipe) of one checkpoint. Raises FileNotFoundError for one that was never completed."""
    path = Path(path)
    if not (path / COMPLETE).is_file():
        raise FileNotFoundError(f"{path}: not a complete checkpoint (no {COMPLETE} file); use an earlier one")
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    return state, json.loads((path / "recipe.json").read_text(encoding="utf-8"))
