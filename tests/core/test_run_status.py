"""A run that is asked to stop, fails or hangs, seen from outside: its exit code, what it says, its `status.json`."""

import json
import signal
import subprocess
import sys
import time

import pytest

from core.run_status import HEARTBEAT_S, STATUS_FILE, resume_command, watch_run

PROGRAM = """
import sys, threading, time
from pathlib import Path
import core.run_status
from core.logs import start_logging
from core.run_status import watch_run
from core.stopping import StopRun

start_logging()
with watch_run(Path(sys.argv[1]), resume=True, stop_timeout_s=float(sys.argv[3])) as watch:
    watch.at(7, "edit")
    Path(sys.argv[1], "ready").touch()
    if sys.argv[2] == "protected":
        with watch.stop.protected():
            time.sleep(1)
            Path(sys.argv[1], "saved").touch()
        Path(sys.argv[1], "beyond").touch()
    elif sys.argv[2] == "hangs":
        with watch.stop.protected():
            time.sleep(60)
    elif sys.argv[2] == "storage hangs":
        core.run_status.LEAVE_S = 0.5
        core.run_status.atomic_write_json = lambda *args: time.sleep(60)
        threading.Thread(target=watch.at, args=(8,), daemon=True).start()
        Path(sys.argv[1], "hung").touch()
        with watch.stop.protected():
            time.sleep(60)
    elif sys.argv[2] == "stops itself":
        raise StopRun("alarms.cross_task=stop: t2i fell")
    elif sys.argv[2] == "fails":
        raise ValueError("no more disk\\nand more")
    elif sys.argv[2] == "waits":
        time.sleep(60)
"""


def start(folder, what, limit=30.0):
    command = [sys.executable, "-c", PROGRAM, str(folder), what, str(limit), "--resume", "x"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (folder / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


def status(folder):
    return json.loads((folder / STATUS_FILE).read_text())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_its_code_and_the_resume_command(tmp_path, number, code):
    process = start(tmp_path, "waits")
    assert status(tmp_path)["state"] == "running" and status(tmp_path)["pid"] == process.pid
    process.send_signal(number)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == code and "Traceback" not in error
    found = status(tmp_path)
    assert (found["state"], found["step"], found["stage"]) == ("stopped", 7, "edit")
    assert found["cause"] == number.name and time.time() - found["time"] < 60
    assert found["resume_command"].endswith(" --resume auto") and found["resume_command"] in error


def test_what_is_protected_is_done_before_the_signal_counts(tmp_path):
    process = start(tmp_path, "protected")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143
    assert (tmp_path / "saved").exists() and not (tmp_path / "beyond").exists()


def test_a_second_signal_leaves_at_once(tmp_path):
    process = start(tmp_path, "hangs")
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=5)[1]
    assert process.returncode == 130 and "--resume auto" in error
    assert status(tmp_path)["cause"] == "SIGINT; a second signal came"


def test_a_run_that_does_not_end_within_its_limit_leaves(tmp_path):
    process = start(tmp_path, "hangs", limit=0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 143
    assert status(tmp_path)["cause"] == "SIGTERM; it did not end within 0.5 s"


@pytest.mark.parametrize("again", [True, False], ids=["second_signal", "limit"])
def test_storage_that_hangs_keeps_no_process(tmp_path, again):
    process = start(tmp_path, "storage hangs", limit=30.0 if again else 0.5)
    while not (tmp_path / "hung").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    if again:
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143


def test_a_failure_has_its_cause_and_the_end_its_state(tmp_path):
    process = start(tmp_path, "fails")
    error = process.communicate(timeout=20)[1]
    assert process.returncode == 1 and "ValueError: no more disk" in error
    assert (status(tmp_path)["state"], status(tmp_path)["cause"]) == ("failed", "ValueError: no more disk")
    start(tmp_path, "ends").communicate(timeout=20)
    assert status(tmp_path)["state"] == "finished" and status(tmp_path)["cause"] is None


def test_a_run_that_stops_itself_has_a_code_of_its_own(tmp_path):
    process = start(tmp_path, "stops itself")
    error = process.communicate(timeout=20)[1]
    assert process.returncode == 3 and "Traceback" not in error
    found = status(tmp_path)
    assert (found["state"], found["cause"]) == ("stopped", "alarms.cross_task=stop: t2i fell")
    assert (
        f"the run stopped after step 7 ({found['cause']}); continue with: {found['resume_command']}" in error
    )


def test_the_status_is_a_heartbeat_and_signals_are_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr("core.run_status.HEARTBEAT_S", HEARTBEAT_S / 1000)
    before = signal.getsignal(signal.SIGINT)
    with watch_run(tmp_path, resume=False):
        first = status(tmp_path)["time"]
        deadline = time.monotonic() + 20
        while status(tmp_path)["time"] == first and time.monotonic() < deadline:
            time.sleep(0.05)
        assert status(tmp_path)["time"] > first
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    "given", [[], ["--resume", "runs/a/checkpoints/step_1"], ["--resume=auto"], ["--accept-changes"]]
)
def test_the_resume_command_is_the_command_with_resume_auto(monkeypatch, given):
    monkeypatch.setattr(
        sys, "orig_argv", ["/venv/python", "-m", "rl.train", "my recipe.yaml", *given, "seed=1"]
    )
    assert resume_command(resume=True) == "python -m rl.train 'my recipe.yaml' seed=1 --resume auto"
