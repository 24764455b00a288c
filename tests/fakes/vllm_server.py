"""A real vLLM server on CPU, as its own process with a real port."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

START_TIMEOUT_S = 300.0


@contextlib.contextmanager
def vllm_server(model: Path, log: Path, *options: str, name: str = "tiny") -> Iterator[str]:
    """Serve the folder `model` under `name`; yields `http://127.0.0.1:PORT`. `log` gets the server's output.

    Raises RuntimeError with the end of the log when the server ends or is not up in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port), "--enforce-eager",
        "--dtype", "float32", "--max-model-len", "2048", "--limit-mm-per-prompt", '{"image":2,"video":0}', *options,
    ]  # fmt: skip
    # Ray's and pytest's variables stay out: vLLM would take this process for a worker of theirs.
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTEST_", "MASTER_", "LOCAL_RANK"))
    }
    environment = kept | {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
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
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=20).status_code == 200:
                return
        time.sleep(0.5)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
    raise RuntimeError(f"vLLM is not up (exit code {process.poll()}); the end of {log}:\n{tail}")
