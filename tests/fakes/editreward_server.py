"""The command `python -m rewards.editreward serve` with a real vLLM on CPU, as a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 500.0


class Serving:
    """Serves the model `folder`; `url` is where. `place` gets its log and its ready file."""

    def __init__(self, folder: Path, place: Path) -> None:
        self.ready, self.log = place / "ready.json", place / "serve.log"
        words = ["--port", "0", "--ready-file", str(self.ready), "--start-timeout-s", str(LIMIT_S)]
        command = [sys.executable, "-m", "rewards.editreward", "serve", str(folder), *words]
        with open(self.log, "wb") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        wait_for(lambda: self.ready.is_file() or self.process.poll() is not None, LIMIT_S)
        assert self.ready.is_file(), self.log.read_text()[-3000:]
        (self.url,) = json.loads(self.ready.read_text())["urls"]

    def below(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill_server(self) -> None:
        """End vLLM's HTTP server outright."""
        for child in self.below():
            if "vllm.entrypoints.openai.api_server" in child.cmdline()[2:3]:
                child.kill()

    def stop(self) -> None:
        """SIGTERM, and everything below the command is to end with it."""
        below = self.below()
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(120) == 0
            wait_for(lambda: not any(alive(child) for child in below), 120)
            assert not self.ready.exists()
        finally:
            self.process.kill()


def wait_for(condition: Callable[[], Any], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
