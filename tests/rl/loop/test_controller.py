"""A run that learns nothing does not end as one that did."""

from types import SimpleNamespace

import pytest

from rl.loop.controller import Controller, NothingLearned
from rl.recipe.schema import RunConfig, StageConfig
from rl.record.state import RunState, StageProgress


@pytest.fixture
def controller():
    """One without workers: its stage is over, and what it tells its journal is kept."""
    made = Controller.__new__(Controller)
    made.config = RunConfig(name="x", stages=[StageConfig("edit", "edit", "p.jsonl", 2)])
    made.state = RunState(stages=[StageProgress("edit", steps=2)])
    made.told = []
    made.observer = SimpleNamespace(journal=SimpleNamespace(alarms=made.told.extend))
    return made


def test_a_stage_without_an_update_is_an_alarm_and_a_failure(controller):
    stage, progress = controller.config.stages[0], controller.state.stages[0]
    progress.fates = {"could not be sampled": 3, "have no spread in their rewards": 1}
    with pytest.raises(NothingLearned, match="of 4 groups 3 could not be sampled, 1 have no spread"):
        controller._check_learned(stage)
    (line,) = controller.told
    assert line.startswith("stage 'edit' ended without one optimizer update")
    progress.updates = 1
    controller._check_learned(stage)


def test_updates_that_are_skipped_again_and_again_end_the_run_by_the_step(controller, caplog):
    skipped, applied = SimpleNamespace(skipped=True), SimpleNamespace(skipped=False)
    for step in range(1, 4):
        controller._check_applied([skipped, applied], step)
        assert f"step {step}: 1 of 2 updates skipped, their gradient is not finite" in caplog.text
    controller._check_applied([applied], 4)
    with pytest.raises(
        NothingLearned, match="step 5: 4 updates had a gradient .*learner.max_skipped_updates=3"
    ):
        controller._check_applied([skipped, applied], 5)
