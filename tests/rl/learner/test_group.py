"""The group of learner ranks as the controller sees it: one dead or silent rank must not stall the run."""

import os
import time
from itertools import count
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError

from core.cluster.ranks import RankLost
from core.failures import ObjectsLost
from rl.learner import worker
from rl.learner.batching import RankShare, SampleRef
from rl.learner.worker import LearnerGroup, LearnerRank


class Rank:
    """Stands where a learner rank does: one dies, the other waits for it as in a collective."""

    def __init__(self, rank):
        self.rank = rank

    def address(self):
        return "127.0.0.1", 1

    def setup(self, address, port):
        return True

    def begin_stage(self):
        if self.rank == 1:
            os._exit(1)
        time.sleep(600)

    def sees(self, folder):
        return self.rank == 0

    def set_negative(self, negative):
        time.sleep(600)


def test_a_dead_rank_ends_the_wait_for_the_others(ray_session, tmp_path):
    actors = [ray.remote(Rank).options(num_cpus=0.1).remote(rank) for rank in range(2)]
    group = LearnerGroup(actors, call_timeout_s=300, start_timeout_s=240)
    with pytest.raises(RankLost, match=r"ranks \[1\] do not see .*file system that all nodes share"):
        group.check_sees(tmp_path)
    started = time.monotonic()
    with pytest.raises(RankLost, match="rank 1 died in begin_stage"):
        group.begin_stage()
    assert time.monotonic() - started < 200  # not the 300 s that the living rank would have taken
    for actor in actors:
        ray.kill(actor)


def test_a_silent_rank_is_bounded_in_time(ray_session):
    actors = [ray.remote(Rank).options(num_cpus=0.1).remote(0)]
    group = LearnerGroup(actors, call_timeout_s=2, start_timeout_s=240)
    with pytest.raises(RankLost, match="set_negative took longer than 2 s"):
        group.set_negative(None)
    ray.kill(actors[0])


@pytest.mark.parametrize("error", [GetTimeoutError("late"), ObjectLostError("1f", None, "")])
def test_samples_that_a_node_took_are_told_before_any_rank_trains(monkeypatch, error):
    def get(references, timeout):
        raise error

    monkeypatch.setattr(worker.ray, "get", get)
    sample = SampleRef(0, 0, "trajectory", 0, "conditioning", (0,), 1.0)
    rank = LearnerRank(SimpleNamespace(replica=SimpleNamespace(threads=1)), 0, 1)
    with pytest.raises(ObjectsLost, match="samples did not arrive"):
        rank.fetch([RankShare((sample,), 1)])


def test_the_seconds_of_an_update_are_those_that_passed(monkeypatch):
    clock = count(1e9, -3600.0)  # set back again and again
    monkeypatch.setattr(worker.time, "time", lambda: next(clock))
    rank = LearnerRank(SimpleNamespace(replica=SimpleNamespace(threads=1)), 0, 1)
    rank.learner = SimpleNamespace(set_learning_rate=lambda rate: None, update=lambda shares: ["stats"])
    stats, _, seconds = rank.update(1e-3)
    assert stats == ["stats"] and 0 <= seconds < 60
