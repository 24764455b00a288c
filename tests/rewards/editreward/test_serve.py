"""`serve`: folders vLLM cannot serve, supervision of small stand-in servers, GPUs placed by Ray.

The command with a real vLLM, killed in mid-run, is in `test_editreward_client.py`: a server takes most of a minute.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from core.files import COMPLETE
from rewards.editreward.model_folder import ModelFolderError
from rewards.editreward.serve.checks import check_model, engine_problems
from rewards.editreward.serve.replicas import Replica, ReplicaError, ReplicaPlan, ReplicaStatus
from tests.fakes.tiny_editreward import make_tiny_editreward

ROOT = Path(__file__).resolve().parents[3]

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


# ---- folders ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_editreward(tmp_path_factory.mktemp("editreward") / "model")


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename_head(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["score.weight"] = weights.pop("language_model.score.weight")
    save_file(weights, path)


BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "architecture": (
        lambda f: change_json(f / "config.json", architectures=["Qwen2_5_VLForConditionalGeneration"]),
        "not ['Qwen2_5_VLForSequenceClassification']",
    ),
    "num_labels": (lambda f: change_json(f / "config.json", num_labels=1), "num_labels is 1"),
    "no head": (rename_head, "language_model.score.weight"),
    "no constants": (lambda f: (f / "editreward.json").unlink(), "editreward.json does not exist"),
    "other constants": (lambda f: change_json(f / "editreward.json", stds=[1.0, 1.0, 1.0]), "changed"),
    "cut short": (lambda f: os.truncate(f / "model.safetensors", 200_000), "weight file is not whole"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    "unfinished copy": (lambda f: (f / COMPLETE).unlink(), f"no {COMPLETE} file"),
    "dtype": (lambda f: change_json(f / "config.json", dtype="float8_e4m3fn"), "dtype is 'float8_e4m3fn'"),
    "other model": (
        lambda f: change_json(f / "config.json", model_type="qwen3_vl"),
        "model_type is 'qwen3_vl'",
    ),
}


@pytest.mark.parametrize("fault", BAD_FOLDERS)
def test_a_folder_that_vllm_cannot_serve_is_refused_by_what_is_wrong(
    folder: Path, tmp_path: Path, fault: str
) -> None:
    spoil, said = BAD_FOLDERS[fault]
    bad = shutil.copytree(folder, tmp_path / "bad")
    spoil(bad)
    with pytest.raises(ModelFolderError) as caught:
        check_model(bad)
    assert any(said in problem and str(bad) in problem for problem in caught.value.problems)


@pytest.mark.vllm
def test_a_head_size_that_vllm_refuses_is_found_by_asking_it(folder: Path) -> None:
    card, facts = check_model(folder)
    assert engine_problems(card, facts, tensor_parallel=1) == []
    (problem,) = engine_problems(card, replace(facts, head_size=16), tensor_parallel=1)
    assert "attention heads of size 16, which this vLLM refuses" in problem and " 64," in problem


def test_cards_must_share_out_the_attention_heads(folder: Path) -> None:
    card, facts = check_model(folder)
    seven_b = replace(facts, attention_heads=28, key_value_heads=4, head_size=128)
    for cards, fine in ((1, True), (2, True), (4, True), (7, False), (8, False), (3, False)):
        problems = engine_problems(card, seven_b, tensor_parallel=cards)
        assert (not problems) == fine, (cards, problems)


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

    httpx.get(f"{replica.url}/die", timeout=60)


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
        from rewards.editreward.serve.replicas import Replica, ReplicaPlan
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
    process.wait(120)
    wait_for(lambda: not any(alive(pid) for pid in below))


# ---- placement --------------------------------------------------------------------------------------------


def test_a_cluster_without_room_is_named_with_the_way_out(ray_session: Any, make_replica: Any) -> None:
    from core.failures import ClusterError
    from rewards.editreward.serve.fleet import Room, place

    plan = make_replica().plan
    with pytest.raises(
        ClusterError, match="2 replicas .* needs 4 GPUs, the cluster has 0; .* lower --replicas"
    ):
        place([plan, replace(plan, index=1)], Room(2, 1.0, 2, 5.0))
    held = place([plan], Room(1, 10.0, 0, 30.0))
    try:
        with pytest.raises(ClusterError, match="1 replicas of 0 GPUs and 10 CPUs found no room in 1 s"):
            place([plan], Room(1, 10.0, 0, 1.0))
    finally:
        held.close()


def test_what_goes_wrong_on_a_node_is_told_where_serve_was_started(
    ray_session: Any, make_replica: Any
) -> None:
    from core.failures import ClusterError
    from rewards.editreward.serve.fleet import Room, check_host, place

    with socket.create_server(("127.0.0.1", 0)) as taken:
        fleet = place([make_replica(port=taken.getsockname()[1]).plan], Room(1, 1.0, 0, 30.0))
        try:
            with pytest.raises(ClusterError, match="cannot listen .* give another --port, or 0"):
                fleet.start()
        finally:
            fleet.close()
    fleet = place([make_replica().plan], Room(1, 1.0, 0, 30.0))
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
        from rewards.editreward.serve.replicas import ReplicaPlan
        from core.failures import ClusterError
        from rewards.editreward.serve.fleet import Room, place
        ray.init(address="local", num_cpus=4, num_gpus=4, include_dashboard=False, log_to_driver=False)
        command = (sys.executable, {str(tmp_path / "server.py")!r})
        plans = [ReplicaPlan(i, command, {str(tmp_path)!r}, "127.0.0.1", 0, {{}}, 60, 3) for i in range(2)]
        fleet = place(plans, Room(2, 1.0, 2, 30.0))
        try:
            place(plans[:1], Room(1, 1.0, 1, 1.0))
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


# ---- the command line -------------------------------------------------------------------------------------


def test_the_command_line_refuses_a_bad_folder_and_says_why(folder: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(folder, tmp_path / "bad")
    change_json(bad / "config.json", num_labels=2)
    command = [sys.executable, "-m", "rewards.editreward", "serve", str(bad)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "Cannot serve:" in done.stderr and "num_labels is 2" in done.stderr
    assert "Traceback" not in done.stderr
