"""A Ray of several nodes on this machine, from which the power is taken: all processes of a node end at once.

Nodes differ in CPUs and a run takes all of them, so that each role is on a node of its own: two learner ranks, two
rollout workers, and the encode worker with the reward worker. The driver is on the head, which has no CPUs.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray

from tests.chaos.faults import CUT
from tests.chaos.harness import LOOK_S, NOW, placed_pids
from tests.fakes.forked_workers import WorkerServer

CPUS = {"learner": 4, "rollout": 2, "helper": 1}
NODES = ("learner", "learner", "rollout", "rollout", "helper")
TAKES = {
    "learner_cpus": CPUS["learner"],
    "rollout_cpus": CPUS["rollout"],
    "encode_cpus": CPUS["helper"] / 2,
    "reward_cpus": CPUS["helper"] / 2,
}
"""Of the recipe's `resources`."""
SETTINGS = {
    "health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 6,
    "max_direct_call_object_size": 4000, "kill_worker_timeout_milliseconds": 500,
}  # fmt: skip
"""Ray's: a node is missed after 3 s instead of 15, and small tensors too are objects of the node that made them."""
START_S = 90.0


class Nodes:
    """This process is the head's driver afterwards. `lost` counts nodes whose power was taken."""

    def __init__(self, folder: Path):
        from ray.cluster_utils import Cluster

        self._workers, self._roles, self.lost = WorkerServer(folder), dict[str, str](), 0
        self.python = self._workers.python
        store = {"object_store_memory": 100_000_000}
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": SETTINGS, **store}
        with self._workers.shortened():
            self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self._cluster.address
        ray.init(address=self.address, log_to_driver=False, runtime_env={"py_executable": self.python})
        for role in NODES:
            self.add(role)
        self.complete()
        self._workers.start()

    def add(self, role: str) -> None:
        with self._workers.shortened():
            node = self._cluster.add_node(wait=False, num_cpus=CPUS[role], object_store_memory=100_000_000)
        self._roles[node.node_id] = role

    def complete(self) -> None:
        """Replace the nodes that were lost, and wait until Ray has all. Raises TimeoutError after `START_S`."""
        for role in CPUS:
            for _ in range(NODES.count(role) - list(self._roles.values()).count(role)):
                self.add(role)
        end = time.monotonic() + START_S
        while {node["NodeID"] for node in ray.nodes() if node["Alive"]} - {
            self._cluster.head_node.node_id
        } != {*self._roles}:
            if time.monotonic() > end:
                raise TimeoutError(f"nodes are not as started after {START_S:g} s: {ray.nodes()}")
            time.sleep(LOOK_S)

    def watch(self, folder: Path, *, joins: bool) -> Callable[[list[int]], None]:
        """`meanwhile` of a run of the harness in `folder`: takes the power from the node that a fault asks for, and
        lets another one join at once where one `joins`."""
        asked = folder / NOW / CUT

        def look(_: list[int]) -> None:
            if asked.exists():
                role = self._cut(json.loads(asked.read_text()), asked.parent)
                if joins:
                    self.add(role)
                asked.unlink()

        return look

    def _cut(self, asked: dict[str, Any], cell: Path) -> str:
        """End a node. Returns its role."""
        node_id = asked["node"] if not asked["role"] else self._first(asked["role"])
        (node,) = [n for n in self._cluster.worker_nodes if n.node_id == node_id]
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        forked = [
            psutil.Process(pid) for pid, on in placed_pids(cell) if on == node_id and psutil.pid_exists(pid)
        ]
        gone = [raylet, *raylet.children(recursive=True), *forked]
        for act in (psutil.Process.suspend, psutil.Process.kill):
            for process in gone:
                if process.is_running():
                    act(process)
        self._cluster.remove_node(node, allow_graceful=False)
        self.lost += 1
        return self._roles.pop(node_id)

    def _first(self, role: str) -> str:
        return next(node for node, its in self._roles.items() if its == role)

    def close(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()
        self._workers.close()
