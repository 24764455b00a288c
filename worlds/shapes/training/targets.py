"""Where the shapes base ends: at a score of each task, whatever steps that takes, and both at once."""

from __future__ import annotations

from collections.abc import Mapping

from worlds.shapes.training.config import KontextRecipe
from worlds.shapes.training.evaluate import TASKS, Base, heldout_questions, score
from worlds.shapes.training.kontext import KontextStage
from worlds.shapes.training.loop import Look
from worlds.shapes.training.pool import load_text

LEAST_SHARE = 0.1
"""Of the batches, that a task gets which lacks nothing: without any it would be forgotten."""
_PROMPT_SEED = 7


class ScoreTargets:
    """Scores a stage as `evaluate` does at guidance 1, on held-out prompts that it does not ask, and deals the
    batches until the next look to the tasks in proportion to what they lack."""

    def __init__(self, recipe: KontextRecipe, stage: KontextStage) -> None:
        """Loads the text encoders of the recipe's `text`. Raises FileNotFoundError as their loader does."""
        self.stage, self.steps, self.every = stage, recipe.preview_steps, recipe.targets.every
        self.targets = {"t2i": recipe.targets.t2i, "edit": recipe.targets.edit}
        self.questions = {
            task: heldout_questions(task, recipe.targets.prompts, _PROMPT_SEED) for task in TASKS
        }
        self.base = Base(stage.transformer, stage.vae, stage.scheduler, load_text(recipe.text))

    def look(self) -> Look:
        """Mean scores of the stage's weights as they are now; sets `stage.edit_share`."""
        scores = {task: self._score(task) for task in TASKS}
        self.stage.edit_share = edit_share(scores, self.targets)
        figures = {f"score_{task}": value for task, value in scores.items()}
        return Look(
            {**figures, "edit_share": self.stage.edit_share},
            reached=all(scores[task] >= target for task, target in self.targets.items()),
        )

    def _score(self, task: str) -> float:
        questions = self.questions[task]
        drawn = self.base.draw(questions, 1.0, self.steps, _PROMPT_SEED)
        return float(score(task, questions, drawn).mean())


def edit_share(scores: Mapping[str, float], targets: Mapping[str, float]) -> float:
    """Editing's part of what both tasks lack to their targets, within [LEAST_SHARE, 1 - LEAST_SHARE]; .5 of nothing."""
    lacks = {task: max(target - scores[task], 0.0) for task, target in targets.items()}
    total = sum(lacks.values())
    share = lacks["edit"] / total if total else 0.5
    return min(max(share, LEAST_SHARE), 1 - LEAST_SHARE)
