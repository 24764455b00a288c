"""Processes forked from one that has torch, diffusers and DeepSpeed, or vLLM, loaded, instead of started anew.

A worker of a learner or a rollout spends six seconds of processor time on imports; a run at tiny size has three such
workers, and the suite some sixty runs. Ray lets a job name its Python (`runtime_env["py_executable"]`); here that is
this file, which hands the worker's command line, environment and open files to a server and waits until the worker has
ended. The server forks, and the fork runs Ray's own worker script: from there on everything is Ray's. It is a process
of its own, may be killed and is restarted as always; it ends when the one that stands for it is killed.

Commands that are named in `WorkerServer.commands()`, and the processes that they spawn, are forked where it is in their
environment: `forked_commands/sitecustomize.py` makes stand-ins of them before anything is imported. A stand-in hands on
no signal.

Before a worker Ray starts another Python, which imports ray for half a second only to read the runtime environment and
to replace itself by the job's Python. A Ray that is started under `WorkerServer.shortened` does both here in one.

The server of Ray's workers must not import ray, which reads its settings from the environment once.
"""

import array
import contextlib
import fcntl
import gc
import importlib
import itertools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(__file__).with_name("forked_commands")
SERVER, FORKED = "TESTS_FORK_SERVER", "TESTS_FORKED"
PRELOADED = ("deepspeed", "models.text", "rollout.engine", "rl.learner.learner")
START_TIMEOUT_S = 240.0
LOOK_S = 5.0
CONTEXT, LANGUAGE = "--serialized-runtime-env-context=", "--language="
"""What Ray tells its `setup_worker.py`."""
_MOST_FILES = 200
_ABOVE = 500
"""Descriptors of the server's own in a fork, above those that a process is started with."""


class WorkerServer:
    """The process that workers are forked from. `python` is for `ray.init(runtime_env={"py_executable": ...})`.

    Best started after Ray, which gives itself 30 s for its own start; workers wait for it.
    """

    def __init__(self, folder: Path, preloaded: Sequence[str] = PRELOADED) -> None:
        self._path, self._preloaded = folder / "workers", preloaded
        self.python = f"{sys.executable} -S -E {__file__} {self._path}"
        self._process: subprocess.Popen[bytes] | None = None

    def environment(self) -> dict[str, str]:
        """For a command whose Ray, its own or a joined one, is to have forked workers: Ray's way to give a job its
        runtime environment from outside."""
        return {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"py_executable": self.python}})}

    def commands(self, *forked: str) -> dict[str, str]:
        """For processes that are to be forked if they run one of these modules (`-m`) or programs (`-c`), and for what
        `multiprocessing` spawns."""
        path = os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")]))
        return {"PYTHONPATH": path, SERVER: str(self._path), FORKED: json.dumps(forked)}

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
        command = [sys.executable, __file__, "serve", str(self._path), str(os.getpid()), *self._preloaded]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def serve(path: str, parent: int, preloaded: Sequence[str]) -> None:
    """Fork a process for each connection, as long as the process `parent` is this one's."""
    for name in preloaded:
        importlib.import_module(name)
    gc.freeze()
    living: dict[int, socket.socket] = {}
    signal.signal(signal.SIGCHLD, lambda *_: reap(living))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(64)
        server.settimeout(LOOK_S)
        while os.getppid() == parent:
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            head, files, *_ = socket.recv_fds(connection, 8, _MOST_FILES)
            with connection.makefile("rb") as file:
                request = json.loads(file.read(int.from_bytes(head, "big")))
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
            if (pid := os.fork()) == 0:
                server.close()
                for other in living.values():
                    other.close()
                become(request, files, connection)
            living[pid] = connection
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            for descriptor in files:
                os.close(descriptor)


def reap(living: dict[int, socket.socket]) -> None:
    """Tell the stand-ins of forks that have ended, and how."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            with living.pop(ended[0]) as connection, contextlib.suppress(OSError):
                connection.send(bytes([os.waitstatus_to_exitcode(ended[1]) & 255]))


def become(request: dict[str, Any], files: list[int], connection: socket.socket) -> NoReturn:
    """Run what was asked for in this process, and end it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    os.setpgrp()  # Ray ends the process group of a worker, which must not be that of the tests
    asker, *opened = [_above(descriptor) for descriptor in (connection.detach(), *files)]
    for number, descriptor in zip(request["files"], opened, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    end_with(asker)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    first, *_ = sys.argv = request["arguments"]
    if first == "-m":
        sys.path[0], sys.argv = "", sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        sys.path[0], code = "", sys.argv.pop(1)
        exec(code, vars(module))
    else:
        assert "ray" not in sys.modules, "forked workers would keep the server's settings of Ray"
        sys.path[0] = os.path.dirname(first)
        runpy.run_path(first, run_name="__main__")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    sys.exit()


def _above(descriptor: int) -> int:
    """The same file at a number that no process is started with."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _ABOVE)
    os.close(descriptor)
    return moved


def end_with(connection: int) -> None:
    """This process is killed when the one at the other end is."""
    fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(connection, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(connection, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        os.read(connection, 1)
        os._exit(1)


def ask(path: str, arguments: list[str]) -> int:
    """Stand for a process: have it forked, and return its exit code when it has ended."""
    files = array.array("i", filter(_is_open, map(int, os.listdir("/proc/self/fd"))))
    request = {
        "arguments": arguments,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "files": list(files),
    }
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
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, files)
        connection.sendmsg([len(body).to_bytes(8, "big")], [rights])
        connection.sendall(body)
        return (connection.recv(1) or b"\1")[0]


def stand_in() -> None:
    """Where the command of this process is one that is to be forked, have it forked and end with it."""
    words = list(itertools.dropwhile(lambda word: word not in ("-m", "-c"), sys.orig_argv))
    if "--multiprocessing-fork" in words or words[1:2] and words[1] in json.loads(os.environ[FORKED]):
        os._exit(ask(os.environ[SERVER], words))


def _is_open(descriptor: int) -> bool:
    try:
        return bool(os.fstat(descriptor))
    except OSError:
        return False


def set_up(words: list[str]) -> None:
    """What Ray's `setup_worker.py` does; by that itself for jobs whose Python is another one than this file."""
    (text,) = [word.removeprefix(CONTEXT) for word in words if word.startswith(CONTEXT)] or ["{}"]
    context = json.loads(text)
    python = (context.get("py_executable") or "").split()
    if __file__ not in python:
        os.execv(sys.executable, [sys.executable, str(Path(words[0]).with_name("setup_worker.py")), *words])
    os.environ.update(context["env_vars"])
    sys.exit(ask(python[-1], [word for word in words if not word.startswith((CONTEXT, LANGUAGE))]))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], int(sys.argv[3]), sys.argv[4:])
    elif any(word.startswith(LANGUAGE) for word in sys.argv):
        set_up(sys.argv[1:])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
