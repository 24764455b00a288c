"""A run whose recipe stops for an alarm saves first, and a continued one that only warns goes on from there."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from core.stopping import StopRun
from rl.loop.controller import Controller
from rl.loop.observer import Observer
from rl.recipe.schema import AlarmsConfig, EvaluationTaskConfig, RewardConfig, RunConfig, StageConfig
from rl.record.evaluation import TaskScores
from rl.record.results import RunResults
from rl.record.state import RunState, StageProgress

HIGH, LOW = [0.6, 0.8, 0.7, 0.75] * 8, [0.2, 0.3, 0.25, 0.35] * 8


def recipe(**alarms) -> RunConfig:
    reward = [RewardConfig("shapes")]
    config = RunConfig(name="x", stages=[StageConfig("edit", "edit", "e.jsonl", 4, reward)])
    config.evaluation.tasks = [EvaluationTaskConfig(t, f"{t}.jsonl", 32, reward) for t in ("edit", "t2i")]
    config.evaluation.every, config.gallery.prompts = 1, 0
    config.alarms = AlarmsConfig(**alarms)
    return config


@pytest.fixture
def make(tmp_path):
    """An observer after two steps, whose evaluations find that both tasks fell; `told` and `saved` are what it did."""

    def made(config):
        observer = Observer.__new__(Observer)
        observer.config, observer.run_dir, observer.told, observer.saved = config, tmp_path, [], []
        observer.state = RunState(step=2, stages=[StageProgress("edit", steps=2)], unseen=True)
        observer.results = RunResults(config, None, tmp_path)
        observer._saved_step = 1

        def evaluate(moment, policy=None, *, tasks=("edit", "t2i")):
            values = HIGH if moment == "before" else LOW
            scores = {task: TaskScores(moment, task, "sha", 1.0, 2, values, {}) for task in tasks}
            observer.results.add(moment, scores)
            return scores

        evaluate("before")
        observer._evaluate = evaluate
        observer._save = lambda: observer.saved.append((observer.state.step, observer.state.unseen))
        observer.journal = SimpleNamespace(alarms=observer.told.extend, finish=lambda summary: None)
        return observer

    return made


def test_the_step_is_saved_as_not_yet_looked_at(make):
    observer = make(recipe(trained_task="stop"))
    control = Controller.__new__(Controller)
    control.observer, control.protected = observer, nullcontext
    control._run_stages = lambda: observer.close_step(observer.config.stages[0], None, nullcontext)
    with pytest.raises(StopRun, match=r"^alarms.trained_task=stop: the trained task fell"):
        control.run()
    assert observer.saved == [(2, True)] and len(observer.told) == 1
    continued = make(recipe())
    continued.close_step(continued.config.stages[0], None, nullcontext)
    assert len(continued.told) == 1 and not continued.state.unseen


def test_at_a_stages_end_all_alarms_are_told_first(make):
    observer = make(recipe(cross_task="stop"))
    with pytest.raises(StopRun, match=r"^alarms.cross_task=stop: stage 'edit' trained edit, and t2i fell"):
        observer.close_stage(0, None)
    assert [line.split()[0] for line in observer.told] == ["the", "stage"]
