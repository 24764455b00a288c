"""Whether a place that a run will write can be written, and has room for what the run will keep there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


def output_problems(named: str, folder: str | Path, needs: Mapping[str, float] | None = None) -> list[str]:
    """One sentence where nothing can be written to `folder`, or less is free there than needed; leaves nothing behind.

    named: how messages call the place, such as `output_dir='runs'`. needs: bytes by what they are for, what an earlier
    part of the run has left in the folder among them.
    """
    try:
        present = _present(folder)
        tempfile.TemporaryDirectory(dir=present).cleanup()
        free, needed = shutil.disk_usage(present).free, sum((needs or {}).values())
    except (OSError, ValueError) as error:
        return [f"{named} cannot be written: {error}; give another folder"]
    if free < needed and free + (held := _held(Path(folder).expanduser())) < needed:
        return [
            f"{named} has {_size(free)} free{f' beside {_size(held)} of its own' if held else ''}, and the run keeps "
            f"about {_size(needed)} ({_parts(needs or {})}); "
            "make room, keep fewer checkpoints, or give another folder"
        ]
    return []


def disk_line(folder: str | Path, needs: Mapping[str, float]) -> str:
    """What a run will keep on disk, and what is free there, for a plan."""
    try:
        free = _size(shutil.disk_usage(_present(folder)).free)
    except (OSError, ValueError):
        free = "an unknown amount"
    return f"disk: about {_size(sum(needs.values()))} ({_parts(needs)}), {free} free"


def _present(folder: str | Path) -> Path:
    """The folder, or its nearest parent that is there."""
    path = Path(folder).expanduser().absolute()
    with suppress(OSError):
        path.stat()  # raises ValueError, which `exists` takes for absence, for what no file system can hold
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _held(folder: Path) -> int:
    """Bytes of the files in the folder; some may go while it is looked at."""
    found = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            found += path.lstat().st_size
    return found


def _parts(needs: Mapping[str, float]) -> str:
    return ", ".join(f"{what} {_size(size)}" for what, size in needs.items())


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
