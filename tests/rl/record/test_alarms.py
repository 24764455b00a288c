"""Reward hacking: the alarm fires when the trained reward rises while the trusted score falls, and only then."""

import pytest

from core.stopping import StopRun
from rl.recipe.schema import (
    AlarmsConfig,
    EvaluationTaskConfig,
    ModelConfig,
    RewardConfig,
    RunConfig,
    StageConfig,
)
from rl.record.alarms import Alarm, reward_hacking, stop_for, trained_task_fell
from rl.record.evaluation import TaskScores
from rl.record.results import RunResults

LOW, HIGH = [0.2, 0.3, 0.25, 0.35] * 8, [0.6, 0.8, 0.7, 0.75] * 8


def evaluated(moment, trusted, learned, step=0):
    return TaskScores(moment, "edit", "sha", 1.0, step, trusted, {"learned": learned, "exact": trusted})


def alarm(before, now):
    return reward_hacking(
        "edit", ["learned"], evaluated("before", *before), evaluated("step_40", *now, step=40)
    )


def test_it_fires_when_the_two_part_and_says_by_how_much():
    (line,) = alarm((HIGH, LOW), (LOW, HIGH))
    assert "stage 'edit'" in line and "step 40" in line and "learned" in line
    assert "by +0.4375 [" in line and "by -0.4375 [" in line


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ((LOW, LOW), (HIGH, HIGH)),  # both rise: learning
        ((HIGH, HIGH), (LOW, LOW)),  # both fall: a broken run, not an exploit
        ((HIGH, LOW), (HIGH, HIGH)),  # the trusted score stays
        ((HIGH, LOW), ([*LOW[:4], *[h + 0.1 for h in HIGH[4:]]], HIGH)),  # its fall is within the noise
    ],
)
def test_it_is_silent_otherwise(before, now):
    assert alarm(before, now) == []


def test_a_reward_that_the_evaluation_does_not_list_is_not_looked_at():
    before, now = evaluated("before", HIGH, LOW), evaluated("after_edit", LOW, HIGH)
    assert reward_hacking("edit", ["another"], before, now) == []


@pytest.mark.parametrize(
    ("now", "alarms"),
    [
        (LOW, 1),
        (HIGH, 0),
        ([*LOW[:4], *[h + 0.1 for h in HIGH[4:]]], 0),  # within the noise
        ([None] * len(HIGH), 0),
    ],
)
def test_a_trained_task_that_falls_beyond_its_interval_is_an_alarm(now, alarms):
    lines = trained_task_fell("edit", evaluated("before", HIGH, LOW), evaluated("step_40", now, LOW, step=40))
    assert len(lines) == alarms
    assert all("stage 'edit', at step 40, edit changed by -0.4375 [" in line for line in lines)


def test_a_run_compares_with_the_start_of_the_stage(tmp_path):
    config = RunConfig(name="run", model=ModelConfig(path="model"))
    learned = RewardConfig("package.module:function", label="learned")
    config.stages = [StageConfig(name, "edit", "edit.jsonl", 1, [learned]) for name in ("one", "two")]
    config.evaluation.tasks = [EvaluationTaskConfig("edit", "edit.jsonl", 32, [RewardConfig("edit_shapes")])]
    results = RunResults(config, None, tmp_path)
    results.add("before", {"edit": evaluated("before", HIGH, LOW)})
    results.add("after_one", {"edit": evaluated("after_one", LOW, LOW)})
    now = {"edit": evaluated("step_7", LOW, HIGH, step=7)}
    (alarm,) = results.stage_alarms(0, now)
    assert alarm.line.startswith("reward hacking")
    assert alarm.names == ("reward_hacking", "trained_task"), "the trained task has fallen too"
    assert results.stage_alarms(1, now) == []  # nothing fell over the second stage
    assert results.stage_alarms(1, {}) == []
    (alarm,) = results.stage_alarms(0, {"edit": evaluated("step_7", LOW, LOW, step=7)})
    assert alarm.line.startswith("the trained task fell") and alarm.names == ("trained_task",)


@pytest.mark.parametrize(
    ("stops", "names", "told"),
    [
        ({}, ("reward_hacking", "trained_task"), None),
        ({"cross_task": "stop"}, ("trained_task",), None),
        ({"trained_task": "stop"}, ("reward_hacking", "trained_task"), "alarms.trained_task={}"),
        (
            {"trained_task": "stop", "reward_hacking": "stop"}, ("reward_hacking", "trained_task"),
            "alarms.reward_hacking={} alarms.trained_task={}",
        ),
    ],
)  # fmt: skip
def test_an_alarm_stops_a_run_that_asked_for_it(stops, names, told):
    alarms, config = [Alarm("it fell", names)], AlarmsConfig(**stops)
    if told is None:
        return stop_for(alarms, config)
    with pytest.raises(StopRun) as stopped:
        stop_for(alarms, config)
    stop, warn = told.replace("{}", "stop"), told.replace("{}", "warn")
    assert str(stopped.value) == f"{stop}: it fell; to go on from here all the same add {warn} to the command"
    return None
