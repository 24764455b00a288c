"""Train one part of a base model: `python -m worlds.shapes.training.train RECIPE [key=value …]`.

Stages: `vae`, `text`, `kontext`, `vision`, `vlm`; the recipe's `stage` key chooses. Output goes to its `output_dir`.
"""

import argparse
import sys
from typing import TYPE_CHECKING, cast

import torch

from core.logs import start_logging
from core.recipe import ConfigError
from core.recipe_help import add_help_config
from worlds.shapes.training.config import (
    RECIPES,
    KontextRecipe,
    Recipe,
    TextRecipe,
    VaeRecipe,
    VisionRecipe,
    VlmRecipe,
    load_recipe,
)
from worlds.shapes.training.loop import EndRule, TrainingLoop
from worlds.shapes.training.stage import Stage

if TYPE_CHECKING:
    from worlds.shapes.training.kontext import KontextStage


def build_stage(recipe: Recipe) -> Stage:
    """The stage of a recipe, with fresh weights drawn from its seed."""
    torch.manual_seed(recipe.seed)
    if recipe.stage == "vae":
        from worlds.shapes.training.vae import VaeStage

        return VaeStage(cast(VaeRecipe, recipe))
    if recipe.stage == "text":
        from worlds.shapes.training.text import TextStage

        return TextStage(cast(TextRecipe, recipe))
    if recipe.stage == "vision":
        from worlds.shapes.training.vision import VisionStage

        return VisionStage(cast(VisionRecipe, recipe))
    if recipe.stage == "vlm":
        from worlds.shapes.training.vlm import VlmStage

        return VlmStage(cast(VlmRecipe, recipe))
    from worlds.shapes.training.kontext import KontextStage

    return KontextStage(cast(KontextRecipe, recipe))


def end_rule(recipe: Recipe, stage: Stage) -> EndRule | None:
    """The scores at which a recipe ends, where it names them."""
    if not isinstance(recipe, KontextRecipe) or not recipe.targets.edit:
        return None
    from worlds.shapes.training.targets import ScoreTargets

    return ScoreTargets(recipe, cast("KontextStage", stage))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m worlds.shapes.training.train", description=__doc__.splitlines()[0]
    )
    parser.add_argument("recipe", help="YAML file, see recipes/shapes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    add_help_config(parser, {f"stage {name}": schema for name, schema in RECIPES.items()})
    parser.add_argument("--resume", metavar="auto|CHECKPOINT", help="continue a run of the same recipe")
    options = parser.parse_intermixed_args(arguments)
    start_logging()
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        torch.set_num_threads(recipe.threads)
        stage = build_stage(recipe)
        loop = TrainingLoop(stage, recipe, end_rule(recipe, stage))
        if options.resume:
            loop.resume(options.resume)
    except (ConfigError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    loop.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
