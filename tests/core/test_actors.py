"""Joining a cluster: what cannot be joined is one sentence with the address and what to look at."""

import json
import os
import signal
import socket
import sys

import pytest
import ray

from core.cluster.actors import connect
from core.failures import ClusterError
from core.run_status import STATUS_FILE, watch_run


@pytest.fixture(autouse=True)
def _apart(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


def test_an_address_where_nobody_listens_is_told_at_once(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray waits for minutes"))
        with pytest.raises(
            ClusterError, match=f"cannot join RAY_ADDRESS={address}: .*refused; see `ray status`"
        ):
            connect()


def test_what_ray_says_is_one_sentence(monkeypatch):
    def init(**_):
        raise RuntimeError("the token is wrong\nand sixty lines more")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(
        ClusterError, match="^cannot join RAY_ADDRESS=auto: the token is wrong; .*RAY_AUTH_MODE"
    ):
        connect()
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ClusterError, match="^cannot start Ray on this machine: the token is wrong; see"):
        connect()


def test_a_stop_while_ray_starts_is_a_stop(monkeypatch, tmp_path):
    def init(**_):
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as Ray does
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left, watch_run(tmp_path, resume=True):
        connect()
    assert left.value.code == 143
    assert json.loads((tmp_path / STATUS_FILE).read_text())["state"] == "stopped"
    assert signal.getsignal(signal.SIGTERM) is before
