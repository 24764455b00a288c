"""Reads the recipe of a training, and the rules that its keys have to keep together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from core.recipe import read_recipe, value_problems
from rewards.editreward.config import OTHER_SECTIONS, Recipe
from rewards.editreward.settings import RESULT_RUBRIC, RUBRIC, EditRewardSettings, SettingsError


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and `key.sub=value` overrides. Raises ConfigError listing every problem of its keys and values."""
    return read_recipe(path, overrides, Recipe, others=OTHER_SECTIONS, rules=broken_rules)


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


def broken_rules(recipe: Recipe) -> list[str]:
    """What keys break together. Bears values that are out of range."""
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
            data.validation_share + data.test_share < 1,
            f"data.validation_share={data.validation_share} and data.test_share={data.test_share} must leave "
            "something to train on",
        ),
    ]
    return [message for fine, message in checks if not fine] + _settings_problems(recipe)


def _settings_problems(recipe: Recipe) -> list[str]:
    if value_problems(recipe.data) or value_problems(recipe.input):
        return []
    k = len(recipe.data.dimensions)
    try:
        make_settings(recipe, means=(0.0,) * k, stds=(1.0,) * k, chat_template="-", token_pixels=1)
    except SettingsError as error:
        return [f"data and input: {error}"]
    return []
