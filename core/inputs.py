"""What a run's result depends on beside its recipe, by content: a resume must not go on with other data or weights
under the same names.

what                          its identity covers
----------------------------  -----------------------------------------------------------------------
prompts, pictures, weights    every byte, by sha256: 1.4 to 1.8 GB/s a core, files side by side
shards of training data       path, size and time of modification alone, since they may be terabytes
this package                  its version and every byte of its Python files
libraries                     their version
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import recipes
from core import PACKAGES, __version__
from core.failures import ClusterError
from core.files import file_sha256
from core.recipe import ConfigError

log = logging.getLogger(__name__)
LIBRARIES = ("deepspeed", "diffusers", "numpy", "peft", "pillow", "ray", "torch", "transformers")
_SHOWN = 12
_AT_ONCE = 8
"""Files that are hashed side by side."""


@dataclass(frozen=True)
class Inputs:
    """What a run reads, by name: a digest, or a version. A resume refuses others of `held`, which would mix two runs in
    one result, and names others of `told`."""

    held: dict[str, str] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Inputs:
        """Those in a run's `state.json`; empty where it is from before it held them."""
        return cls(**document.get("inputs", {}))


def compare_inputs(before: Inputs, now: Inputs, *, step: int, accept: bool) -> list[str]:
    """A line for each difference since `step`, also in the log. What is on one side alone is no more than told.

    Raises ConfigError where something held is another, unless the user accepts changes.
    """
    if not (before.held or before.told):
        log.warning(
            "the checkpoint of step %d does not say what its run read: changes cannot be noticed", step
        )
        return []
    refused = _differences(before.held, now.held, step)
    if refused and not accept:
        remedy = "put it back, or add --accept-changes to go on with what is there now (the checkpoints will say so)"
        raise ConfigError([f"{line}: {remedy}" for line in refused])
    lines = [f"{line}; accepted by --accept-changes" for line in refused]
    lines += _differences(before.told, now.told, step)
    lines += [f"{name}: new since step {step}" for name in _absent(now, before)]
    lines += [f"{name}: gone since step {step}" for name in _absent(before, now)]
    for line in lines:
        log.warning("%s", line)
    return lines


def _absent(here: Inputs, there: Inputs) -> list[str]:
    return sorted((here.held | here.told).keys() - (there.held | there.told).keys())


def _differences(before: Mapping[str, str], now: Mapping[str, str], step: int) -> list[str]:
    return [
        f"{name} changed since step {step}, from {before[name][:_SHOWN]} to {now[name][:_SHOWN]}"
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name]
    ]


def hash_files(files: Mapping[str, Path]) -> dict[str, str]:
    """Name -> sha256 of every byte."""
    with ThreadPoolExecutor(min(_AT_ONCE, os.cpu_count() or 1)) as pool:
        return dict(zip(files, pool.map(file_sha256, files.values()), strict=True))


def hash_together(files: Iterable[Path], root: Path) -> str:
    """One sha256 of the bytes of many files and of their names as seen from `root`, in whatever order they come."""
    digests = hash_files({os.path.relpath(path, root): path for path in files})
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def stamp_files(files: Iterable[Path]) -> str:
    """One sha256 of paths, sizes and times of modification."""
    stamps = [[str(path), (status := path.stat()).st_size, status.st_mtime_ns] for path in sorted(files)]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()


def folder_files(name: str, folder: str | Path, parts: Sequence[str] = (".",)) -> dict[str, Path]:
    """`name/part/...` -> every file below these parts of a recipe's folder, hidden ones left out."""
    root = recipes.resolve(folder)
    return {
        f"{name}/{path.relative_to(root).as_posix()}": path
        for part in parts
        for path in sorted((root / part).rglob("*"))
        if path.is_file() and not any(piece.startswith(".") for piece in path.relative_to(root).parts)
    }


def check_files(
    held: Mapping[str, str], name: str, folder: str | Path, parts: Sequence[str] = (".",)
) -> None:
    """Raise ClusterError unless this node has what the driver has (`held`) in these parts of a folder; whatever the
    driver did not look at passes."""
    found = hash_files({key: path for key, path in folder_files(name, folder, parts).items() if key in held})
    other = [key for key, digest in found.items() if digest != held[key]]
    if other:
        raise ClusterError(
            f"{os.uname().nodename} has other bytes than the driver in {folder} ({', '.join(other)}): copy the same "
            "model to every node, or put it on a file system that all share"
        )


def software() -> dict[str, str]:
    """Versions of Python and the libraries that compute; of this package with the sha256 of its sources."""
    root = recipes.resolve("recipes").parent
    own = hash_together((path for package in PACKAGES for path in (root / package).rglob("*.py")), root)
    return {"python": platform.python_version(), "this package": f"{own[:_SHOWN]} ({__version__})"} | {
        library: importlib.metadata.version(library) for library in LIBRARIES
    }
