"""What has learner ranks started again, and what ends the run at once."""

from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError

from core.checkpoints import CheckpointError
from core.cluster.dispatch import PoolExhausted
from core.cluster.ranks import NodeLost, RankLost, RanksBlind, gather
from rl.loop import cluster as clusters
from rl.loop import restarts
from rl.recipe.schema import ResourcesConfig, RunConfig
from rl.record.state import RunState


class Learner:
    def __init__(self, dead):
        self.dead = dead

    def check_alive(self):
        if self.dead:
            raise RankLost("rank 0 died in ready")


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Trains with a controller that raises these errors one after the other, then ends; tells where each one began."""

    def trained(*errors, allowed=3, dead=False, stopping=False, begin=None):
        begun, told, left = [], [], list(errors)

        class Controller:
            def __init__(self, config, cluster, run_dir, state, checkpoint, *, fresh, watch):
                begun.append((checkpoint, state.learner_restarts, state.restarts, fresh))

            def run(self):
                if left:
                    raise left.pop(0)

        monkeypatch.setattr(restarts, "Controller", Controller)
        monkeypatch.setattr(restarts, "begin_at", begin or (lambda *args: ("step_2", RunState(step=2))))
        cluster = SimpleNamespace(learner=Learner(dead), restart_learner=lambda: told.append("restart"))
        watch = SimpleNamespace(stopping=stopping, restarted=told.append)
        config = RunConfig(name="x", resources=ResourcesConfig(learner_restarts=allowed))
        start = None, RunState(step=3, restarts=5)
        try:
            restarts.train_with_restarts(config, cluster, tmp_path, start, fresh=True, watch=watch)
        finally:
            trained.begun, trained.told = begun, told

    return trained


def test_a_lost_rank_goes_on_from_the_last_checkpoint_and_is_counted(train):
    train(RankLost("rank 1 died"), RankLost("rank 2 died"))
    assert train.begun == [(None, 0, 5, True), ("step_2", 1, 5, False), ("step_2", 2, 5, False)]
    assert train.told == [1, "restart", 2, "restart"]


@pytest.mark.parametrize("allowed", [0, 1])
def test_one_loss_more_than_allowed_stops_by_the_rank(train, allowed):
    losses = [RankLost("rank 1 died"), RankLost("rank 2 died in update")][1 - allowed :]
    used_up = f"rank 2 died in update; resources.learner_restarts={allowed} are used up"
    with pytest.raises(RankLost, match=used_up):
        train(*losses, allowed=allowed)


@pytest.mark.parametrize("error", [ValueError("loss is nan"), RanksBlind("ranks [1] do not see")])
def test_what_fresh_ranks_would_meet_again_stops_at_once(train, error):
    with pytest.raises(type(error)):
        train(error)
    assert train.told == []


def test_a_run_that_is_to_stop_is_not_begun_again(train):
    with pytest.raises(RankLost):
        train(RankLost("rank 1 died"), stopping=True)
    assert train.told == []


def test_ranks_that_sample_are_lost_where_no_worker_is_left(train):
    train(PoolExhausted("0 rollout workers are left"), dead=True)
    assert train.told == [1, "restart"]
    with pytest.raises(PoolExhausted):
        train(PoolExhausted("0 reward workers are left"), dead=False)


def test_a_lost_rank_is_still_named_where_no_checkpoint_can_be_used(train):
    def refuse(*_):
        raise CheckpointError(["no checkpoint can be used"])

    with pytest.raises(RankLost, match="rank 1 died; .*no checkpoint can be used"):
        train(RankLost("rank 1 died"), begin=refuse)


@pytest.fixture
def restart(monkeypatch):
    """Starts two ranks again, of which rank 1 has a node or not, with these errors one after the other."""

    def started(*errors, nodes=(True, True)):
        left, stopped = list(errors), []

        def join(ranks, resources):
            if left:
                raise left.pop(0)
            return f"a group of {ranks}"

        monkeypatch.setattr(clusters, "_place_ranks", lambda placed, spec: ["rank 0", "rank 1"])
        monkeypatch.setattr(clusters, "_join", join)
        placed = SimpleNamespace(stop=stopped.append, on_node=lambda role, rank: nodes[rank])
        workers = SimpleNamespace(placed=placed, dispatcher=SimpleNamespace(abandon=lambda: None))
        made = clusters.Cluster(workers, None, SimpleNamespace(inprocess=False), ResourcesConfig(), {})
        made.restart_learner()
        return made.learner, stopped

    return started


def test_ranks_placed_on_a_node_that_had_left_are_placed_once_more(restart):
    assert restart(NodeLost("rank 0 died in its start")) == (
        "a group of ['rank 0', 'rank 1']",
        ["learner"] * 2,
    )
    with pytest.raises(NodeLost, match="rank 1"):
        restart(NodeLost("rank 0 died in its start"), NodeLost("rank 1 died in setup"))
    with pytest.raises(RankLost, match="^rank 0 was killed"):
        restart(RankLost("rank 0 was killed"))


def test_a_rank_without_a_node_is_named_though_another_waits_for_it(restart):
    with pytest.raises(RankLost, match=r"no node has room for ranks \[1\] .*setup took longer .*\[0\]"):
        restart(RankLost("setup took longer than 25 s on 1 of 2 ranks ([0])"), nodes=(True, False))


def test_a_rank_that_went_with_its_node_is_told_from_others(monkeypatch):
    def get(call, timeout):
        raise RayActorError(error_msg=call)

    monkeypatch.setattr("ray.wait", lambda calls, **_: (calls[:1], calls[1:]))
    monkeypatch.setattr("ray.get", get)
    with pytest.raises(NodeLost, match="rank 0 died in setup"):
        gather(["The actor died because its node has died. Node Id: 61f0"], "setup", 1.0)
    with pytest.raises(RankLost) as other:
        gather(["The actor is dead because its worker process has died."], "setup", 1.0)
    assert not isinstance(other.value, NodeLost)
