"""Servers kept alive: supervision of small stand-ins, cards placed by Ray."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray.exceptions import GetTimeoutError, RayActorError

from core.cluster.servers import fleet as fleet_module
from core.cluster.servers.fleet import Room, check_host, place
from core.cluster.servers.replica import Replica, ReplicaError, ReplicaPlan, ReplicaStatus
from core.failures import ClusterError

ROOT = Path(__file__).resolve().parents[2]
REMEDY = "lower --replicas or --tensor-parallel"

SERVER = """
import http.server, os, signal, subprocess, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if words.get("--fail") == "always" or (words.get("--fail") == "later" and os.path.exists(words["--mark"])):
    print("no such weights", flush=True)
    sys.exit(3)
if "--mark" in words:
    open(words["--mark"], "a").write("started\\n")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # the engine
print(f"engine {child.pid} cards {os.environ.get('CUDA_VISIBLE_DEVICES')}", flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()
        if self.path == "/die":
            os.kill(os.getpid(), signal.SIGKILL)
    def log_message(self, *_): ...
http.server.ThreadingHTTPServer((words["--host"], int(words["--port"])), Handler).serve_forever()
"""


def wait_for(condition: Callable[[], Any], limit_s: float = 240.0) -> Any:
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
    return found


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


# ---- one replica ------------------------------------------------------------------------------------------


@pytest.fixture
def make_replica(tmp_path: Path) -> Iterator[Callable[..., Replica]]:
    """Replicas of a small stand-in server with a child process, ended after the test."""
    made: list[Replica] = []
    script = tmp_path / "server.py"
    script.write_text(SERVER)

    def make(*words: str, port: int = 0, max_restarts: int = 3, start_timeout_s: float = 60.0) -> Replica:
        command = (sys.executable, str(script), *words)
        plan = ReplicaPlan(0, command, str(tmp_path), "127.0.0.1", port, {}, start_timeout_s, max_restarts)
        made.append(Replica(plan))
        return made[-1]

    yield make
    for replica in made:
        replica.stop()


def follow(replica: Replica, state: str, limit_s: float = 240.0) -> tuple[ReplicaStatus, list[str]]:
    """The first status in `state`, and all lines up to it."""
    lines: list[str] = []

    def look() -> ReplicaStatus | None:
        status = replica.status()
        lines.extend(status.lines)
        return status if status.state == state else None

    return wait_for(look, limit_s), lines


def engine_pid(lines: list[str]) -> int:
    return int(next(line for line in lines if line.startswith("engine")).split()[1])


def die(replica: Replica) -> None:
    import httpx

    httpx.get(f"{replica.url}/die", timeout=5)


def test_a_server_that_dies_is_restarted_and_leaves_nothing_behind(make_replica: Any) -> None:
    replica = make_replica()
    assert replica.start("127.0.0.1").startswith("http://127.0.0.1:")
    _, lines = follow(replica, "ready")
    first = engine_pid(lines)
    die(replica)
    status, _ = follow(replica, "restarting")
    assert "ended with code 137" in status.detail and "restart 1 of 3 in 1 s" in status.detail
    assert not alive(first), "the engine of the dead server would keep its memory"
    status, lines = follow(replica, "ready")
    assert status.restarts == 1 and status.url == replica.url
    replica.stop()
    assert replica.status().state == "stopped"
    assert not alive(engine_pid(lines))


def test_a_server_that_never_gets_ready_is_not_tried_again(make_replica: Any) -> None:
    replica = make_replica("--fail", "always")
    replica.start("127.0.0.1")
    status, _ = follow(replica, "failed")
    assert "ended with code 3" in status.detail and "no such weights" in status.detail
    assert status.restarts == 0


def test_restarts_are_capped(make_replica: Any, tmp_path: Path) -> None:
    replica = make_replica("--fail", "later", "--mark", str(tmp_path / "mark"), max_restarts=2)
    replica.start("127.0.0.1")
    follow(replica, "ready")
    die(replica)
    status, _ = follow(replica, "failed")
    assert status.restarts == 2
    assert "2 restarts in a row did not help" in status.detail and "no such weights" in status.detail


def test_a_server_that_is_not_ready_in_time_is_ended(make_replica: Any) -> None:
    replica = make_replica(start_timeout_s=0.0)
    replica.plan = replace(replica.plan, command=(sys.executable, "-c", "import time; time.sleep(600)"))
    replica.start("127.0.0.1")
    status, _ = follow(replica, "failed")
    assert "not ready within start_timeout_s 0" in status.detail


def test_a_taken_port_and_an_absent_folder_are_named(make_replica: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ReplicaError, match=f"port {port} of 10.0.0.7 .* give another --port"):
            make_replica(port=port).start("10.0.0.7")
    replica = make_replica()
    replica.plan = replace(replica.plan, folder="/none")
    with pytest.raises(ReplicaError, match="no folder /none on 10.0.0.7"):
        replica.start("10.0.0.7")


def test_when_the_starter_is_killed_outright_its_server_ends_too(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    starter = f"""
        import sys, time
        from core.cluster.servers.replica import Replica, ReplicaPlan
        plan = ReplicaPlan(0, (sys.executable, {str(script)!r}), {str(tmp_path)!r}, "127.0.0.1", 0, {{}}, 60, 3)
        replica = Replica(plan)
        replica.start("127.0.0.1")
        while True:
            for line in replica.status().lines:
                print(line, flush=True)
            time.sleep(0.1)
        """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(starter)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    engine = engine_pid([process.stdout.readline()])
    below = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert engine in below and len(below) == 4
    process.kill()
    process.wait(10)
    wait_for(lambda: not any(alive(pid) for pid in below))


def test_a_replica_that_does_not_answer_is_not_the_end_of_the_others(monkeypatch: Any) -> None:
    ready = ReplicaStatus("ready", "http://a", 1, "", ())
    answers: dict[str, Any] = {"a": ready, "b": GetTimeoutError("late"), "c": RayActorError()}

    def get(ref: str, timeout: float) -> Any:
        if isinstance(answers[ref], Exception):
            raise answers[ref]
        return answers[ref]

    wire = SimpleNamespace(get=get, wait=lambda refs, num_returns, timeout: (refs, []))
    monkeypatch.setattr(fleet_module, "ray", wire)
    actors = [SimpleNamespace(status=SimpleNamespace(remote=lambda name=name: name)) for name in answers]
    fleet = fleet_module.Fleet(SimpleNamespace(by_role={"replica": actors}))  # type: ignore[arg-type]
    assert [status.state for status in fleet.statuses()] == ["ready", "silent", "failed"]
    answers["a"], answers["b"] = GetTimeoutError("late"), ready
    first, second, third = fleet.statuses()
    assert (first.state, first.url, first.restarts) == (
        "silent",
        "http://a",
        1,
    ) and "did not answer" in first.detail
    assert second.state == "ready" and third.state == "failed"


# ---- placement --------------------------------------------------------------------------------------------


def test_a_cluster_without_room_is_named_with_the_way_out(ray_session: Any, make_replica: Any) -> None:
    plan = make_replica().plan
    with pytest.raises(
        ClusterError, match="2 replicas .* needs 4 GPUs, the cluster has 0; .* lower --replicas"
    ):
        place([plan, replace(plan, index=1)], Room(2, 1.0, 2, 5.0), remedy=REMEDY)
    held = place([plan], Room(1, 10.0, 0, 30.0), remedy=REMEDY)
    try:
        with pytest.raises(ClusterError, match="1 replicas of 0 GPUs and 10 CPUs found no room in 1 s"):
            place([plan], Room(1, 10.0, 0, 1.0), remedy=REMEDY)
    finally:
        held.close()


def test_what_goes_wrong_on_a_node_is_told_where_serve_was_started(
    ray_session: Any, make_replica: Any
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        fleet = place([make_replica(port=taken.getsockname()[1]).plan], Room(1, 1.0, 0, 30.0), remedy=REMEDY)
        try:
            with pytest.raises(ClusterError, match="cannot listen .* give another --port, or 0"):
                fleet.start()
        finally:
            fleet.close()
    fleet = place([make_replica().plan], Room(1, 1.0, 0, 30.0), remedy=REMEDY)
    try:
        fleet.start()
        lines: list[str] = []
        wait_for(lambda: lines.extend(fleet.statuses()[0].lines) or lines)
        ray_session.kill(fleet._actors[0])
        status = wait_for(lambda: [s for s in fleet.statuses() if s.state == "failed"])[0]
        assert "its actor is gone" in status.detail
        wait_for(lambda: not alive(engine_pid(lines)))
    finally:
        fleet.close()
    check_host("127.0.0.1")


def test_each_replica_sees_the_cards_that_ray_gave_it(tmp_path: Path) -> None:
    """Logical GPUs: two replicas of two cards each, of four. A fifth card is not to be had."""
    (tmp_path / "server.py").write_text(SERVER)
    script = f"""
        import sys, time, ray
        from core.cluster.servers.replica import ReplicaPlan
        from core.cluster.servers.fleet import Room, place
        from core.failures import ClusterError
        ray.init(address="local", num_cpus=4, num_gpus=4, include_dashboard=False, log_to_driver=False)
        command = (sys.executable, {str(tmp_path / "server.py")!r})
        plans = [ReplicaPlan(i, command, {str(tmp_path)!r}, "127.0.0.1", 0, {{}}, 60, 3) for i in range(2)]
        fleet = place(plans, Room(2, 1.0, 2, 30.0), remedy="")
        try:
            place(plans[:1], Room(1, 1.0, 1, 1.0), remedy="")
        except ClusterError as error:
            print("refused", error, flush=True)
        fleet.start()
        seen = [[], []]
        while not all(seen):
            for lines, status in zip(seen, fleet.statuses()):
                lines += status.lines
            time.sleep(0.2)
        for lines in seen:
            print(lines[0], flush=True)
        fleet.close()
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    lines = done.stdout.splitlines()
    refused = next((line for line in lines if line.startswith("refused")), done.stderr[-2000:])
    assert (
        "1 replicas of 1 GPUs and 1 CPUs found no room" in refused and "0 GPUs and 2 CPUs are free" in refused
    )
    cards = [line.rpartition(" ")[2].split(",") for line in lines if line.startswith("engine")]
    assert [len(each) for each in cards] == [2, 2]
    assert {card for each in cards for card in each} == {"0", "1", "2", "3"}
    wait_for(lambda: not any(alive(int(line.split()[1])) for line in lines if line.startswith("engine")))


# ---- serving ----------------------------------------------------------------------------------------------


def test_it_serves_until_a_signal_and_leaves_neither_server_nor_ready_file(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    ready = tmp_path / "ready.json"
    script = f"""
        import sys
        from pathlib import Path
        from core.cluster.servers.fleet import Room
        from core.cluster.servers.replica import ReplicaPlan
        from core.cluster.servers.serving import Service, serve

        def plan(has_gpus):
            command = (sys.executable, {str(tmp_path / "server.py")!r})
            replica = ReplicaPlan(0, command, {str(tmp_path)!r}, "127.0.0.1", 0, {{}}, 60, 3)
            return [replica], Room(1, 0.1, 0, 60.0)

        service = Service("stand-in", {{"model": "m"}}, "127.0.0.1", Path({str(ready)!r}), "")
        sys.exit(serve(service, plan))
        """
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        wait_for(lambda: ready.is_file() or process.poll() is not None, 240)
        said = (tmp_path / "log").read_text()
        assert ready.is_file(), said[-2000:]
        record = json.loads(ready.read_text())
        assert record == {"model": "m", "urls": record["urls"]} and len(record["urls"]) == 1
        assert f"ready: stand-in\n{record['urls'][0]}\n" in said and "[replica 0] engine" in said
        below = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
        assert not ready.exists()
        wait_for(lambda: not any(alive(child.pid) for child in below))
    finally:
        process.kill()
