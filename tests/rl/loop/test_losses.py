"""What a node takes with it in the middle of a step: the step is sampled again, and nothing is counted twice."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from core.failures import ObjectsLost
from core.prompts import Prompt
from rl.loop import controller as loop
from rl.loop.controller import MOST_LOSSES, Controller
from rl.recipe.schema import RolloutConfig, RunConfig, StageConfig
from rl.record.state import RunState, StageProgress
from rl.workers.requests import RolloutRequest, RolloutResult


class Learner:
    """Its ranks lose the samples of the first `losses` fetches."""

    def __init__(self, losses):
        self.losses, self.updates = losses, 0

    def fetch(self, batch):
        if self.losses:
            self.losses -= 1
            raise ObjectsLost("samples did not arrive")

    def update(self, rate):
        self.updates += 1
        return [], []


@pytest.fixture
def make(monkeypatch):
    """A controller of one step of one failed prompt, over stand-ins for all that it drives."""
    prompt = Prompt(0, "t2i", "a circle")
    result = RolloutResult(RolloutRequest(0, (prompt,), (1, 2)), (), failure="no picture")
    part = SimpleNamespace(reward_set="set", monitor=SimpleNamespace(observe=lambda scores: None))

    class Schedule:
        def __init__(self, stage, config, progress):
            self.steps = stage.steps

        def remaining_steps(self, progress):
            while progress.steps < self.steps:
                yield progress.steps

        def has(self, step):
            return step < self.steps

        def part(self, step):
            return part

        def groups(self, step):
            return []

    monkeypatch.setattr(loop, "StageSchedule", Schedule)

    def made(losses):
        control = Controller.__new__(Controller)
        control.config, control.spec, control.state = RunConfig(rollout=RolloutConfig()), None, RunState()
        control.state.stages.append(StageProgress("t2i"))
        control.shapes = None
        control.learner, control._losses, control._policy = Learner(losses), 0, SimpleNamespace()
        control.drawn, control.ahead = [], []
        control.rollout = SimpleNamespace(
            sample=lambda requests: [],
            encode_ahead=lambda requests: control.ahead.append(control.state.step),
            score=lambda *args, **options: control.drawn.append(options["step"]) or [result],
        )

        def record_step(*args):
            control.state.step += 1
            control.state.stages[-1].steps += 1

        control.protected, control.watch = nullcontext, SimpleNamespace(at=lambda *args: None)
        control.observer = SimpleNamespace(record_step=record_step, close_step=lambda *args: None)
        return control

    return made


def test_a_step_whose_samples_were_lost_is_sampled_again_and_counted_once(make):
    control = make(losses=2)
    control._train(StageConfig(name="t2i", steps=1))
    assert control.drawn == [1, 1, 1] and control.state.step == 1
    assert control.state.failed_prompts == 1, "the prompt failed three times, in one step"


def test_nodes_that_leave_in_every_try_stop_the_run(make):
    control = make(losses=MOST_LOSSES + 1)
    with pytest.raises(ObjectsLost):
        control._train(StageConfig(name="t2i", steps=1))
    assert control.state.step == 0


@pytest.mark.parametrize(("encode_gpus", "begun"), [(0.0, [0, 1]), (0.25, [])])
def test_the_next_step_is_encoded_before_an_update_unless_its_card_is_the_learners(make, encode_gpus, begun):
    control = make(losses=0)
    control.config.resources.encode_gpus = encode_gpus
    control._train(StageConfig(name="t2i", steps=3))
    assert control.ahead == begun, "not behind the last step"
