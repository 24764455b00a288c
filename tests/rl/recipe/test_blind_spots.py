"""Which evaluations are named for what they cannot see."""

import pytest

from rl.recipe.blind_spots import blind_spots
from rl.recipe.schema import (
    EvaluationTaskConfig,
    ModelConfig,
    RewardConfig,
    RunConfig,
    StageConfig,
    StagePartConfig,
    load_config,
)


def _lines(trained: dict[str, float], held_out: dict[str, float], *, task: str = "edit") -> list[str]:
    def rewards(weights: dict[str, float]) -> list[RewardConfig]:
        return [RewardConfig(name, weight=weight) for name, weight in weights.items()]

    config = RunConfig(name="x", model=ModelConfig(path="absent"))
    config.stages = [StageConfig("first", "edit", "e.jsonl", 10, rewards(trained))]
    config.evaluation.tasks = [EvaluationTaskConfig(task, "h.jsonl", 8, rewards(held_out))]
    return blind_spots(config)


@pytest.mark.parametrize("held_out", [{"a": 1}, {"a": 1, "b": 0}, {"b": 1}])
def test_trained_rewards_alone(held_out):
    (line,) = _lines({"a": 1, "b": 0.5}, held_out)
    assert line.startswith(f"evaluation of edit: nothing but {' and '.join(held_out)}, which training uses")
    assert "independent reward" in line


@pytest.mark.parametrize("held_out", [{"trusted": 1}, {"trusted": 1, "second": 0}])
def test_the_trained_reward_is_not_watched(held_out):
    (line,) = _lines({"a": 1, "logged": 0}, held_out)
    assert line.startswith("evaluation of edit: a, which training uses, is not listed")


@pytest.mark.parametrize(
    ("trained", "held_out"),
    [
        ({"a": 1}, {"trusted": 1, "a": 0}),
        ({"a": 1}, {"a": 1, "second": 0}),
        ({"a": 1, "b": 1}, {"a": 1, "second": 0}),
        ({"logged": 0}, {"logged": 1}),
        ({"a": 1}, {}),
    ],
)
def test_evaluations_that_can_tell(trained, held_out):
    assert _lines(trained, held_out) == []


def test_a_task_that_no_stage_trains():
    assert _lines({"a": 1}, {"a": 1}, task="t2i") == []


def test_each_part_of_a_joint_stage():
    config = RunConfig(name="x", model=ModelConfig(path="absent"))
    parts = [StagePartConfig(task, f"{task}.jsonl", [RewardConfig(f"r_{task}")]) for task in ("edit", "t2i")]
    config.stages = [StageConfig("both", "joint", None, 10, [], parts)]
    config.evaluation.tasks = [
        EvaluationTaskConfig("edit", "h.jsonl", 8, [RewardConfig("r_edit")]),
        EvaluationTaskConfig("t2i", "h.jsonl", 8, [RewardConfig("r_edit")]),
    ]
    first, second = blind_spots(config)
    assert "nothing but r_edit" in first
    assert "r_t2i, which training uses, is not listed" in second


@pytest.mark.parametrize("recipe", ["pdtr", "pdtr_long", "edit_editreward", "reward_hacking"])
def test_the_measured_recipes_have_none(recipe):
    assert blind_spots(load_config(f"recipes/shapes/{recipe}.yaml")) == []
