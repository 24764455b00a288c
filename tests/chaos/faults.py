"""Faults at named points of a run, each of them once: put around the product's own functions where a process begins.

A cell is a folder, which the processes of a run find by `CHAOS_FOLDER`: `plan.json` lists its faults, a file for each
of them has a byte for each time that its point was passed, and `fired.jsonl` says where and when it struck. The
product knows nothing of it: Ray calls `install` in every worker (`worker_process_setup_hook`), `tests/chaos/job.py`
calls it in the driver, and rewards, which are the user's code anyway, call `reach` themselves.
"""

import functools
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = "CHAOS_FOLDER"
BEGUN = "begun"
"""Marks in the cell's folder that all workers had answered: trial calls at a run's start do not count."""
HOWS = ("kill", "stop", "raise", "slow", "full", "node")
CUT = "cut.json"
"""The node that is to lose its power, in the cell's folder until it has: `role`, or else the `node` of the process at
the point (tests/chaos/nodes.py)."""


class Injected(RuntimeError):
    """What the fault `raise` raises."""


def _always(*_: Any, **__: Any) -> bool:
    return True


# Point: the function before whose call the fault strikes, and which of its calls count.
_WORKER_POINTS: dict[str, tuple[str, Callable[..., bool]]] = {
    "encode": ("rollout.encoder:Encoder._conditioning", _always),
    "denoise": ("rollout.sampler:flow_sde_step", lambda *_, generator=None, **__: generator is not None),
    "evaluate": ("rollout.engine:RolloutEngine.sample", lambda _, request, *__: not request.steps),
    "publish": ("rollout.engine:RolloutEngine.load_adapter", _always),
    "micro_batch": ("rl.learner.learner:grpo_loss", _always),
    "gather": ("rl.learner.learner:Learner.adapter", _always),
    "save": ("rl.learner.learner:Learner.save", _always),
}
_DRIVER_POINTS: dict[str, tuple[str, Callable[..., bool]]] = {
    "driver_rollout": ("rl.loop.controller:group_requests", _always),
    "driver_update": ("rl.learner.worker:LearnerGroup.update", _always),
    "driver_publish": ("rl.loop.controller:publish", _always),
    "driver_record": ("rl.record.journal:Journal.groups", _always),
    "driver_metrics": ("rl.record.journal:Journal.log", _always),
    "driver_evaluate": ("rl.record.evaluation:Evaluator.evaluate", _always),
    "driver_pictures": ("rl.record.journal:Journal.grid", _always),
    "driver_save": ("core.files:publish_folder", _always),
    "driver_export": ("rl.record.results:RunResults.write_final", _always),
}
REWARD_POINTS = ("reward", "served")
POINTS = (*_WORKER_POINTS, *_DRIVER_POINTS, *REWARD_POINTS)
SOONER = {"rewards.service.client": {"WATCH_S": 1.0, "ALIVE_S": 2.0}}
"""Limits that no recipe sets, by module; in workers of runs whose services hang."""
_driver = False


def install() -> None:
    """Wrap what this process may pass. For Ray's workers."""
    _wrap(_WORKER_POINTS)
    if any(fault["point"] == "served" for fault in _plan(Path(os.environ[FOLDER]))):
        for module, limits in SOONER.items():
            vars(importlib.import_module(module)).update(limits)


def install_in_driver() -> None:
    """The same for the driver, in which rewards are only tried."""
    global _driver
    _driver = True
    _wrap(_DRIVER_POINTS)


def reach(point: str) -> None:
    """This process is at a point of the run; a fault that is due strikes it."""
    folder = Path(os.environ[FOLDER])
    if (_driver and point in REWARD_POINTS) or not (folder / BEGUN).exists():
        return
    for number, fault in enumerate(_plan(folder)):
        if fault["point"] == point and _passage(folder / f"fault_{number}") == fault["nth"]:
            record = {**fault, "number": number, "pid": os.getpid(), "time": time.time()}
            _append(folder / "fired.jsonl", (json.dumps(record) + "\n").encode())
            _strike(fault)


def _plan(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "plan.json").read_text())


def _wrap(points: dict[str, tuple[str, Callable[..., bool]]]) -> None:
    folder = Path(os.environ[FOLDER])
    _append(folder / "pids", f"{os.getpid()} {this_node()}\n".encode())
    for point in {fault["point"] for fault in _plan(folder)} & points.keys():
        (module, _, path), counts = points[point][0].partition(":"), points[point][1]
        *parents, name = path.split(".")
        owner = functools.reduce(getattr, parents, importlib.import_module(module))
        setattr(owner, name, _reaching(point, getattr(owner, name), counts))


def _reaching(point: str, function: Callable[..., Any], counts: Callable[..., bool]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if counts(*args, **kwargs):
            reach(point)
        return function(*args, **kwargs)

    return wrapped


def _passage(path: Path) -> int:
    """Which passage of all processes this one is."""
    return _append(path, b".")


def _append(path: Path, data: bytes) -> int:
    """The file's size after `data`, which no other process writes into."""
    descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    try:
        os.write(descriptor, data)
        return os.lseek(descriptor, 0, os.SEEK_CUR)
    finally:
        os.close(descriptor)


def _strike(fault: dict[str, Any]) -> None:
    how, point = fault["how"], fault["point"]
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "slow":
        time.sleep(fault["seconds"])
    elif how == "raise":
        raise Injected(f"injected at {point}")
    elif how == "full":
        raise OSError(28, f"No space left on device, injected at {point}")
    elif how == "node":
        _lose_power(fault["role"])


def _lose_power(role: str) -> None:
    """Have all processes of a node ended; where it is not this one's, go on then."""
    path = Path(os.environ[FOLDER]) / CUT
    path.with_suffix(".tmp").write_text(json.dumps({"role": role, "node": this_node()}))
    path.with_suffix(".tmp").rename(path)
    while path.exists():
        time.sleep(0.05)


def this_node() -> str:
    """Of a worker, as Ray started it; empty in the driver."""
    words = (word.partition("=") for word in sys.argv)
    return next((value for name, _, value in words if name == "--node-id"), "")
