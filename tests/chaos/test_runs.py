"""One kill and one hang of every kind of worker, in real runs: the end is that of the undisturbed one, to the bit.

`make chaos` has every fault at every point by itself, nodes and drivers, and long runs under fire.
"""

import json

import pytest
import ray

from tests.chaos.harness import Chaos, Fault, result


@pytest.fixture(scope="module")
def chaos(ray_session, worker_server, tmp_path_factory):
    address = ray.get_runtime_context().gcs_address
    harness = Chaos(tmp_path_factory.mktemp("chaos"), address, worker_server.python)
    assert harness.run("straight").state == "finished"
    assert harness.left("straight") == []
    yield harness
    harness.close()


def test_workers_and_services_killed_and_hung_change_nothing(chaos):
    """In the second step the encoder hangs at the last prompt, and the reward at the first: one wait for both."""
    faults = [
        Fault("encode", "kill", 2), Fault("denoise", "kill", 8), Fault("reward", "kill", 4),
        Fault("served", "kill", 6), Fault("evaluate", "kill", 4), Fault("publish", "kill", 5),
        Fault("encode", "stop", 9), Fault("reward", "stop", 10), Fault("denoise", "stop", 36),
        Fault("served", "stop", 12),
    ]  # fmt: skip
    outcome = chaos.run("healed", *faults)
    assert outcome.state == "finished", outcome
    assert {fault["number"] for fault in outcome.fired} == set(range(len(faults))), outcome.fired
    lines = (chaos.out("healed") / "metrics.jsonl").read_text().splitlines()
    again = sum(json.loads(line).get("workers/redispatched_chunks", 0) for line in lines)
    assert again >= 5, "chunks, scores and prompts of the workers that were lost"
    assert result(chaos.out("healed")) == result(chaos.out("straight"))
    assert chaos.left("healed") == []


def test_a_rank_killed_and_a_rank_hung_cost_a_restart_of_the_ranks_each(chaos):
    outcome = chaos.run("ranks", Fault("micro_batch", "kill", 9), Fault("save", "stop", 3))
    assert outcome.state == "finished", outcome
    assert len(outcome.fired) == 2, outcome.fired
    assert json.loads((chaos.out("ranks") / "status.json").read_text())["learner_restarts"] == 2
    assert result(chaos.out("ranks")) == result(chaos.out("straight"))
    assert chaos.left("ranks") == []
