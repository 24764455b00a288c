"""Paired changes over stages, the cross-task alarm, and the base's table of guidance scales."""

import pytest

from rl.recipe.schema import EvaluationTaskConfig, ModelConfig, RewardConfig, RunConfig, StageConfig
from rl.record.evaluation import TaskScores
from rl.record.results import RunResults


def scores(moment, task, values, guidance=1.0):
    return TaskScores(moment, task, "sha", guidance, 0, values, {})


@pytest.fixture
def results(tmp_path):
    reward = [RewardConfig("shapes")]
    config = RunConfig(name="run", model=ModelConfig(path="model"))
    config.stages = [StageConfig(t, t, f"{t}.jsonl", 1, reward) for t in ("edit", "t2i")]
    config.evaluation.tasks = [EvaluationTaskConfig(t, f"{t}.jsonl", 4, reward) for t in ("edit", "t2i")]
    config.evaluation.cross_task_margin = 0.05
    found = RunResults(config, None, tmp_path)
    for moment, edit, t2i in (
        ("before", [0.2, 0.4, 0.6, None], [0.5, 0.5, 0.5, 0.5]),
        ("after_edit", [0.4, 0.5, 0.8, 0.9], [0.48, 0.49, 0.5, 0.51]),
        ("after_t2i", [0.2, 0.4, 0.7, 0.9], [0.9, 0.8, 0.7, 0.6]),
    ):
        found.add(moment, {"edit": scores(moment, "edit", edit), "t2i": scores(moment, "t2i", t2i)})
    return found


def test_changes_are_paired_and_leave_out_what_was_not_scored(results):
    change = results.stage_changes(0)["edit"]
    assert change.n == 3 and change.missing == 1
    assert change.before == pytest.approx(0.4) and change.mean == pytest.approx((0.2 + 0.1 + 0.2) / 3)
    assert results.change_since_before("t2i", results.moments["after_t2i"]["t2i"]).mean == pytest.approx(0.25)
    assert results.change_since_before("t2i", results.moments["before"]["t2i"]) is None


def test_the_alarm_names_the_other_task_and_only_a_drop_beyond_the_margin(results):
    assert results.cross_task_alarms(0) == []  # t2i fell by .005, the margin is .05
    (alarm,) = results.cross_task_alarms(1)
    assert "stage 't2i' trained t2i, and edit fell by 0.1000" in alarm.line
    assert "cross_task_margin=0.05" in alarm.line and alarm.names == ("cross_task",)
    results.config.evaluation.cross_task_margin = 0.2
    assert results.cross_task_alarms(1) == []


def test_guidance_of_the_base_is_listed_in_order(results):
    for scale in (4.5, 2.0):
        moment = f"before_guidance_{scale:g}"
        results.add(moment, {"edit": scores(moment, "edit", [scale / 10, None], scale)})
    points = results._guidance()["edit"]
    assert [(p.guidance_scale, p.num_prompts) for p in points] == [(1.0, 3), (2.0, 1), (4.5, 1)]
    assert "t2i" not in results._guidance()


def test_a_reward_of_weight_0_is_a_second_opinion_on_every_change(results):
    second = RewardConfig("edit_shapes_template", weight=0)
    results.config.evaluation.tasks[0].rewards = [RewardConfig("shapes"), second]
    for moment, values in (("before", [0.5, 0.5]), ("after_edit", [0.5, 0.7]), ("after_t2i", [0.4, None])):
        results.moments[moment]["edit"].components["edit_shapes_template"] = values
    assert list(results.independent_changes(-1, 0)) == ["edit/edit_shapes_template"]
    assert results.independent_changes(-1, 0)["edit/edit_shapes_template"].mean == pytest.approx(0.1)
    over_all = results.independent_changes(-1, 1)["edit/edit_shapes_template"]
    assert over_all.mean == pytest.approx(-0.1) and over_all.missing == 1


def test_what_was_not_measured_with_the_same_prompts_is_compared_with_nothing(results):
    del results.moments["before"]
    assert results.stage_changes(0) == {} and results.cross_task_alarms(0) == []
    assert results.independent_changes(-1, 1) == {}
    assert results.stage_alarms(0, results.moments["after_edit"]) == []
    assert results.change_since_before("edit", results.moments["after_edit"]["edit"]) is None
    assert results.stage_changes(1)["t2i"].mean == pytest.approx(0.255)
