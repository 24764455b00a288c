"""Train one part of a base model: `python -m worlds.shapes.training.train RECIPE [key=value …]`.

Stages: `vae`, `text`, `kontext`, `vision`, `vlm`; the recipe's `stage` key chooses. Output goes to its `output_dir`.
"""

import argparse
import sys
from typing import Any

import torch

from core.logs import start_logging
from core.recipe import ConfigError
from core.recipe_help import add_help_config
from core.run_lock import hold_run
from worlds.shapes.training.config import (
    RECIPES,
    KontextRecipe,
    Recipe,
    load_recipe,
)
from worlds.shapes.training.kontext import KontextStage, ScoreTargets
from worlds.shapes.training.loop import EndRule, Stage, TrainingLoop
from worlds.shapes.training.text import TextStage
from worlds.shapes.training.vae import VaeStage
from worlds.shapes.training.vision import VisionStage
from worlds.shapes.training.vlm import VlmStage

_STAGES: dict[str, Any] = {
    "vae": VaeStage, "text": TextStage, "kontext": KontextStage, "vision": VisionStage, "vlm": VlmStage,
}  # fmt: skip


def build_stage(recipe: Recipe) -> Stage:
    """The stage of a recipe, with fresh weights drawn from its seed."""
    torch.manual_seed(recipe.seed)
    return _STAGES[recipe.stage](recipe)


def end_rule(recipe: Recipe, stage: Stage) -> EndRule | None:
    """The scores at which a recipe ends, where it names them."""
    if isinstance(recipe, KontextRecipe) and isinstance(stage, KontextStage) and recipe.targets.edit:
        return ScoreTargets(recipe, stage)
    return None


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
        with hold_run(loop.folder):
            loop.resume(options.resume)
            loop.run()
    except (ConfigError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
