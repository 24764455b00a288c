"""Where proofs are written, and what makes a figure traceable: commit, cores, versions."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from core.statistics import Difference, Estimate

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "evidence"
IMAGES = ROOT / "docs" / "images"


@dataclass(frozen=True)
class Claim:
    """One part of what has to be shown."""

    text: str
    measured: str
    holds: bool


def claims_table(claims: Iterable[Claim]) -> list[str]:
    """Markdown: a row for each claim."""
    rows = (f"| {c.text} | {c.measured} | {'yes' if c.holds else '**no**'} |" for c in claims)
    return ["| part | measured | holds |", "|---|---|---|", *rows]


def commit() -> str:
    """The checkout's commit, marked `+changes` when tracked files differ from it, those apart that proofs write."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    outputs = (":!docs/evidence", ":!docs/images")
    return git("rev-parse", "HEAD") + (
        "+changes" if git("status", "--porcelain", "--untracked-files=no", "--", ".", *outputs) else ""
    )


def write(name: str, title: str, body: list[str], data: dict[str, Any]) -> Path:
    """`docs/evidence/<name>.md` for people and `<name>.json` for programs; returns the first."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    hardware = f"{os.cpu_count()} CPU cores, no GPU, Python {platform.python_version()}"
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "ray", "deepspeed", "diffusers"))
    # Once: the first file that is written is itself a change.
    made_at = commit()
    head = [f"# {title}", "", f"Commit {made_at}; {hardware}; {packages}.", ""]
    path = FOLDER / f"{name}.md"
    path.write_text("\n".join([*head, *body]) + "\n")
    (FOLDER / f"{name}.json").write_text(
        json.dumps({"commit": made_at, "hardware": hardware, **data}, indent=2) + "\n"
    )
    return path


def conclude(name: str, title: str, body: list[str], data: dict[str, Any], *, holds: bool) -> None:
    """Write the evidence and print it; exits 1 where the proof does not hold."""
    sys.stdout.write(write(name, title, body, data).read_text())
    if not holds:
        sys.exit(1)


def interval(value: Estimate | Difference, *, signed: bool = False) -> str:
    """`mean [low, high]`, with signs where it is a difference; `-` for what could not be measured."""
    form = "+.3f" if signed else ".3f"
    numbers = (format(x, form) if x is not None else "-" for x in (value.mean, value.low, value.high))
    return "{} [{}, {}]".format(*numbers)


def above(value: float | None, bound: float = 0.0) -> bool:
    """Whether a figure was measured and lies above a bound."""
    return value is not None and value > bound


class Clock:
    """Seconds of a proof's parts, also of a part that was broken off, in a file that a continued proof adds to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is done inside to the part `name`."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.seconds, indent=2) + "\n")

    def minutes(self) -> str:
        """All parts in one line."""
        return ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in self.seconds.items())
