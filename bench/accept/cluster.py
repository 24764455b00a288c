"""`ray job submit` on a real Ray cluster: one node, then two nodes with the workers on the second, killed and resumed.

Both jobs run the same short PDTR recipe; the killed and resumed one must end with the identical adapter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient

from bench.accept.evidence import ROOT, conclude
from models.lora.attach import hash_state
from models.lora.files import read_adapter
from tests.fakes.canaries import CANARIES, MARK

BIN = Path(sys.executable).parent
GCS_PORT, DASHBOARD_PORT = 6399, 8299
AGENT_PORTS = (
    52399,
    52398,
)  # one a node: both run on this machine, and a job is started by the head node's agent
SHORT = ["stages[0].steps=4", "stages[1].steps=4", "checkpoint.every=2", "evaluation.tasks[0].num_prompts=128",
         "evaluation.tasks[1].num_prompts=128", "resources.start_timeout_s=300"]  # fmt: skip


def main() -> None:
    """Run both jobs and write `docs/evidence/cluster.md`."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        # Ray asks for its token as soon as this machine has one, and reads the mode once, when it is imported.
        sys.exit("set RAY_AUTH_MODE=token (make accept does)")
    ray_cli("get-auth-token", "--generate")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        with cluster(head_cpus=2):
            started = time.monotonic()
            job = submit(out, "straight")
            follow(job)
            straight_s = time.monotonic() - started
            told, leaks = search_dashboard()
        with cluster(head_cpus=0, worker_cpus=2):
            job = submit(out, "interrupted")
            wait_for_step(out / "interrupted", 3)
            client().stop_job(job)
            wait_until_stopped(job)
            steps_before = len(train_records(out / "interrupted"))
            job = submit(out, "interrupted", "--resume", "auto")
            log = follow(job)
        hashes = {
            name: hash_state(read_adapter(out / name / "adapter")[0]) for name in ("straight", "interrupted")
        }
        equal = hashes["straight"] == hashes["interrupted"]
        body = [
            f"- `ray start --head` and `ray job submit --working-dir .`: both stages finished in {straight_s:.0f} s.",
            "- A head without CPUs and a second `ray start` node that holds every worker: the job was stopped after "
            f"{steps_before} steps, submitted again with `--resume auto`, and finished.",
            f"- Adapter of the straight job: `{hashes['straight']}`",
            f"- Adapter of the stopped and resumed job: `{hashes['interrupted']}`",
            f"- Identical: **{'yes' if equal else 'no'}**",
            f"- Secrets in the environment of the cluster and of `ray job submit`, in the {told} characters that the "
            f"dashboard tells of jobs, actors, tasks, workers, objects, events and nodes: **{leaks or 'none'}**",
        ]
        holds = equal and "continuing from" in log and not leaks
        data = {"hashes": hashes, "identical": equal, "leaks": leaks}
        conclude("cluster", "ray job submit, on one node and on two", body, data, holds=holds)


@contextmanager
def cluster(*, head_cpus: int, worker_cpus: int | None = None) -> Iterator[None]:
    """A head node, and a second node on this machine when `worker_cpus` is given. Other Ray clusters are left alone."""
    head = ["--head", f"--port={GCS_PORT}", f"--dashboard-port={DASHBOARD_PORT}", f"--num-cpus={head_cpus}"]
    nodes = [start_node(*head, f"--dashboard-agent-listen-port={AGENT_PORTS[0]}")]
    try:
        wait_until_up()
        if worker_cpus is not None:
            worker = [f"--address=127.0.0.1:{GCS_PORT}", f"--num-cpus={worker_cpus}"]
            nodes.append(start_node(*worker, f"--dashboard-agent-listen-port={AGENT_PORTS[1]}"))
        yield
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            node.wait(timeout=120)


def start_node(*words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [str(BIN / "ray"), "start", "--block", *words], env=environment(), stdout=subprocess.DEVNULL, cwd=ROOT
    )


def wait_until_up() -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            client().list_jobs()
            return
        except (RuntimeError, ConnectionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(2)


def environment() -> dict[str, str]:
    """This environment's `python` and `ray` first on the path, so that the job's entry point is the same one; and
    secrets, which `search_dashboard` looks for."""
    cleaned = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {
        **cleaned,
        **CANARIES,
        "PATH": path,
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{DASHBOARD_PORT}",
    }


def search_dashboard() -> tuple[int, list[str]]:
    """How many characters the dashboard tells, and which of its answers hold a secret of the environment."""
    listed = (
        "actors",
        "jobs",
        "tasks",
        "workers",
        "objects",
        "runtime_envs",
        "placement_groups",
        "nodes",
        "cluster_events",
    )
    paths = [f"/api/v0/{name}?detail=1&limit=10000" for name in listed]
    nodes = json.loads(_told("/nodes?view=summary"))["data"]["summary"]
    paths += ["/api/jobs/", "/logical/actors", "/events"] + [
        f"/nodes/{node['raylet']['nodeId']}" for node in nodes
    ]
    answers = {path: _told(path) for path in paths}
    return sum(map(len, answers.values())), [path for path, answer in answers.items() if MARK in answer]


def _told(path: str) -> str:
    answer = client()._do_request("GET", path)
    answer.raise_for_status()
    return answer.text


def ray_cli(*words: str) -> str:
    """Run the `ray` command line of this environment; raises with its output when it fails."""
    done = subprocess.run(
        [str(BIN / "ray"), *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        timeout=1800,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"ray {' '.join(words)} failed:\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def submit(out: Path, name: str, *more: str) -> str:
    """Submit the short recipe without waiting; returns the job's id."""
    job = f"{name}-{time.time_ns()}"
    command = ["python", "-m", "rl.train", "recipes/shapes/pdtr.yaml", f"output_dir={out}", f"name={name}"]
    deadline = time.monotonic() + 180
    words = ["--no-wait", f"--submission-id={job}", "--working-dir=.", "--", *command, *SHORT, *more]
    while True:
        try:
            ray_cli("job", "submit", *words)
            return job
        except RuntimeError as error:  # the node's agent starts some seconds after the dashboard answers
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(3)


def client() -> JobSubmissionClient:
    return JobSubmissionClient(f"http://127.0.0.1:{DASHBOARD_PORT}")


def follow(job: str) -> str:
    """Wait until a job has ended; returns its log, raises with it unless the job succeeded."""
    deadline = time.monotonic() + 1500
    while (status := client().get_job_status(job)) in (JobStatus.PENDING, JobStatus.RUNNING):
        if time.monotonic() > deadline:
            raise RuntimeError(f"job {job} did not end in time")
        time.sleep(2)
    log = client().get_job_logs(job)
    if status != JobStatus.SUCCEEDED:
        raise RuntimeError(f"job {job} ended as {status}:\n{log[-6000:]}")
    return log


def wait_until_stopped(job: str) -> None:
    deadline = time.monotonic() + 120
    while client().get_job_status(job) != JobStatus.STOPPED:
        if time.monotonic() > deadline:
            raise RuntimeError(f"job {job} did not stop")
        time.sleep(1)


def train_records(run: Path) -> list[dict[str, object]]:
    """Records of finished training steps."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if "optimizer/updates" in record]


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 900
    while len(train_records(run)) < step:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{run} did not reach step {step} in time")
        time.sleep(0.5)


if __name__ == "__main__":
    main()
