"""Requests in chunks become whole results, scored ones with their score; a failure takes its own request alone."""

from dataclasses import replace
from functools import partial

import pytest

from core.cluster.workers import Done
from core.failures import DataFailure, ObjectsLost
from core.progress import Progress
from core.prompts import Prompt
from rewards.scoring import GroupScore
from rl.workers.collect import Collector
from rl.workers.requests import RolloutRequest, RolloutResult, alone, batch_requests, encode_call
from rollout.engine import SampleInfo
from rollout.sampler import SamplingSpec
from rollout.shapes import Shape
from rollout.worker import Policy

SPEC = SamplingSpec(4, 0.0, 1.0, variant="ode")
POLICY = Policy(1, "f" * 64, ())


class Wire:
    """The dispatcher as far as the collector sees it; calls come back in reverse order, and `broken` ones fail."""

    def __init__(self, broken=(), sha256=POLICY.sha256, lost=()):
        self.broken, self.sha256, self.calls, self.lost = broken, sha256, [], list(lost)

    def workers(self, role):
        return [None]

    def stream(self, role, calls, *, ahead=None):
        calls = list(calls)
        self.calls += [call for call in calls if role != "encode"]
        for call in calls if role == "encode" else reversed(calls):
            if (role, call.key) in self.lost:
                self.lost.remove((role, call.key))
                yield Done(call, (), None, ObjectsLost(f"the node of {role} {call.key} is gone"))
            elif role == "encode":
                prompts, _ = call.args
                yield Done(call, (len(prompts), *(f"c {prompt.index}" for prompt in prompts)), len(prompts))
            elif (role, call.key) in self.broken:
                yield Done(call, (), None, DataFailure(f"{role} {call.key} is broken"))
            elif role == "rollout":
                info = SampleInfo(call.key[0], call.key[1], 1, self.sha256, 0.5, 10.0, "node:1")
                yield Done(call, tuple(f"{what} of {call.key}" for what in ("info", "t", "i")), info)
            else:
                rewards = [0.5] * len(call.args[2])
                yield Done(
                    call,
                    (),
                    GroupScore(call.key, rewards, [], {"red": rewards}, {}, {}, {"red": 2.0}, False, ""),
                )


def collector(wire):
    return Collector(wire, Progress())


def sampling(own, step=0):
    return partial(own.sample, spec=SPEC, policy=POLICY, step=step, chunk_size=2)


def group(number, size=5):
    return RolloutRequest(number, (Prompt(number, "t2i", "x"),), tuple(range(size)))


def by_id(results):
    found = list(results)
    assert len({r.request.id for r in found}) == len(found), "one result for each request"
    return {r.request.id: r for r in found}


def test_chunks_come_together_in_order_and_are_scored_as_one():
    wire = Wire()
    own = collector(wire)
    results = by_id(own.score([group(3), group(4)], sampling(own, step=7), "set", step=7))
    assert [(c.first, c.size, c.trajectory) for c in results[3].chunks] == [
        (0, 2, "t of (3, 0, 2)"), (2, 2, "t of (3, 2, 2)"), (4, 1, "t of (3, 4, 1)"),
    ]  # fmt: skip
    assert results[4].score.rewards == [0.5] * 5 and results[4].failure == ""
    assert {results[3].conditioning_of(k) for k in range(5)} == {"c 3"}
    assert own.take_images() == 10 and own.take_images() == 0
    assert {(s.name, s.step) for s in own.spans} == {("rollout", 7), ("reward", 7)}
    scored = [call for call in wire.calls if call.role == "reward"]
    assert scored[-1].args[3:] == tuple(chunk.images for chunk in results[scored[-1].key].chunks)


def test_a_batch_gives_every_sample_the_conditioning_of_its_prompt():
    wire = Wire()
    prompts = [Prompt(i, "t2i", f"p{i}") for i in range(5)]
    results = by_id(collector(wire).sample(batch_requests(prompts, list(range(5)), 2), SPEC, POLICY, step=0))
    assert [call.args[4:] for call in wire.calls] == [("c 0", "c 1"), ("c 2", "c 3"), ("c 4",)]
    assert [r.request.seeds for r in map(results.get, (0, 2, 4))] == [(0, 1), (2, 3), (4,)]
    many = RolloutRequest(0, tuple(prompts[:2]), tuple(range(6)))
    assert [many.prompt_of(k).index for k in range(6)] == [0, 0, 0, 1, 1, 1]


def test_batches_hold_one_shape_and_have_fixed_places():
    prompts, seeds = [Prompt(i, "t2i", f"p{i}") for i in range(7)], list(range(10, 17))
    square, wide = Shape((32, 32)), Shape((16, 32))
    shapes = [square, wide, square, square, wide, wide, square]
    found = batch_requests(prompts, seeds, 2, shapes)
    assert [(r.id, r.places, r.shape) for r in found] == [
        (0, (0, 2), square), (1, (1, 4), wide), (3, (3, 6), square), (5, (5,), wide),
    ]  # fmt: skip
    assert all(r.seeds == tuple(10 + p for p in r.places) for r in found)
    assert all(tuple(prompt.index for prompt in r.prompts) == r.places for r in found)
    assert [(r.id, r.places, r.seeds, r.size) for r in alone(found[1])] == [
        (1, (1,), (11,), (16, 32)), (4, (4,), (14,), (16, 32)),
    ]  # fmt: skip
    equal = batch_requests(prompts, seeds, 3, [square] * 7)
    assert [(r.id, r.places) for r in equal] == [(0, (0, 1, 2)), (3, (3, 4, 5)), (6, (6,))]


def test_the_size_of_a_request_goes_to_encoder_and_sampler():
    request = replace(group(3), shape=Shape((16, 32)))
    assert encode_call(request).args == (list(request.prompts), (16, 32))
    (call, *_) = collector(Wire()).sample_calls(RolloutResult(request, ("c",)), SPEC, POLICY, 2)
    assert call.args[0].size == (16, 32)


def test_a_failure_on_either_way_takes_its_own_request_alone():
    broken = {("rollout", (1, 0, 2)), ("rollout", (1, 2, 2)), ("reward", 2)}
    own = collector(Wire(broken))
    results = by_id(own.score([group(n) for n in (1, 2, 3)], sampling(own), "set", step=0))
    assert "rollout (1, 2, 2) is broken" in results[1].failure, "the first of its chunks that failed"
    assert "reward 2 is broken" in results[2].failure and results[2].score is None
    assert results[3].score is not None


@pytest.mark.parametrize(
    "lost", [("encode", 1), ("rollout", (1, 2, 2)), ("reward", 1)], ids=["conditioning", "chunk", "images"]
)
def test_what_a_node_took_with_it_is_drawn_again(lost):
    own = collector(Wire(lost=[lost]))
    results = by_id(own.score([group(1), group(2)], sampling(own), "set", step=0))
    assert all(result.score is not None and not result.failure for result in results.values())
    drawn = [call.key for call in own.dispatcher.calls if call.role == "rollout"]
    assert drawn.count((2, 0, 2)) == 1, "what was kept is not drawn again"
    assert results[1].chunks[0].trajectory == "t of (1, 0, 2)"


def test_nodes_that_leave_again_and_again_stop_the_run():
    own = collector(Wire(lost=[("reward", 1)] * 3))
    with pytest.raises(ObjectsLost, match="1 requests were lost with their nodes 3 times"):
        list(own.score([group(1)], sampling(own), "set", step=0))


def test_a_sample_of_another_policy_stops_the_run():
    own = collector(Wire(sha256="0" * 64))
    with pytest.raises(
        RuntimeError, match="node:1 sampled with adapter 000000000000, asked for was ffffffffffff"
    ):
        list(own.sample([group(1)], SPEC, POLICY, step=0))
