"""One HTTP server kept alive: started, watched, restarted, ended. The Ray actor around it holds its GPUs.

    driver ── poll ──► actor ── pipe ──► guard ──► the HTTP server ──► its engine, its tensor-parallel ranks
            state, log lines          (guard.py)

Ray gives the actor its cards (CUDA_VISIBLE_DEVICES), which all below it inherit.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

HEALTH_S = 5.0
UNHEALTHY_S = 60.0
STABLE_S = 600.0
LONGEST_BACKOFF_S = 30.0
END_S = 30.0
KEPT_LINES = 5000
TAIL_LINES = 30

OWN_VARIABLES = ("RAY_", "PYTEST_", "MASTER_", "LOCAL_RANK", "RANK", "WORLD_SIZE")
"""What Ray, a launcher or pytest set for this process; a server would take itself for a worker of theirs."""


AT_ARMS_LENGTH = ("/bin/sh", "-c", '"$@"; exit $?', "sh")
"""A shell between this process and the guard: Ray kills an actor's own children outright when the actor ends, and a
guard that is killed ends nothing. The guard sees the closed pipe all the same."""


class ReplicaError(RuntimeError):
    """A replica cannot be started where it was placed; the text names the node and the remedy."""


@dataclass(frozen=True)
class ReplicaPlan:
    """One server.

    index: its number. command: the server without its `--host` and `--port`; it answers 200 to GET /health once it is
    ready. folder: the model, which must be there on the node. host: address to listen on; port: 0 for a free one.
    environment: variables to set. start_timeout_s: seconds from the start of the process to its first good answer.
    max_restarts: in a row; a server that was up for `STABLE_S` starts counting anew.
    """

    index: int
    command: tuple[str, ...]
    folder: str
    host: str
    port: int
    environment: Mapping[str, str]
    start_timeout_s: float
    max_restarts: int


@dataclass(frozen=True)
class ReplicaStatus:
    """state: `starting`, `ready`, `restarting`, `silent` (its actor does not answer), `failed` (given up) or `stopped`.
    detail: why it is not ready.

    lines: of the server's log since the last status.
    """

    state: str
    url: str
    restarts: int
    detail: str
    lines: tuple[str, ...]


class Replica:
    """The actor's methods as a plain class. Every method returns at once; a thread does the waiting."""

    def __init__(self, plan: ReplicaPlan) -> None:
        self.plan = plan
        self.url = ""
        self._state, self._detail, self._restarts = "starting", "not started yet", 0
        self._been_ready = False
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="replica", daemon=True)

    def start(self, node: str) -> str:
        """Check the place and start the server; `node` is this machine's address. Returns the server's URL.

        Raises ReplicaError for a folder that is not there and a port that is taken.
        """
        if not Path(self.plan.folder).is_dir():
            raise ReplicaError(
                f"replica {self.plan.index}: no folder {self.plan.folder} on {node}; put the model where every node "
                "finds it"
            )
        port = _claim_port(self.plan, node)
        shown = node if self.plan.host in ("0.0.0.0", "::") else self.plan.host
        self.url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
        self._command = [*self.plan.command, "--host", self.plan.host, "--port", str(port)]
        self._thread.start()
        return self.url

    def status(self) -> ReplicaStatus:
        """How it is now, and what the server has written since the last call."""
        lines = []
        with contextlib.suppress(IndexError):
            while True:
                lines.append(self._lines.popleft())
        return ReplicaStatus(self._state, self.url, self._restarts, self._detail, tuple(lines))

    def stop(self) -> None:
        """End the server and everything below it; returns when it is gone."""
        self._leaving.set()
        if self._thread.is_alive():
            self._thread.join(2 * END_S)

    def _supervise(self) -> None:
        in_a_row = 0
        while True:
            began = time.monotonic()
            cause = self._run_once()
            if self._leaving.is_set():
                self._set("stopped", "")
                return
            in_a_row = 1 if time.monotonic() - began > STABLE_S else in_a_row + 1
            if not self._been_ready or in_a_row > self.plan.max_restarts:
                times = (
                    f", {self.plan.max_restarts} restarts in a row did not help" if self._been_ready else ""
                )
                tail = "\n".join(self._tail)
                self._set("failed", f"{cause}{times}; the end of its log:\n{tail}")
                return
            wait_s = min(2.0 ** (in_a_row - 1), LONGEST_BACKOFF_S)
            self._set(
                "restarting", f"{cause}; restart {in_a_row} of {self.plan.max_restarts} in {wait_s:g} s"
            )
            self._leaving.wait(wait_s)
            self._restarts += 1

    def _run_once(self) -> str:
        """One life of the server; why it ended."""
        process = self._launch()
        try:
            return self._watch(process)
        finally:
            self._end(process)

    def _watch(self, process: subprocess.Popen) -> str:
        """Returns when the server ended, did not get ready, stopped answering, or is no longer wanted."""
        began = answered = time.monotonic()
        ready = False
        while not self._leaving.is_set():
            if process.poll() is not None:
                return f"the server ended with code {process.returncode}"
            healthy, now = self._healthy(), time.monotonic()
            if healthy:
                answered = now
                if not ready:
                    ready = self._been_ready = True
                    self._set("ready", "")
            elif not ready and now - began > self.plan.start_timeout_s:
                return f"the server was not ready within start_timeout_s {self.plan.start_timeout_s:g}"
            elif ready and now - answered > UNHEALTHY_S:
                return f"the server's /health has failed for {UNHEALTHY_S:g} s"
            look_again = now + (2.0 if ready else 0.5)
            while time.monotonic() < look_again and process.poll() is None:
                if self._leaving.wait(0.05):
                    break
        return "stopped"

    def _launch(self) -> subprocess.Popen:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OWN_VARIABLES)}
        process = subprocess.Popen(
            [*AT_ARMS_LENGTH, sys.executable, "-m", "core.cluster.servers.guard", *self._command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=kept | _import_path() | dict(self.plan.environment),
            start_new_session=True,  # a Ctrl-C is for the driver alone
        )
        threading.Thread(target=self._read, args=(process,), daemon=True).start()
        return process

    def _read(self, process: subprocess.Popen) -> None:
        assert process.stdout is not None
        for raw in process.stdout:
            line = raw.decode(errors="replace").rstrip()
            self._lines.append(line)
            self._tail.append(line)

    def _end(self, process: subprocess.Popen) -> None:
        """Let the guard end the group. A guard that does not is killed, and its command with it."""
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=END_S)

    def _healthy(self) -> bool:
        try:
            # The body is left unread: one that does not end would hold up the watch.
            with httpx.stream("GET", f"{self.url}/health", timeout=HEALTH_S, trust_env=False) as answer:
                return answer.status_code == 200
        except httpx.HTTPError:
            return False

    def _set(self, state: str, detail: str) -> None:
        self._detail, self._state = detail, state


def _claim_port(plan: ReplicaPlan, node: str) -> int:
    """The port, free a moment ago. Raises ReplicaError."""
    family = socket.AF_INET6 if ":" in plan.host else socket.AF_INET
    try:
        with socket.create_server((plan.host, plan.port), family=family) as probe:
            return probe.getsockname()[1]
    except OSError as error:
        raise ReplicaError(
            f"replica {plan.index}: cannot listen on {plan.host} port {plan.port} of {node} ({error.strerror}); "
            "give another --port, or 0 for a free one"
        ) from error


def _import_path() -> dict[str, str]:
    """The guard is a module of this package, wherever the actor found that."""
    root = str(Path(__file__).resolve().parents[3])
    return {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}
