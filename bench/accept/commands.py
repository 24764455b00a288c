"""How a proof runs a user's commands."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from bench.accept.evidence import ROOT

START_S, STOP_S = 600.0, 120.0


def one_thread() -> dict[str, str]:
    """This environment for a command whose workers have a core each."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


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
