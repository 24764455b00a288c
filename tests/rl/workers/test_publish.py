"""A publish is believed only on proof: the hash of the live weights, and outputs that moved."""

from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import GetTimeoutError, RayActorError

from models.lora.attach import Adapter
from rl.learner.worker import make_adapter
from rl.workers import publish as adapters
from rl.workers.publish import PublishError, check_receipt, publish
from rollout.engine import AdapterReceipt
from rollout.worker import Policy

ADAPTER = make_adapter(4, {"a.lora_B.weight": torch.ones(2, 2)})
BEFORE = Policy(3, "0" * 64, ())


def receipt(version=4, sha256=ADAPTER.sha256, shift=0.1, replaced=BEFORE.sha256):
    return AdapterReceipt("node:1", version, sha256, shift, replaced)


def test_the_hash_is_of_the_tensors():
    assert make_adapter(9, {"a.lora_B.weight": torch.ones(2, 2)}).sha256 == ADAPTER.sha256
    for other in (torch.zeros(2, 2), torch.ones(4), torch.ones(2, 2, dtype=torch.bfloat16)):
        assert make_adapter(4, {"a.lora_B.weight": other}).sha256 != ADAPTER.sha256
    assert make_adapter(4, {"b.lora_B.weight": torch.ones(2, 2)}).sha256 != ADAPTER.sha256


def test_a_true_receipt_passes():
    check_receipt(receipt(), ADAPTER, BEFORE)


@pytest.mark.parametrize("wrong", [receipt(version=3), receipt(sha256="f" * 64)])
def test_other_weights_are_refused_with_the_replicas_name(wrong):
    with pytest.raises(PublishError, match="replica node:1 holds version .* did not arrive whole"):
        check_receipt(wrong, ADAPTER, BEFORE)


def test_new_weights_that_change_no_output_are_refused():
    with pytest.raises(PublishError, match="its outputs did not move.*Check model.lora.targets"):
        check_receipt(receipt(shift=0.0), ADAPTER, BEFORE)


@pytest.mark.parametrize("previous", [None, BEFORE])
def test_a_policy_that_diverged_is_refused_before_it_reaches_a_checkpoint(previous):
    with pytest.raises(PublishError, match="outputs are not finite.*lower learner.learning_rate"):
        check_receipt(receipt(shift=float("nan")), ADAPTER, previous)


def test_unchanged_weights_need_not_move_anything():
    """The first publish (B is zero) and a publish of the same adapter again."""
    check_receipt(receipt(shift=0.0), ADAPTER, None)
    check_receipt(receipt(shift=0.0), ADAPTER, Policy(3, ADAPTER.sha256, ()))


def test_a_replica_that_held_the_weights_already_need_not_move():
    """A stage begins from the average, which the replica has just evaluated."""
    check_receipt(receipt(shift=0.0, replaced=ADAPTER.sha256), ADAPTER, BEFORE)


SILENT = object()


class Worker:
    """A rollout worker at the wire: its call gives a receipt, or an error when it is fetched."""

    def __init__(self, answer):
        self.answer = answer
        self.load_adapter = SimpleNamespace(remote=lambda ref: self)


class Pool:
    """The dispatcher as far as `publish` sees it. `back`: workers that come back."""

    def __init__(self, *workers, back=()):
        self.all, self.lost, self.back, self.hung = list(workers), [], list(back), []

    def workers(self, role):
        return self.all

    def await_workers(self, role):
        return self.back or self.all

    def report_lost(self, role, worker, *, hung=False):
        self.lost.append(worker)
        self.hung += [worker] if hung else []


@pytest.fixture(autouse=True)
def _wire(monkeypatch):
    def get(worker, timeout):
        if isinstance(worker.answer, Exception):
            raise worker.answer
        return worker.answer

    def wait(refs, num_returns, timeout):
        ready = [worker for worker in refs if worker.answer is not SILENT]
        waits.append(timeout)
        return ready[:1], []

    waits = []
    monkeypatch.setattr(adapters, "time", SimpleNamespace(monotonic=lambda: 0.4 * len(waits)))
    monkeypatch.setattr(adapters.ray, "wait", wait)

    monkeypatch.setattr(adapters.ray, "put", lambda value: ("ref", value))
    monkeypatch.setattr(adapters.ray, "get", get)
    return waits


def test_publishing_gives_the_policy_to_ask_for():
    policy = publish(ADAPTER, Pool(Worker(receipt()), Worker(receipt())), previous=BEFORE, timeout_s=1)
    assert policy == Policy(4, ADAPTER.sha256, (("ref", ADAPTER),))
    assert isinstance(policy.adapter[0][1], Adapter)


def test_a_silent_worker_is_taken_out_and_the_rest_go_on():
    silent = Worker(GetTimeoutError("no answer"))
    pool = Pool(silent, Worker(receipt()))
    publish(ADAPTER, pool, previous=BEFORE, timeout_s=1)
    assert pool.lost == [silent]


def test_silent_workers_share_one_limit_and_are_restarted(_wire):
    silent = [Worker(SILENT), Worker(SILENT)]
    pool = Pool(silent[0], Worker(receipt()), silent[1])
    publish(ADAPTER, pool, previous=BEFORE, timeout_s=1)
    assert pool.hung == silent and _wire == [1.0, pytest.approx(0.6)], "the first answer took .4 s of it"


def test_a_worker_that_comes_back_can_prove_it_alone():
    gone, back = Worker(RayActorError()), Worker(receipt())
    pool = Pool(gone, back=[back])
    publish(ADAPTER, pool, previous=BEFORE, timeout_s=1)
    assert pool.lost == [gone] and pool.hung == []


def test_a_publish_that_nobody_proved_is_refused():
    with pytest.raises(PublishError, match="no replica has shown that it samples with version 4"):
        publish(ADAPTER, Pool(Worker(RayActorError())), previous=BEFORE, timeout_s=1)


def test_one_wrong_replica_stops_the_run():
    pool = Pool(Worker(receipt()), Worker(receipt(sha256="f" * 64)))
    with pytest.raises(PublishError):
        publish(ADAPTER, pool, previous=BEFORE, timeout_s=1)
