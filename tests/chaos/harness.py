"""A small real run with faults in it, and what must be true of it afterwards.

A run ends bit for bit like the undisturbed one, or stops within its limit and names the culprit, and `--resume auto`
ends like the undisturbed one. Nothing is left of it: no actor, placement group, object, lock, temporary file, process.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml

from models.lora.attach import hash_state
from models.lora.files import read_adapter
from tests.chaos.faults import FOLDER
from tests.fakes.service_process import Service, write_recipe
from tests.fakes.tiny_run import tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
NOW = "now"
"""In a harness's folder, a link to the cell that is under way: services look there."""
CALL_S = 10.0
"""`resources.call_timeout_s`: what hangs is noticed after it, or twice that where two calls are under way."""
LOOK_S, HUNG_S = 0.1, 5.0
"""Between two looks at a run; after which a hanging service is started again."""
GONE_S = 60.0
"""After a run's end, until nothing is left of it: Ray ends the actors of a driver that left, and a driver that leaves
sends its last metrics twice, for 10 s each where Ray's agent has no time."""
TIMES = ("time", "throughput/", "workers/", "policy/version")
"""Metrics that may differ between two runs that computed the same: times, and what workers did."""

REWARDS = '''
from tests.chaos.faults import reach

def redness(*, images, prompts, references, metadata):
    """Mean red minus mean green, in [0, 1]."""
    import numpy as np
    reach("reward")
    return [float((np.asarray(i, dtype=float)[..., 0] - np.asarray(i, dtype=float)[..., 1]).mean() / 510 + 0.5)
            for i in images]

def blueness(*, images, prompts, references, metadata):
    """Mean blue, in [0, 1]."""
    import numpy as np
    reach("served")
    return [float(np.asarray(i, dtype=float)[..., 2].mean() / 255) for i in images]
'''


@dataclass(frozen=True)
class Fault:
    """`how` (kill, stop, raise, slow, full, node) at the `nth` passage of a point; `seconds` of a slow answer; the
    `role` whose node loses its power, where it is not that of the process at the point."""

    point: str
    how: str
    nth: int = 1
    seconds: float = 2.0
    role: str = ""

    def __str__(self) -> str:
        what = f"{self.how} of {self.role}" if self.role else self.how
        return f"{what} at {self.point} {self.nth}"


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `state` and `cause` are those of `status.json`; `running` for a driver that was killed."""

    state: str
    cause: str
    seconds: float
    fired: list[dict[str, Any]] = field(default_factory=list)


class Services:
    """Equal services of the served reward, kept as a deployment keeps them: what died is started again at its port."""

    def __init__(self, folder: Path, count: int):
        self.folder, self._hung_since = folder, dict[int, float]()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "reward.py").write_text(REWARDS)
        self.name = f"{folder / 'reward.py'}:blueness"
        rewards = {task: [{"name": self.name, "timeout_s": 10}] for task in ("edit", "t2i")}
        self._recipe = write_recipe(folder, rewards, "service.yaml")
        self._running = [self._start() for _ in range(count)]
        self.urls = [service.ready().url for service in self._running]

    def keep(self) -> None:
        """Start again what has died, and what has been hanging for `HUNG_S`."""
        for number, service in enumerate(self._running):
            since = self._hung_since.setdefault(number, time.monotonic())
            if not _hangs(service):
                del self._hung_since[number]
            elif time.monotonic() - since > HUNG_S:
                service.stop()
            if service.process.poll() is not None:
                service.stop()
                self._running[number] = self._start(service.port)

    def wake(self) -> None:
        """After a run: end those that hang, and have all of them ready."""
        for service in self._running:
            if _hangs(service):
                service.stop()
        self.keep()
        for service in self._running:
            service.ready()

    def stop(self) -> None:
        for service in self._running:
            service.stop()

    def _start(self, port: int = 0) -> Service:
        return Service(self._recipe, port=port, **{FOLDER: str(self.folder / NOW)})


def _hangs(service: Service) -> bool:
    alive = service.process.poll() is None
    return alive and psutil.Process(service.process.pid).status() == psutil.STATUS_STOPPED


class Chaos:
    """Runs of one recipe on the Ray that this process has joined, whose workers come from `python` (see
    tests/fakes/forked_workers.py)."""

    def __init__(self, folder: Path, address: str, python: str, services: int = 2, **changes: Any):
        self.folder, self.address, self.python = folder, address, python
        self.services = Services(folder, services)
        self.recipe = chaos_recipe(folder, self.services, **changes)
        self.before = InRay()

    def run(
        self,
        name: str,
        *faults: Fault,
        limit_s: float = 180.0,
        resume: bool = False,
        overrides: Sequence[str] = (),
        meanwhile: Callable[[list[int]], None] = lambda pids: None,
    ) -> Outcome:
        """Run the recipe into `runs/<name>` until it ends. Raises TimeoutError after `limit_s`, the driver killed.

        meanwhile: is called every `LOOK_S` with the run's processes so far, the driver first: it is a fork too, not
        the process that is waited for.
        """
        self.before = InRay.now()
        cell = self.folder / "cells" / f"{name}.{time.monotonic_ns()}"
        cell.mkdir(parents=True)
        (cell / "plan.json").write_text(json.dumps([asdict(fault) for fault in faults]))
        (self.folder / NOW).unlink(missing_ok=True)
        (self.folder / NOW).symlink_to(cell)
        words = [*self.python.split(), str(Path(__file__).with_name("job.py")), self.address, self.python]
        words += [str(self.recipe), f"name={name}", *overrides, *(["--resume", "auto"] if resume else [])]
        began = time.monotonic()
        with (cell / "log").open("wb") as log:
            environment = os.environ | {FOLDER: str(cell), "PYTHONPATH": str(ROOT)}
            driver = subprocess.Popen(words, stdout=log, stderr=log, env=environment, cwd=ROOT)
            while driver.poll() is None:
                self.services.keep()
                meanwhile(pids(cell))
                time.sleep(LOOK_S)
                if time.monotonic() - began > limit_s:
                    for pid in pids(cell)[:1]:
                        psutil.Process(pid).kill()
                    raise TimeoutError(f"{name}: still running after {limit_s:g} s, see {cell}/log")
        seconds = time.monotonic() - began
        self.services.wake()
        path = self.out(name) / "status.json"
        status = json.loads(path.read_text()) if path.exists() else {"state": "absent", "cause": None}
        return Outcome(status["state"], status["cause"] or "", seconds, fired(cell))

    def out(self, name: str) -> Path:
        return self.folder / "runs" / name

    def left(self, name: str) -> list[str]:
        """What is left of the last run, after `GONE_S` at most; empty is right."""
        started = pids(self.folder / NOW)
        deadline = time.monotonic() + GONE_S
        while True:
            found = [*InRay.now().beyond(self.before), *left_processes(started), *left_files(self.out(name))]
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(LOOK_S)

    def close(self) -> None:
        self.services.stop()


@dataclass(frozen=True)
class InRay:
    """What the Ray that this process has joined holds."""

    living: frozenset[str] = frozenset()
    stored_bytes: int = 0

    @classmethod
    def now(cls) -> "InRay":
        """Actors and placement groups of all jobs, objects of all nodes."""
        from ray._private.internal_api import node_stats
        from ray._private.state import actors
        from ray.util import placement_group_table

        living = {f"actor {a['ActorID']} {a['State']}" for a in actors().values() if a["State"] != "DEAD"}
        groups = placement_group_table().items()
        living |= {f"placement group {name} {g['state']}" for name, g in groups if g["state"] != "REMOVED"}
        nodes = [node for node in ray.nodes() if node["Alive"]]
        stores = [node_stats(n["NodeManagerAddress"], n["NodeManagerPort"]).store_stats for n in nodes]
        return cls(frozenset(living), sum(store.object_store_bytes_used for store in stores))

    def beyond(self, before: "InRay") -> list[str]:
        bytes_more = self.stored_bytes - before.stored_bytes
        more = [f"{bytes_more} bytes in the object store"] if bytes_more > 0 else []
        return [*sorted(self.living - before.living), *more]


def pids(cell: Path) -> list[int]:
    """The driver and the workers that a run has started so far."""
    return [pid for pid, _ in placed_pids(cell)]


def placed_pids(cell: Path) -> list[tuple[int, str]]:
    """The same, each with the id of its node; that of the driver is empty."""
    path = cell / "pids"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(pid), node) for pid, _, node in (line.partition(" ") for line in lines)]


def fired(cell: Path) -> list[dict[str, Any]]:
    """The faults that struck, in order."""
    path = cell / "fired.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def chaos_recipe(folder: Path, services: Services, **changes: Any) -> Path:
    """Two stages of two steps, two learner ranks, two rollout workers, a reward in process and, where there are
    services, a served one."""
    recipe = tiny_recipe(folder)
    document = yaml.safe_load(recipe.read_text())
    (folder / "reward.py").write_text(REWARDS)  # where the tiny recipe has its own
    served = {"urls": services.urls, "unavailable_s": 30}
    rewards = [
        {"name": f"{folder / 'reward.py'}:redness", "timeout_s": 10},
        {"name": services.name, "timeout_s": 10, "service": served},
    ]
    for part in [*document["stages"], *document["evaluation"]["tasks"]]:
        part["rewards"] = rewards if services.urls else rewards[:1]
    for task in document["evaluation"]["tasks"]:
        task["num_prompts"] = 2
    document["rollout"] |= {"workers": 2, "num_steps": 3}
    document["learner"] |= {"ranks": 2, "micro_batch_size": 2}
    document["resources"] |= {
        "placement": "separate", "call_timeout_s": CALL_S, "start_timeout_s": 120, "placement_timeout_s": 60,
        "reward_workers": 1, "reward_concurrency": 1, "max_restarts": 20,
    }  # fmt: skip
    document["gallery"] |= {"prompts": 1, "every": 2}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            document[section][name] = value
        else:
            document[section] = value
    recipe.write_text(yaml.safe_dump(document, sort_keys=False))
    return recipe


def result(out: Path) -> dict[str, Any]:
    """What two equal runs have in common to the bit: adapter, metrics less times, groups, evaluations."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluations = sorted((out / "evaluations").rglob("*.json"))
    return {
        "adapter": hash_state(read_adapter(out / "adapter")[0]),
        "metrics": [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines],
        "groups": (out / "groups.jsonl").read_text(),
        "evaluations": {str(path.relative_to(out)): _evaluation(path) for path in evaluations},
    }


def _evaluation(path: Path) -> Any:
    document = json.loads(path.read_text())
    return {k: v for k, v in document.items() if k not in ("seconds", "policy_version")}


def left_processes(pids: Sequence[int]) -> list[str]:
    found = []
    for pid in pids:
        try:
            process = psutil.Process(pid)
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"process {pid} {process.status()}: {' '.join(process.cmdline())[:60]}")
        except psutil.NoSuchProcess:
            continue
    return found


def left_files(out: Path) -> list[str]:
    """Locks and what is written under a temporary name."""
    names = [path.relative_to(out) for path in out.rglob("*")] if out.exists() else []
    return [f"file {name}" for name in names if name.name.endswith((".tmp", ".old", ".lock"))]
