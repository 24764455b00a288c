"""Rules that a recipe's values have to keep, alone and together."""

from __future__ import annotations

from core.recipe import range_problems
from rewards.editreward.config import Recipe
from rewards.editreward.settings import RESULT_RUBRIC, RUBRIC, EditRewardSettings, SettingsError

_CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "model.trainable": ("full", "language", "lora", "head"),
    "train.loss": ("mse", "huber"),
    "train.zero_stage": (1, 2, 3),
    "train.best_by": ("spearman", "group_spearman"),
    "evaluate.split": ("test", "validation", "train"),
    "resources.device": ("cpu", "cuda"),
}
_AT_LEAST = {
    "model.lora.rank": 1,
    "train.steps": 1,
    "train.stop_step": 0,
    "train.micro_batch_size": 1,
    "train.ranks": 1,
    "train.ranking.weight": 0,
    "train.ranking.min_gap": 0,
    "train.loader_workers": 0,
    "train.log_every": 1,
    "train.evaluate_every": 1,
    "train.validation_samples": 2,
    "train.save_every": 1,
    "train.keep_checkpoints": 1,
    "data.index_workers": 1,
    "data.max_corrupt_share": 0,
    "evaluate.max_samples": 0,
    "evaluate.batch_size": 1,
    "evaluate.resamples": 1,
    "evaluate.tie_margin": 0,
    "evaluate.probes.samples": 2,
    "resources.threads": 1,
}
_ABOVE_ZERO = (
    "model.lora.alpha",
    "train.huber_delta",
    "train.optimization.lr",
    "train.optimization.eps",
    "train.optimization.gradient_clip",
    "resources.rank_cpus",
    "resources.placement_timeout_s",
    "resources.start_timeout_s",
    "resources.collective_timeout_s",
    "resources.call_timeout_s",
)


def recipe_problems(recipe: Recipe) -> list[str]:
    """Every value that is out of range or does not go with another, one sentence each."""
    problems = range_problems(recipe, choices=_CHOICES, at_least=_AT_LEAST, above_zero=_ABOVE_ZERO)
    return problems + _joint_problems(recipe) + _settings_problems(recipe)


def make_settings(
    recipe: Recipe,
    *,
    means: tuple[float, ...],
    stds: tuple[float, ...],
    chat_template: str,
    token_pixels: int,
) -> EditRewardSettings:
    """The constants that a run of this recipe saves with its model. Raises SettingsError."""
    view = recipe.input.view
    rubric = recipe.input.rubric
    if rubric is None:
        rubric = RUBRIC if view == "full" else RESULT_RUBRIC
    return EditRewardSettings(
        dimensions=tuple(recipe.data.dimensions),
        means=means,
        stds=stds,
        score_low=recipe.data.score_low,
        score_high=recipe.data.score_high,
        combine=recipe.data.combine,
        view=view,
        rubric=rubric,
        chat_template=chat_template,
        add_generation_prompt=recipe.input.add_generation_prompt,
        min_pixels=recipe.input.min_pixels,
        max_pixels=recipe.input.max_pixels,
        token_pixels=token_pixels,
    )


def _joint_problems(recipe: Recipe) -> list[str]:
    train, data = recipe.train, recipe.data
    step = train.micro_batch_size * train.ranks
    ranking = train.ranking
    checks = [
        (
            step < 1 or (train.batch_size >= step and train.batch_size % step == 0),
            f"train.batch_size={train.batch_size} is no multiple of micro_batch_size x ranks = "
            f"{train.micro_batch_size} x {train.ranks} = {step}",
        ),
        (
            ranking.weight <= 0
            or (ranking.group_size >= 2 and train.micro_batch_size % ranking.group_size == 0),
            f"train.ranking.group_size={ranking.group_size} must be at least 2 and divide "
            f"train.micro_batch_size={train.micro_batch_size}: a group is compared within one micro-batch",
        ),
        (
            train.stop_step <= train.steps,
            f"train.stop_step={train.stop_step} lies behind train.steps={train.steps}",
        ),
        (
            data.validation_share > 0 and data.test_share > 0 and data.validation_share + data.test_share < 1,
            f"data.validation_share={data.validation_share} and data.test_share={data.test_share} must be above 0 "
            "and leave something to train on",
        ),
        (0 <= train.optimization.warmup_fraction < 1, "train.optimization.warmup_fraction must be in [0, 1)"),
    ]
    return [message for fine, message in checks if not fine]


def _settings_problems(recipe: Recipe) -> list[str]:
    k = len(recipe.data.dimensions)
    try:
        make_settings(recipe, means=(0.0,) * k, stds=(1.0,) * k, chat_template="-", token_pixels=1)
    except SettingsError as error:
        return [f"data and input: {error}"]
    return []
