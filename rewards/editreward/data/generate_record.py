"""What a folder of shards was made with, and that one run at a time writes there."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.files import atomic_write_json
from core.recipe import ConfigError
from core.run_lock import hold_run

RECORD = "generation.json"


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keep other runs out, and clear away what a killed one left half-written. Raises ConfigError."""
    with hold_run(folder):
        for left in folder.glob(".*.tmp"):
            left.unlink()
        yield


def same_as_before(path: Path, record: dict[str, Any]) -> None:
    """Keep `record` at `path`, or compare it with the one there. Raises ConfigError with every difference.

    A record beside which nothing was written yet is of a run that never started, and replaced.
    """
    started = any(other != path and not other.name.startswith(".") for other in path.parent.iterdir())
    if not (started and path.is_file()):
        atomic_write_json(path, record)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(key for key in record.keys() | before.keys() if record.get(key) != before.get(key))
    if changed:
        raise ConfigError(
            [f"{path}: {key} was {before.get(key)}, is now {record.get(key)}" for key in changed]
            + ["go back to those values or choose another output: the results of both would be mixed"]
        )
