"""Ray workers forked from a process that has torch, diffusers and DeepSpeed loaded, instead of started anew.

A worker of a learner or a rollout spends six seconds of processor time on imports; a run at tiny size has three such
workers, and the suite some sixty runs. Ray lets a job name its Python (`runtime_env["py_executable"]`); here that is
this file, which hands the worker's command line, environment and standard streams to a server and waits until the
worker has ended. The server forks, and the fork runs Ray's own worker script: from there on everything is Ray's. It is
a process of its own, may be killed and is restarted as always.

Before a worker Ray starts another Python, which imports ray for half a second only to read the runtime environment and
to replace itself by the job's Python. A Ray that is started under `WorkerServer.shortened` does both here in one.

The server must not import ray, which reads its settings from the environment once.
"""

import array
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = ("deepspeed", "models.text", "rollout.engine", "rl.learner.learner")
START_TIMEOUT_S = 240.0
LOOK_S = 5.0
CONTEXT, LANGUAGE = "--serialized-runtime-env-context=", "--language="
"""What Ray tells its `setup_worker.py`."""
_STREAMS = 3


class WorkerServer:
    """The process that workers are forked from. `python` is for `ray.init(runtime_env={"py_executable": ...})`.

    Best started after Ray, which gives itself 30 s for its own start; workers wait for it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "workers"
        self.python = f"{sys.executable} -S -E {__file__} {self._path}"
        self._process: subprocess.Popen[bytes] | None = None

    def environment(self) -> dict[str, str]:
        """For a command whose Ray, its own or a joined one, is to have forked workers: Ray's way to give a job its
        runtime environment from outside."""
        return {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"py_executable": self.python}})}

    @contextmanager
    def shortened(self) -> Iterator[None]:
        """A Ray that is started in this block has this file in the place of Ray's `setup_worker.py`."""
        from ray._private import ray_constants

        kept, ray_constants.SETUP_WORKER_FILENAME = ray_constants.SETUP_WORKER_FILENAME, __file__
        try:
            yield
        finally:
            ray_constants.SETUP_WORKER_FILENAME = kept

    def start(self) -> None:
        """Once: a second call does nothing."""
        if self._process is not None:
            return
        command = [sys.executable, __file__, "serve", str(self._path), str(os.getpid())]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def serve(path: str, parent: int) -> None:
    """Fork a worker for each connection, as long as the process `parent` is this one's."""
    for name in PRELOADED:
        importlib.import_module(name)
    assert "ray" not in sys.modules, "forked workers would keep the server's settings of Ray"
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(64)
        server.settimeout(LOOK_S)
        while os.getppid() == parent:
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            head, streams, *_ = socket.recv_fds(connection, 8, _STREAMS)
            with connection.makefile("rb") as file:
                request = json.loads(file.read(int.from_bytes(head, "big")))
            if os.fork() == 0:
                # The connection stays open in the worker alone, and so ends with it.
                server.close()
                become(request, streams)
            connection.close()
            for stream in streams:
                os.close(stream)


def become(request: dict[str, Any], streams: list[int]) -> None:
    """Run the worker script that was asked for in this process, and end it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgrp()  # Ray ends the process group of a worker, which must not be that of the tests
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["arguments"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def ask(path: str, arguments: list[str]) -> None:
    """Stand for a worker: have it forked, and return when it has ended."""
    request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    body = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                connection.connect(path)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        streams = array.array("i", range(_STREAMS))
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)
        connection.sendmsg([len(body).to_bytes(8, "big")], [rights])
        connection.sendall(body)
        connection.recv(1)


def set_up(words: list[str]) -> None:
    """What Ray's `setup_worker.py` does; by that itself for jobs whose Python is another one than this file."""
    (text,) = [word.removeprefix(CONTEXT) for word in words if word.startswith(CONTEXT)] or ["{}"]
    context = json.loads(text)
    python = (context.get("py_executable") or "").split()
    if __file__ not in python:
        os.execv(sys.executable, [sys.executable, str(Path(words[0]).with_name("setup_worker.py")), *words])
    os.environ.update(context["env_vars"])
    ask(python[-1], [word for word in words if not word.startswith((CONTEXT, LANGUAGE))])


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], int(sys.argv[3]))
    elif any(word.startswith(LANGUAGE) for word in sys.argv):
        set_up(sys.argv[1:])
    else:
        ask(sys.argv[1], sys.argv[2:])
