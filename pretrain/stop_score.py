"""When to stop the shapes base: at a score of its averaged weights, since the step at which it is reached is chance."""

from __future__ import annotations

from pretrain.config import KontextRecipe
from pretrain.evaluate import Base, heldout_questions, score
from pretrain.kontext import KontextStage
from pretrain.pool import load_text

_PROMPT_SEED = 7


class StopByScore:
    """Scores a stage as `pretrain.evaluate` does at guidance 1, on held-out prompts that it does not ask."""

    def __init__(self, recipe: KontextRecipe, stage: KontextStage) -> None:
        """Loads the text encoders of the recipe's `text`. Raises FileNotFoundError as their loader does."""
        self.settings = recipe.stop_score
        self.steps = recipe.preview_steps
        self.questions = heldout_questions(self.settings.task, self.settings.prompts, _PROMPT_SEED)
        self.base = Base(stage.transformer, stage.vae, stage.scheduler, load_text(recipe.text))

    @property
    def name(self) -> str:
        """Of the score in metrics.jsonl."""
        return f"score_{self.settings.task}"

    def score(self) -> float:
        """Mean score of the stage's weights as they are now."""
        drawn = self.base.draw(self.questions, 1.0, self.steps, _PROMPT_SEED)
        return float(score(self.settings.task, self.questions, drawn).mean())
