"""Real vLLM servers on CPU, processes of their own with a real port: plain, and as this project deploys EditReward."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.fakes.forked_workers import WorkerServer

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 500.0
ONE_PROCESS_LESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""vLLM's engine core runs the model itself, instead of in a worker."""
API_SERVER = "vllm.entrypoints.openai.api_server"
PRELOADED = (API_SERVER, "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker")
"""For the process that servers and their engine cores are forked from."""


@contextlib.contextmanager
def vllm_server(
    model: Path, log: Path, forks: WorkerServer, *options: str, name: str = "tiny"
) -> Iterator[str]:
    """Serve the folder `model` under `name`; yields `http://127.0.0.1:PORT`. `log` gets the server's output.

    Raises RuntimeError with the end of the log when the server ends or is not up in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", API_SERVER, "--model", str(model),
        "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port), "--enforce-eager",
        "--dtype", "float32", "--max-model-len", "2048", "--limit-mm-per-prompt", '{"image":2,"video":0}', *options,
    ]  # fmt: skip
    # Ray's and pytest's variables stay out: vLLM would take this process for a worker of theirs.
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTEST_", "MASTER_", "LOCAL_RANK"))
    }
    environment = kept | {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment |= ONE_PROCESS_LESS | forks.commands(API_SERVER)
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=120)


def _wait(process: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with httpx.Client(timeout=20) as client:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if client.get(url).status_code == 200:
                    return
            time.sleep(0.5)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
    raise RuntimeError(f"vLLM is not up (exit code {process.poll()}); the end of {log}:\n{tail}")


class Serving:
    """`python -m rewards.editreward serve`: the model `folder` at `url`; `place` gets the log and the ready file."""

    def __init__(self, folder: Path, place: Path, forks: WorkerServer) -> None:
        self.ready, self.log = place / "ready.json", place / "serve.log"
        words = ["--port", "0", "--ready-file", str(self.ready), "--start-timeout-s", str(START_TIMEOUT_S)]
        command = [sys.executable, "-m", "rewards.editreward", "serve", str(folder), *words]
        with open(self.log, "wb") as output:
            environment = os.environ | ONE_PROCESS_LESS | forks.commands(API_SERVER)
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment
            )
        wait_for(lambda: self.ready.is_file() or self.process.poll() is not None, START_TIMEOUT_S)
        assert self.ready.is_file(), self.log.read_text()[-3000:]
        (self.url,) = json.loads(self.ready.read_text())["urls"]

    def below(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill_server(self) -> None:
        """End vLLM's HTTP server outright."""
        for server in [
            child for child in self.below() if alive(child) and API_SERVER in child.cmdline()[2:3]
        ]:
            server.kill()

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
