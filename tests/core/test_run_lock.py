"""The lock of a run's folder: one holder, takeover of the dead, and never of the living."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from core import run_lock
from core.run_lock import LOCK, RunTaken, check_held, hold_run

HOLD = """
import sys, time
from pathlib import Path
from core.run_lock import hold_run
with hold_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder `tmp_path / "run"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_S", 0.02)
    monkeypatch.setattr(run_lock, "STALE_S", 0.3)
    monkeypatch.setattr(run_lock, "POLL_S", 0.01)


def foreign(folder, **changes):
    """Write the lock of a process on another host."""
    folder.mkdir(exist_ok=True)
    holder = {"host": "node7", "boot": "another", "pid": 4, "start": "1", "time": "2030-01-01T00:00:00Z"}
    (folder / LOCK).write_text(json.dumps(holder | changes))
    return folder / LOCK


def test_a_second_process_is_refused_and_told_who_holds_the_folder(tmp_path, other):
    with pytest.raises(RunTaken) as caught, hold_run(tmp_path / "run"):
        pass
    assert f"another run writes there now, process {other.pid} on " in str(caught.value)
    assert "wait for it, end it, or choose another folder" in str(caught.value)


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, other, caplog):
    other.kill()  # not waited for: a zombie is dead too
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with hold_run(tmp_path / "run"):
                check_held(tmp_path / "run")
                break
        except RunTaken:
            time.sleep(0.01)
    assert f"taking over the lock of process {other.pid} on" in caplog.text


def test_a_number_that_another_process_got_is_not_the_holder(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps(run_lock._identity(os.getpid()) | {"start": "1"}))
    with hold_run(tmp_path):
        check_held(tmp_path)


def test_a_folder_is_held_once_and_released(tmp_path):
    folder = tmp_path / "run"
    with hold_run(folder), pytest.raises(RunTaken), hold_run(folder):
        pass
    assert not folder.exists()
    with hold_run(folder):
        (folder / "metrics.jsonl").write_text("")
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("text", [None, "", "[]"])
def test_a_lock_of_another_host_is_taken_over_when_it_is_silent(tmp_path, fast, text, caplog):
    path = foreign(tmp_path)
    if text is not None:
        path.write_text(text)
    began = time.monotonic()
    with hold_run(tmp_path):
        assert time.monotonic() - began >= run_lock.STALE_S
    assert "waiting up to 0.3 s for a sign of life" in caplog.text


def test_a_lock_of_another_host_that_beats_is_refused(tmp_path, fast):
    path = foreign(tmp_path)
    beat = threading.Timer(0.1, lambda: os.utime(path))
    beat.start()
    with pytest.raises(RunTaken, match="process 4 on node7"), hold_run(tmp_path):
        pass
    beat.join()
    assert path.is_file()


@pytest.mark.parametrize("seconds", [-86400, 86400])
def test_a_beat_by_a_clock_that_was_set_is_a_sign_of_life(tmp_path, fast, seconds):
    path, then = foreign(tmp_path), time.time() + seconds
    beat = threading.Timer(0.1, lambda: os.utime(path, (then, then)))
    beat.start()
    with pytest.raises(RunTaken, match="process 4 on node7"), hold_run(tmp_path):
        pass
    beat.join()


@pytest.mark.parametrize("seconds", [-86400, 86400])
def test_a_silent_lock_of_another_day_is_not_for_ever(tmp_path, fast, seconds):
    path, then = foreign(tmp_path), time.time() + seconds
    os.utime(path, (then, then))
    began = time.monotonic()
    with hold_run(tmp_path):
        assert time.monotonic() - began >= run_lock.STALE_S


def test_the_copy_of_a_folder_under_way_is_refused_with_the_way_out(tmp_path, other):
    copied = shutil.copytree(tmp_path / "run", tmp_path / "copied")
    with pytest.raises(RunTaken) as caught, hold_run(copied):
        pass
    told = f"it holds it as {tmp_path / 'run'}: if this is a copy of that folder, delete {copied / LOCK}"
    assert told in str(caught.value)
    (copied / LOCK).unlink()
    with hold_run(copied):
        check_held(copied)


def test_the_holder_beats(tmp_path, fast):
    with hold_run(tmp_path):
        before = (tmp_path / LOCK).stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while (tmp_path / LOCK).stat().st_mtime_ns == before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / LOCK).stat().st_mtime_ns > before


def test_who_judged_a_lock_that_another_took_over_meanwhile_is_refused(tmp_path, fast, monkeypatch):
    foreign(tmp_path, boot=run_lock._boot(), pid=2**22 + 1)  # dead, on this host
    judge = run_lock._wait_for_death

    def judged_late(path, seen):
        judge(path, seen)
        path.write_text(json.dumps(run_lock._identity(os.getpid())))

    monkeypatch.setattr(run_lock, "_wait_for_death", judged_late)
    with pytest.raises(RunTaken), hold_run(tmp_path):
        pass
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_one_at_a_time_takes_over(tmp_path):
    foreign(tmp_path, boot=run_lock._boot(), pid=2**22 + 1)
    (tmp_path / ".run.takeover").write_text("")
    with pytest.raises(RunTaken, match=r"if none is, delete .*\.run\.takeover"), hold_run(tmp_path):
        pass


def test_a_holder_that_was_taken_over_finds_out(tmp_path):
    check_held(tmp_path)
    with hold_run(tmp_path):
        check_held(tmp_path)
        path = foreign(tmp_path)
        with pytest.raises(RunTaken, match="taken over by process 4 on node7"):
            check_held(tmp_path)
    assert path.is_file()
