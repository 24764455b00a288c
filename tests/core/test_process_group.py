"""How long ranks wait for each other: while they are set up as long as a start may take, and then for a collective."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from core.cluster.process_group import limit_collectives
from core.training import supervised
from rl.learner import worker
from tests.core.test_supervised import Rank


@pytest.fixture
def events(monkeypatch):
    """What a rank does in its set-up, in order."""
    seen = []
    for module in (worker, supervised):
        monkeypatch.setattr(
            module, "join_process_group", lambda timeout_s, **_: seen.append(("join", timeout_s))
        )
        monkeypatch.setattr(
            module, "limit_collectives", lambda timeout_s: seen.append(("collectives", timeout_s))
        )
    return seen


def test_a_learner_rank_may_load_its_model_for_as_long_as_a_start_may_take(events, monkeypatch):
    spec = SimpleNamespace(
        replica=SimpleNamespace(threads=1, device="cpu"), inprocess=False,
        start_timeout_s=90.0, collective_timeout_s=2.0,
    )  # fmt: skip
    monkeypatch.setattr(worker, "Learner", lambda spec: events.append("model"))
    worker.LearnerRank(spec, 0, 2).setup("127.0.0.1", 1)
    assert events == [("join", 90.0), "model", ("collectives", 2.0)]


def test_so_may_a_rank_of_another_training(events, monkeypatch):
    rank = Rank([])
    rank.rank, rank.device, rank._make_engine = 0, "cpu", lambda model: events.append("model")
    rank.settings = SimpleNamespace(
        ranks=2, ema_decay=None, resources=SimpleNamespace(start_timeout_s=90.0, collective_timeout_s=2.0)
    )
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    rank.setup("127.0.0.1", 1)
    assert events == [("join", 90.0), "model", ("collectives", 2.0)]


def test_the_limit_of_a_group_that_is_joined_changes(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=90)
    )
    try:
        limit_collectives(2.0)
        gloo = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        assert gloo.options._timeout == timedelta(seconds=2)
    finally:
        torch.distributed.destroy_process_group()
