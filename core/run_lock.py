"""One process at a time writes a run's folder: a lock file that names its holder, kept fresh by a heartbeat.

The file is made with O_EXCL, which local file systems and NFS (from version 3) grant to one process alone. It is taken
over when its process is dead on this very host, or when nobody touched it for `STALE_S` seconds of this host's clock;
clocks of hosts need not agree. A holder that stood still for longer than that (a frozen machine, a file system that
hung) finds out at its next step, where it calls `check_held`, and stops.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from core.files import naming
from core.recipe import ConfigError

log = logging.getLogger(__name__)
LOCK = ".run.lock"
BEAT_S, STALE_S, POLL_S = 10.0, 120.0, 1.0
"""Seconds between two heartbeats; without one, until a lock is taken over; between two looks at it."""
_Seen = tuple[str, int]


class RunTaken(ConfigError):
    """Another process writes this folder; names it and what to do."""


@contextmanager
def hold_run(folder: Path) -> Iterator[None]:
    """Hold `folder`, made if absent, for this process alone. Raises RunTaken, within seconds of a sign of life of
    another holder, or where one is silent only after `STALE_S`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    _take(path)
    done = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, done), name="run-lock", daemon=True)
    beat.start()
    try:
        yield
    finally:
        done.set()
        beat.join(timeout=BEAT_S)
        if _is_mine(_read(path)):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # what was refused leaves no empty folder behind
            folder.rmdir()


def check_held(folder: Path) -> None:
    """Raise RunTaken where another process has taken over the folder. One that nobody holds is free to write."""
    seen = _read(folder / LOCK)
    if seen is not None and not _is_mine(seen):
        raise RunTaken(
            [f"{folder} was taken over by {_holder(seen)}, since this process gave no sign of life; it stops"]
        )


def _take(path: Path) -> None:
    for _ in range(5):
        with suppress(FileExistsError):
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            try:
                with naming(path), open(descriptor, "w", encoding="utf-8") as file:
                    json.dump(
                        {**_identity(os.getpid()), "time": now, "folder": str(path.parent.resolve())}, file
                    )
            except OSError:  # a full disk
                path.unlink(missing_ok=True)
                raise
            return
        seen = _read(path)
        if seen is not None:
            _wait_for_death(path, seen)
            _remove(path, seen)
    raise RunTaken([f"{path.parent}: several processes are starting there at once; start one"])


def _wait_for_death(path: Path, seen: _Seen) -> None:
    """Return when the lock is stale. Raises RunTaken once its holder is known to live."""
    holder = _parsed(seen)
    if holder.get("boot") is not None and holder["boot"] == _boot():
        if _start_of(holder.get("pid", 0)) == holder.get("start"):
            raise _taken(path, seen)
        return
    log.warning(
        "%s is held by %s; waiting up to %g s for a sign of life", path.parent, _holder(seen), STALE_S
    )
    deadline = time.monotonic() + STALE_S
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        now = _read(path)
        if now is None:
            return
        if now != seen:
            raise _taken(path, now)


def _remove(path: Path, seen: _Seen) -> None:
    """Remove the stale lock, but not one that another process took meanwhile."""
    ticket = path.with_suffix(".takeover")
    try:
        os.close(os.open(ticket, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        raise RunTaken(
            [f"{path.parent}: another process is taking it over; if none is, delete {ticket}"]
        ) from None
    try:
        if _read(path) == seen:
            log.warning("%s: taking over the lock of %s, which is gone", path.parent, _holder(seen))
            path.unlink(missing_ok=True)
    finally:
        ticket.unlink(missing_ok=True)


def _beat(path: Path, done: threading.Event) -> None:
    while not done.wait(BEAT_S):
        try:
            if not _is_mine(_read(path)):
                log.error("%s is no longer the lock of this process", path)
                return
            os.utime(path)
        except OSError as error:
            log.warning("%s: no heartbeat could be written (%s)", path, error)


def _read(path: Path) -> _Seen | None:
    """Text and time of last touch; None where there is no lock. Opening it makes NFS ask the server."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _parsed(seen: _Seen) -> dict[str, Any]:
    with suppress(ValueError):
        holder = json.loads(seen[0])
        if isinstance(holder, dict):
            return holder
    return {}


def _is_mine(seen: _Seen | None) -> bool:
    return seen is not None and _identity(os.getpid()).items() <= _parsed(seen).items()


def _identity(pid: int) -> dict[str, Any]:
    return {"host": socket.gethostname(), "boot": _boot(), "pid": pid, "start": _start_of(pid)}


def _boot() -> str | None:
    """What process numbers are unique within: one boot, one container. None where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _start_of(pid: int) -> str | None:
    """When a process began, in ticks since boot, which a later one of the same number does not share; None: dead."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else fields[18]


def _holder(seen: _Seen) -> str:
    holder = _parsed(seen)
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')} (since {holder.get('time', '?')})"


def _taken(path: Path, seen: _Seen) -> RunTaken:
    taken = f"{path.parent}: another run writes there now, {_holder(seen)}; "
    held = _parsed(seen).get("folder")
    if held not in (None, str(path.parent.resolve())):
        return RunTaken([f"{taken}it holds it as {held}: if this is a copy of that folder, delete {path}"])
    return RunTaken([f"{taken}wait for it, end it, or choose another folder"])
