"""How a proof runs a user's commands."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.accept.evidence import ROOT
from rl.record.summary import run_finished

START_S, STOP_S = 600.0, 120.0


def one_thread() -> dict[str, str]:
    """This environment for a command whose workers have a core each."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def train_once(recipe: str, folder: Path, *overrides: str, timeout_s: float) -> Path:
    """`python -m rl.train` into `folder`: what is left of it, nothing where it is finished. Returns the folder."""
    if not run_finished(folder):
        line = rl_line(recipe, folder, *overrides)
        resume = ["--resume", "auto"] if (folder / "metrics.jsonl").is_file() else []
        subprocess.run([*line, *resume], cwd=ROOT, env=one_thread(), check=True, timeout=timeout_s)
    return folder


def rl_line(recipe: str, folder: Path, *overrides: str) -> list[str]:
    """The command that trains a recipe into `folder`."""
    line = [sys.executable, "-m", "rl.train", recipe, f"output_dir={folder.parent}", f"name={folder.name}"]
    return [*line, *overrides]


@contextlib.contextmanager
def judge_endpoint(folder: Path, *options: str) -> Iterator[str]:
    """The exact verifier behind the judge's wire protocol, where GPT-4.1 would stand; yields its base URL."""
    ready = folder / "judge.url"
    ready.unlink(missing_ok=True)
    line = [sys.executable, "-m", "worlds.shapes.scoring.judge_endpoint", "--port-file", str(ready), *options]
    with process(line, ready):
        yield ready.read_text().strip()


@contextlib.contextmanager
def process(line: list[str], ready: Path) -> Iterator[None]:
    """A process that runs while the block does, once its ready file is there."""
    with subprocess.Popen(line, cwd=ROOT, env=one_thread()) as running:
        try:
            deadline = time.monotonic() + START_S
            while not ready.is_file():
                if running.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{' '.join(line)} is not ready (exit code {running.poll()})")
                time.sleep(0.5)
            yield
        finally:
            running.send_signal(signal.SIGTERM)
            running.wait(timeout=STOP_S)
