"""Recipes: YAML files that fully describe a run, packaged with the distribution together with what they name."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def is_packaged(path: str | Path) -> bool:
    """Whether `path` is relative and begins with `recipes/`: such files travel with the code to every node."""
    return not Path(path).is_absolute() and Path(path).parts[:1] == ("recipes",)


def resolve(path: str | Path) -> Path:
    """Where a path of a recipe is on this machine.

    `recipes/...` is looked up beside the installed package, so that it is found from any working directory and
    inside the copy that `ray job submit --working-dir` makes on each node. Others stay as they are.
    """
    return _ROOT / path if is_packaged(path) else Path(path).expanduser()
