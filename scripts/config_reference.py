"""Writes docs/reference/config.md from the schemas: `python scripts/config_reference.py > docs/reference/config.md`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.recipe_help import markdown_table  # noqa: E402
from pretrain.data.config import DataRecipe  # noqa: E402
from pretrain.flow.config import FlowRecipe  # noqa: E402
from rewards.editreward.config import Recipe  # noqa: E402
from rewards.editreward.data.generate_config import GenerateSection, section_recipe  # noqa: E402
from rewards.editreward.data.label_config import LabelSection  # noqa: E402
from rewards.geneval.prompt_config import TrainPromptConfig  # noqa: E402
from rewards.recipe import ServedRecipe  # noqa: E402
from rl.recipe.schema import RunConfig  # noqa: E402
from rl.sweep.config import SweepFile  # noqa: E402
from worlds.shapes.training.config import RECIPES  # noqa: E402

COMMANDS: dict[str, type] = {
    "rl.train RECIPE": RunConfig,
    "rl.sweep GRID": SweepFile,
    "pretrain.flow RECIPE": FlowRecipe,
    "pretrain.data.cache RECIPE": DataRecipe,
    "rewards.serve RECIPE": ServedRecipe,
    "rewards.editreward generate RECIPE": section_recipe("generate", GenerateSection),
    "rewards.editreward label RECIPE": section_recipe("label", LabelSection),
    "rewards.editreward train|evaluate|export RECIPE": Recipe,
    "rewards.geneval prompts --config YAML": TrainPromptConfig,
    **{f"worlds.shapes.training.train RECIPE (stage: {name})": schema for name, schema in RECIPES.items()},
}
"""Every command that takes a recipe, with the schema that it reads it by."""


def reference() -> str:
    """The page."""
    lines = [
        "# Keys of recipes",
        "",
        "What each command reads of its recipe. The same tables come from `--help-config` of the command. Numbers are",
        "finite; a value out of range, a wrong type, a missing value and an unknown key are all refused at once.",
    ]
    for command, schema in COMMANDS.items():
        lines += ["", f"## `python -m {command}`", "", *markdown_table(schema)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
