"""What an evaluation cannot see: gains that only the trained reward vouches for, and a silent hacking alarm."""

from __future__ import annotations

from rewards.base import reward_label
from rewards.recipe import reward_specs
from rl.recipe.schema import EvaluationTaskConfig, RunConfig
from rl.recipe.stage_parts import stage_parts


def blind_spots(config: RunConfig) -> list[str]:
    """One line for each evaluated task whose rewards cannot tell a gain from an exploit of the reward it is trained on.

    Such a recipe may run; the lines go to `--dry-run` and to the log.
    """
    lines = []
    for task in config.evaluation.tasks:
        line = _blind_spot(task, _trained_labels(config, task.task))
        lines += [f"evaluation of {task.task}: {line}"] if line else []
    return lines


def _trained_labels(config: RunConfig, task: str) -> list[str]:
    parts = [part for stage in config.stages for part in stage_parts(stage) if part.task == task]
    labels = [reward_label(s) for part in parts for s in reward_specs(part.rewards) if s.weight != 0]
    return list(dict.fromkeys(labels))


def _blind_spot(task: EvaluationTaskConfig, trained: list[str]) -> str | None:
    weights = {reward_label(spec): spec.weight for spec in reward_specs(task.rewards)}
    if not trained or not weights:
        return None
    if set(weights) <= set(trained):
        return (
            f"nothing but {' and '.join(weights)}, which training uses, scores the held-out prompts, so an exploit "
            "of it would look like a gain; list an independent reward too (with weight 0 it is a second opinion)"
        )
    unseen = [label for label in trained if label not in weights]
    if unseen and not any(weights.get(label) for label in trained):
        return (
            f"{' and '.join(unseen)}, which training uses, is not listed; with weight 0 the alarm for reward hacking "
            "can watch it rise while the score that is trusted falls"
        )
    return None
