"""A node that leaves while its worker has calls, and another one that comes, on a real Ray with a tiny actor on each.
Only the extra nodes have GPUs, by Ray's count."""

import time

import pytest

from core.cluster.actors import PlacedActors, wait_ready
from core.cluster.dispatch import Dispatcher
from core.cluster.placement import uniform_plan
from core.cluster.workers import Call

SLOWEST_S = 90.0
"""Of one change among nodes, on a machine that has other work."""


class Worker:
    def ready(self):
        return True

    def work(self, key):
        import ray

        time.sleep(0.05)
        return key, ray.get_runtime_context().get_node_id()


class Nodes:
    """Nodes beside the session's own, each with one GPU."""

    def __init__(self, ray):
        from ray.cluster_utils import Cluster

        self._ray, self._cluster = ray, Cluster()
        self._cluster.head_node = ray._private.worker.global_worker.node

    def add(self):
        return self._cluster.add_node(wait=False, num_cpus=1, num_gpus=1, object_store_memory=80_000_000)

    def remove(self, node):
        self._cluster.remove_node(node)

    def close(self):
        for node in list(self._cluster.worker_nodes):
            self.remove(node)
        until(lambda: not self._ray.cluster_resources().get("GPU"))


def until(condition):
    end = time.monotonic() + SLOWEST_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture
def nodes(ray_session):
    made = Nodes(ray_session)
    yield made
    made.close()


def calls(dispatcher, count):
    """The nodes that made `count` calls, each of which came back once."""
    for key in range(count):
        dispatcher.submit(Call("task", key, "work", (key,)))
    done = [dispatcher.wait() for _ in range(count)]
    assert sorted(d.result[0] for d in done) == list(range(count)) and not dispatcher.outstanding()
    return {d.result[1] for d in done}


def test_workers_go_with_their_node_and_come_back_with_another(ray_session, nodes, monkeypatch):
    monkeypatch.setattr("core.cluster.dispatch._POLL_S", 0.2)
    first, _ = nodes.add(), nodes.add()
    until(lambda: ray_session.cluster_resources().get("GPU") == 2)
    placed = PlacedActors(uniform_plan("task", 2, 0.1, 1), "the plan", "", SLOWEST_S)
    try:
        actors = placed.start("task", ray_session.remote(Worker), lambda kind, _: kind.remote(), restarts=3)
        wait_ready(placed.by_role, SLOWEST_S)
        made = Dispatcher(call_timeout_s=60.0, start_timeout_s=0.5, on_node=placed.on_node)
        made.add_pool("task", actors)
        assert first.node_id in calls(made, 8)

        for key in range(4):  # two are on their way to each worker
            made.submit(Call("task", key, "work", (key,)))
        nodes.remove(first)
        until(lambda: not all(placed.on_node("task", i) for i in range(2)))
        assert sorted(made.wait().call.key for _ in range(4)) == list(range(4))
        (left,) = calls(made, 8)
        until(lambda: made._turn() or "absent" in [w.state for w in made._pools["task"].workers])

        made._start_timeout_s = SLOWEST_S
        second = nodes.add()
        until(lambda: made._turn() or len(made.workers("task")) == 2)
        assert calls(made, 8) == {left, second.node_id} and made.restarts == 1
    finally:
        placed.close()
