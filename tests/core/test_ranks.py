"""Ranks of a supervised run: one dead or silent rank must not stall it, and a cluster that is too small is named."""

import os
import time
from dataclasses import dataclass

import pytest

from core.cluster import ranks as module
from core.cluster.ranks import LocalRank, RankLost, RayRanks, start_ranks


@dataclass
class Resources:
    device: str = "cpu"
    rank_cpus: float = 0.1
    placement_timeout_s: float = 60.0
    start_timeout_s: float = 240.0
    call_timeout_s: float = 300.0


class Rank:
    """Stands where a training rank does: rank 1 dies, the other waits for it as in a collective."""

    def __init__(self, number):
        self.number = number

    def setup(self, address, port):
        self.at = address

    def address(self):
        return "127.0.0.1", 1

    def twice(self, value):
        return self.number, 2 * value

    def fail(self):
        if self.number == 1:
            raise FloatingPointError("loss is nan")
        time.sleep(600)

    def die(self):
        if self.number == 1:
            os._exit(1)
        time.sleep(600)

    def part(self):
        """Rank 0's collective fails before its neighbour's death is known."""
        if self.number == 1:
            time.sleep(1)
            os._exit(1)
        raise RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer")

    def disconnect(self):
        raise RuntimeError("[/third_party/gloo/gloo/transport/tcp/buffer.cc:78] Timed out waiting 5000ms")

    def sleep(self):
        time.sleep(600)


def test_one_rank_needs_no_ray():
    ranks = start_ranks(Rank, 1, Resources())
    assert isinstance(ranks, LocalRank) and ranks.call("twice", 3) == [(0, 6)]


def test_answers_come_in_order_and_a_rank_that_fails_ends_the_wait_for_the_others(ray_session, monkeypatch):
    monkeypatch.setattr(module, "LOOK_S", 0.2)
    ranks = start_ranks(Rank, 2, Resources())
    try:
        assert ranks.call("twice", 3) == [(0, 6), (1, 6)]
        with pytest.raises(FloatingPointError, match="loss is nan"):
            ranks.call("fail")
        with pytest.raises(RankLost, match=r"rank \d failed in disconnect \(RuntimeError: .*Timed out"):
            ranks.call("disconnect")
    finally:
        ranks.close()


def test_a_dead_rank_is_named(ray_session):
    ranks = start_ranks(Rank, 2, Resources())
    try:
        with pytest.raises(RankLost, match="rank 1 died in die "):
            ranks.call("die")
    finally:
        ranks.close()


def test_a_dead_rank_is_named_though_its_neighbour_fails_first(ray_session, monkeypatch):
    monkeypatch.setattr(module, "LOOK_S", 60.0)
    ranks = start_ranks(Rank, 2, Resources())
    try:
        with pytest.raises(RankLost, match="rank 1 died in part .*worker process has died"):
            ranks.call("part")
    finally:
        ranks.close()


def test_a_first_rank_without_room_is_a_sentence(ray_session):
    ray = pytest.importorskip("ray")
    actor = ray.remote(Rank).options(resources={"absent": 1}).remote(0)
    with pytest.raises(
        RankLost, match="rank 0 did not start within resources.start_timeout_s=0.5 s; see `ray"
    ):
        module.rendezvous(actor, 0.5)


def test_a_silent_rank_is_bounded_in_time(ray_session):
    ranks = RayRanks(Rank, 2, Resources())
    ranks.resources.call_timeout_s = 1.0
    try:
        with pytest.raises(RankLost, match="sleep took longer than 1 s on 2 of 2 ranks"):
            ranks.call("sleep")
    finally:
        ranks.close()


def test_a_cluster_that_is_too_small_is_named_at_once(ray_session):
    with pytest.raises(RankLost, match="2 ranks needs 128 CPUs, the cluster has 16; add nodes"):
        start_ranks(Rank, 2, Resources(rank_cpus=64.0))
