"""Runs one command in a process group of its own and leaves none of it behind: `... guard COMMAND ARG...`.

The starter holds this process's standard input open. When that pipe closes (the starter ended, by whatever
signal), on SIGTERM, and when the command itself ends, the whole group is ended: the engine of an inference
server is a child of its HTTP process and would keep its memory and its card without it. Exits with the command's code.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

GRACE_S = 10.0
_PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> int:
    """The exit code of `command`; 128 + n for one that signal n ended, as a shell says it."""
    # Called in the child between fork and exec: safe here, since no thread has been started yet.
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_parent
    )
    leaving = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: leaving.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the starter, which closes the pipe
    threading.Thread(target=_watch_starter, args=(leaving,), daemon=True).start()
    threading.Thread(target=_watch_child, args=(child, leaving), daemon=True).start()
    leaving.wait()
    code = _end_group(child)
    return code if code >= 0 else 128 - code


def _watch_starter(leaving: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    leaving.set()


def _watch_child(child: subprocess.Popen, leaving: threading.Event) -> None:
    child.wait()
    leaving.set()


def _end_group(child: subprocess.Popen) -> int:
    """SIGTERM to the group while its leader lives, SIGKILL after the grace period and to whatever is left."""
    deadline = time.monotonic() + GRACE_S
    if child.poll() is None:
        _signal_group(child.pid, signal.SIGTERM)
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    _signal_group(child.pid, signal.SIGKILL)
    return child.wait(timeout=60)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _die_with_parent() -> None:
    """Should this process be killed outright, the kernel ends the command (its own children find out by themselves)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
