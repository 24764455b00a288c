"""`unipic-rl doctor [RECIPE [key=value ...]]`: what this machine has, and what keeps a recipe from running on it."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.recipe import ConfigError
from rl.recipe.schema import RunConfig, load_config

NEEDED = ("torch", "ray", "deepspeed", "diffusers", "transformers", "peft")
EXTRAS = {
    "openai": "judge", "fastapi": "serve", "vllm": "vllm", "mmdet": "geneval", "pyarrow": "tables", "gradio": "page",
}  # fmt: skip
"""Package -> the extra that brings it."""
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_GB = 4.0
"""Below it Ray keeps its objects in /tmp, and NCCL may not start."""
PORTS = {6379: "Ray's head", 8265: "Ray's dashboard and jobs"}


@dataclass(frozen=True)
class Finding:
    """One line. `remedy`: the command or step that mends it, "" where nothing is wrong; `fatal`: nothing runs so."""

    what: str
    remedy: str = ""
    fatal: bool = False

    def __str__(self) -> str:
        mark = "ok  " if not self.remedy else "FAIL" if self.fatal else "note"
        return f"{mark}  {self.what}" + (f": {self.remedy}" if self.remedy else "")


def main(argv: Sequence[str] | None = None) -> int:
    """0 where everything asked for can run, 1 where something is missing."""
    parser = argparse.ArgumentParser(
        prog="unipic-rl doctor", description="What this machine has, and what a recipe lacks on it."
    )
    parser.add_argument(
        "recipe", nargs="?", help="a recipe of rl.train; without one the machine alone is looked at"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(argv)
    findings = [*_software(), *_machine(), *_cards(), *_ray()]
    if options.recipe:
        findings += _recipe(options.recipe, options.overrides)
    sys.stdout.write("".join(f"{finding}\n" for finding in findings))
    return int(any(finding.fatal for finding in findings))


def _software() -> Iterator[Finding]:
    yield Finding(f"Python {platform.python_version()} at {sys.executable}")
    for name in NEEDED:
        version = _version(name)
        yield (
            Finding(f"{name} {version}")
            if version
            else Finding(f"{name} is missing", "make setup", fatal=True)
        )
    for name, extra in EXTRAS.items():
        version = _version(name)
        remedy = (
            "" if version else f"only the extra {extra!r} needs it: pip install -e '.[{extra}]' in a checkout"
        )
        yield Finding(f"{name} {version or 'is missing'}", remedy)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # vLLM's build for CPUs has another name
        return "of another name" if importlib.util.find_spec(name) else None


def _machine() -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    yield Finding(f"{os.cpu_count()} CPUs, {memory:.0f} GB of memory")
    yield Finding(f"{shutil.disk_usage('.').free / 1e9:.0f} GB free in {Path.cwd()}")
    if SHARED_MEMORY.is_dir():
        size = shutil.disk_usage(SHARED_MEMORY).total / 1e9
        small = size < LEAST_SHARED_GB
        yield Finding(
            f"{size:.1f} GB of shared memory in {SHARED_MEMORY}",
            "Ray's objects go to disk and NCCL may not start; in a container: --shm-size=16g"
            if small
            else "",
        )


def _cards() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding(
            "no CUDA card", "recipes need resources.device=cpu here; a driver is looked at by nvidia-smi"
        )
        return
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        yield Finding(f"card {number}: {card.name}, {card.total_memory / 2**30:.0f} GiB")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    yield Finding(f"CUDA {torch.version.cuda}, NCCL {nccl}, bfloat16 {torch.cuda.is_bf16_supported()}")


def _ray() -> Iterator[Finding]:
    address = os.environ.get("RAY_ADDRESS", "")
    if address:
        host, _, number = address.rpartition("//")[2].partition(":")
        known = _answers(host, int(number)) if number.isdigit() else True
        remedy = (
            "" if known else "nothing listens there: ray start --head, or unset RAY_ADDRESS to start one here"
        )
        yield Finding(f"RAY_ADDRESS={address}", remedy, fatal=not known)
    else:
        yield Finding("RAY_ADDRESS is not set: a run starts a Ray on this machine alone")
    for port, whose in PORTS.items():
        taken = _answers("127.0.0.1", port)
        yield Finding(f"port {port} ({whose}) is {'in use' if taken else 'free'}")


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=2):
            return True
    except OSError:
        return False


def _recipe(recipe: str, overrides: Sequence[str]) -> Iterator[Finding]:
    from rl.recipe.preflight import preflight

    try:
        config = load_config(recipe, overrides, defer_values=True)
    except ConfigError as error:
        yield from (Finding(recipe, problem, fatal=True) for problem in error.problems)
        return
    problems = preflight(config).problems + _room(config)
    yield from (Finding(recipe, problem, fatal=True) for problem in problems)
    if not problems:
        yield Finding(f"{recipe} can run here: python -m rl.train {' '.join([recipe, *overrides])}")


def _room(config: RunConfig) -> list[str]:
    """What the plan needs beyond this machine, unless it joins a cluster."""
    import torch

    from rl.recipe.placement import make_plan

    if os.environ.get("RAY_ADDRESS"):
        return []
    plan, cards = make_plan(config), torch.cuda.device_count()
    found = []
    if plan.gpus > cards:
        found.append(
            f"the plan needs {plan.gpus:g} GPUs and this machine has {cards}: join a cluster (RAY_ADDRESS)"
        )
    if plan.cpus > (os.cpu_count() or 1):
        found.append(
            f"the plan needs {plan.cpus:g} CPUs and this machine has {os.cpu_count()}: lower resources.*_cpus, or join "
            "a cluster (RAY_ADDRESS)"
        )
    return found
