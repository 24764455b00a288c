"""The number of images each reward will score, counted by hand, and a paid reward's own lines."""

from pathlib import Path

from rl.recipe.reward_plan import reward_lines
from rl.recipe.schema import EvaluationTaskConfig, ModelConfig, RewardConfig, RunConfig, StageConfig

PAID = """
class Paid:
    def __init__(self, price: float) -> None:
        self.price = price

    def check(self):
        return []

    def estimate(self, *, images, task, height, width):
        return [f"{images * self.price:.2f} dollars for {task} at {height}x{width}"]

    def score(self, *, images, prompts, references, metadata):
        raise AssertionError("a paid reward is not called for an estimate")
"""


def _config(reward: RewardConfig) -> RunConfig:
    config = RunConfig(name="x", model=ModelConfig(path="absent", height=32, width=48))
    config.rollout.prompts_per_rollout, config.rollout.group_size = 3, 4
    config.stages = [
        StageConfig("edit", "edit", "e.jsonl", 10, [reward]),
        StageConfig("t2i", "t2i", "t.jsonl", 20, [RewardConfig("geneval_shapes")]),
    ]
    config.evaluation.tasks = [EvaluationTaskConfig("edit", "h.jsonl", 100, [reward])]
    config.evaluation.baseline_guidance = [2.0, 3.0]
    config.evaluation.every = 5
    config.gallery.prompts, config.gallery.every = 2, 4
    return config


def test_counts_and_a_paid_rewards_estimate(tmp_path: Path):
    path = tmp_path / "paid.py"
    path.write_text(PAID)
    lines = reward_lines(_config(RewardConfig(f"{path}:Paid", label="paid", params={"price": 0.5})))
    # Evaluated before, with 2 guidances, after 2 stages, and once within (at 5; 10 is the end): 6 x 100. Gallery at
    # steps 4 and 8: 2 x 2.
    assert lines == [
        "reward paid, stage edit: 120 images",
        "  60.00 dollars for edit at 32x48",
        "reward geneval_shapes, stage t2i: 240 images",
        "reward paid, evaluation of edit: 604 images",
        "  302.00 dollars for edit at 32x48",
    ]


def test_a_reward_that_cannot_be_loaded_is_left_to_the_preflight():
    lines = reward_lines(_config(RewardConfig("no_such_reward")))
    assert lines[0] == "reward no_such_reward, stage edit: 120 images"
