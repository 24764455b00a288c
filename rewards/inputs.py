"""What a reward's scores depend on beside its keys: its code, and the files that its parameters name."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import recipes
from core.files import file_sha256
from core.inputs import PACKAGES, folder_files, hash_files, hash_together
from rewards.base import RewardLoadError, RewardSpec
from rewards.loading import BUILTIN_REWARDS, free_params


def code_name(spec: RewardSpec) -> str:
    """What the identity of a reward's code is called, wherever the reward runs."""
    return f"code of reward {spec.name}"


def reward_inputs(spec: RewardSpec) -> dict[str, str]:
    """Name -> sha256. Of code: a `.py` file alone, or every Python file of the package that an import path begins with;
    a built-in reward is part of this package. A served reward has its code and files where it is served, and what it
    says of them is known when it answers."""
    if spec.service is not None:
        return {}
    files = {}
    for value in _texts({key: v for key, v in spec.params.items() if key not in free_params(spec.name)}):
        path = recipes.resolve(value)
        if path.is_file():
            files[f"{value} of reward {spec.name}"] = path
        elif "/" in value and path.is_dir():
            files |= folder_files(f"{value} of reward {spec.name}: ", value)
    return _code(spec) | hash_files(files)


def all_reward_inputs(specs: Iterable[RewardSpec]) -> dict[str, str]:
    """Those of many rewards, each read once: evaluation has most of training's again, and files may be gigabytes."""
    distinct: list[RewardSpec] = []
    for spec in specs:
        if spec.service is None and (spec.name, spec.params) not in [(s.name, s.params) for s in distinct]:
            distinct.append(spec)
    return {name: digest for spec in distinct for name, digest in reward_inputs(spec).items()}


def check_inputs(specs: Iterable[RewardSpec], held: Mapping[str, str]) -> None:
    """Raise RewardLoadError unless this node has what the run began with (`held`); what that does not name passes."""
    other = [name for name, digest in all_reward_inputs(specs).items() if held.get(name, digest) != digest]
    if other:
        raise RewardLoadError(
            f"{os.uname().nodename}: {', '.join(other)} is another than when the run began: put it back, or stop the "
            "run and resume it with --accept-changes"
        )


def _code(spec: RewardSpec) -> dict[str, str]:
    place = BUILTIN_REWARDS.get(spec.name, spec.name).rpartition(":")[0]
    if place.endswith(".py"):
        return {code_name(spec): file_sha256(Path(place).expanduser())}
    package = place.partition(".")[0]
    if package in PACKAGES:
        return {}
    found = importlib.util.find_spec(package)
    if found is not None and found.submodule_search_locations:
        roots = [Path(folder) for folder in found.submodule_search_locations]
        return {code_name(spec): hash_together((p for root in roots for p in root.rglob("*.py")), roots[0])}
    return {} if found is None or found.origin is None else {code_name(spec): file_sha256(found.origin)}


def _texts(value: Any) -> Iterator[str]:
    """Every text of a parameter that may name a file."""
    if isinstance(value, str) and 0 < len(value) < 4096 and "\n" not in value and "\0" not in value:
        yield value
    for child in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    ):
        yield from _texts(child)
