"""`status.json`: what a run folder says about its run, and how that run ends when it is asked to, or fails.

    {"state": "running" | "finished" | "stopped" | "failed", "step", "stage", "time", "host", "pid", "cause",
     "resume_command", "learner_restarts"}

`time` (Unix seconds) is a heartbeat: a run whose state is `running` and whose time is minutes old was killed.
"""

from __future__ import annotations

import logging
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from core.files import atomic_write_json
from core.run_lock import RunTaken, check_held
from core.stopping import Stopping, StopRun

log = logging.getLogger(__name__)
STATUS_FILE = "status.json"
ACCEPT_CHANGES = "--accept-changes"
"""The flag of a command that continues with other data, weights or rewards; of one resume alone."""
STOP_TIMEOUT_S = 120.0
STOPPED_ITSELF = 3
"""Exit code of a run that ended by StopRun."""
HEARTBEAT_S = 15.0
LEAVE_S = 5.0
"""What a process that leaves gives its last words: its storage may hang."""
_LOOK_S = 0.25


class RunWatch:
    """The status of a run that is under way, and whether it was asked to stop."""

    def __init__(
        self, folder: Path, command: str, stop_timeout_s: float, heard: Callable[[int], None] | None = None
    ):
        self.path = folder / STATUS_FILE
        self._status: dict[str, Any] = {
            "state": "running", "step": None, "stage": None, "time": 0.0, "host": socket.gethostname(),
            "pid": os.getpid(), "cause": None, "resume_command": command, "learner_restarts": 0,
        }  # fmt: skip
        self._forward, self._lock, self._ended = heard, threading.RLock(), threading.Event()
        self._exit_by = float("inf")
        self.stop = Stopping(stop_timeout_s, self._leave, self._heard)

    @property
    def stopping(self) -> bool:
        """Whether a signal has asked the run to stop."""
        return self.stop.signal is not None

    def at(self, step: int, stage: str | None = None) -> None:
        """The run has finished `step`."""
        self._write(step=step, stage=stage)

    def restarted(self, times: int) -> None:
        """The run has replaced lost ranks so many times."""
        self._write(learner_restarts=times)

    def begin(self) -> None:
        """Say that the run is running, from now on with a heartbeat; take over Ctrl-C and SIGTERM."""
        self._write()
        threading.Thread(target=self._beat, name="run status", daemon=True).start()
        threading.Thread(target=self._enforce, name="run stop", daemon=True).start()
        self.stop.install()

    def end(self, state: str, cause: str | None = None) -> None:
        """How the run ended. An error that follows a signal is part of the stop."""
        self.stop.restore()
        name = self.stop.signal.name if self.stop.signal else None
        try:
            self._write(state=state, cause=": ".join(filter(None, (name, cause))) or None)
        except OSError as error:  # a full disk, often what ended the run, and that is what has to be told
            log.error("%s cannot be written: %s", self.path, error)
        if state != "finished":
            self._say(f"the run {state}", self._status["cause"])
        self._ended.set()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            try:
                self._write()
            except OSError as error:
                log.warning("%s cannot be written: %s", self.path, error)

    def _enforce(self) -> None:
        """Touches no storage, which may be what hangs."""
        while not self._ended.wait(_LOOK_S):
            if self.stop.late and self._exit_by == float("inf"):
                why = f"it did not end within {self.stop.limit_s:g} s"
                threading.Thread(target=self._leave, args=(why,), daemon=True).start()
                self._exit_by = time.monotonic() + LEAVE_S
            if time.monotonic() > self._exit_by:
                os._exit(128 + (self.stop.signal or 0))

    def _write(self, **changes: Any) -> None:
        with self._lock:
            self._status |= {**changes, "time": time.time()}
            with suppress(RunTaken):  # the status is that of the process that has taken the folder over
                check_held(self.path.parent)
                atomic_write_json(self.path, self._status)

    def _heard(self, number: int) -> None:
        if self._forward is not None:
            self._forward(number)
        assert self.stop.signal is not None
        _say(
            f"{self.stop.signal.name}: the run stops, within {self.stop.limit_s:g} s; once more ends it at once"
        )

    def _leave(self, why: str) -> None:
        """End the process from any thread, whatever the main one does; Ray ends the actors of a driver that left."""
        assert self.stop.signal is not None
        self._exit_by = time.monotonic() + LEAVE_S
        try:
            self._write(state="stopped", cause=f"{self.stop.signal.name}; {why}")
            self._say("the run left what was not saved", why)
        finally:
            os._exit(128 + self.stop.signal)

    def _say(self, what: str, why: str | None) -> None:
        step = self._status["step"]
        where = f" after step {step}" if step is not None else ""
        _say(f"{what}{where} ({why}); continue with: {self._status['resume_command']}")


@contextmanager
def watch_run(
    folder: Path,
    *,
    resume: bool,
    stop_timeout_s: float = STOP_TIMEOUT_S,
    heard: Callable[[int], None] | None = None,
) -> Iterator[RunWatch]:
    """Keeps `folder/status.json` while the block runs, and says how it ended.

    A signal arrives in the block as KeyboardInterrupt, which it may use to save, and leaves it as SystemExit with 130
    or 143, within `stop_timeout_s`. StopRun leaves it as SystemExit with 3. Other errors pass.

    Args:
        resume: whether the command continues by `--resume auto`; else by being given again.
        heard: told the number of each signal, to pass it on.
    """
    watch = RunWatch(folder, resume_command(resume=resume), stop_timeout_s, heard)
    watch.begin()
    try:
        yield watch
    except StopRun as stop:
        watch.end("stopped", str(stop))
        raise SystemExit(128 + watch.stop.signal if watch.stop.signal else STOPPED_ITSELF) from None
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        if not interrupted and not watch.stopping:
            watch.end("failed", one_line(error))
            raise
        watch.end("stopped", None if interrupted else one_line(error))
        raise SystemExit(128 + (watch.stop.signal or 2)) from None
    watch.end("finished")


def resume_command(*, resume: bool) -> str:
    """The command that started this process, as it continues the run."""
    words = ["python", *sys.orig_argv[1:]]
    if resume:
        kept: list[str] = []
        for word in words:
            if kept[-1:] == ["--resume"]:
                kept.pop()
            elif not word.startswith("--resume=") and word != ACCEPT_CHANGES:
                kept.append(word)
        words = [*kept, "--resume", "auto"]
    return shlex.join(words)


def one_line(error: BaseException) -> str:
    """Type and first line of an error, and what was noted of it."""
    first = str(error).strip().splitlines()[:1]
    return ": ".join([type(error).__name__, *first, *getattr(error, "__notes__", ())])


def _say(text: str) -> None:
    """Past Python's buffers, which a signal's handler must not enter. Where it goes may be as full as the disk."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode(errors="backslashreplace"))
