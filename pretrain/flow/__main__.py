"""`python -m pretrain.flow RECIPE [key=value ...] [--dry-run] [--resume auto|CHECKPOINT]`.

Stages kontext, align and unified of UniPic 2.0, under DeepSpeed: one rank in this process, or one Ray actor each.
"""

from __future__ import annotations

import argparse
import logging
import sys
from functools import partial

from core.logs import start_logging
from core.recipe import ConfigError, to_yaml
from core.recipe_help import add_help_config
from core.shards.errors import DataError
from pretrain.flow.config import FlowRecipe
from pretrain.flow.validate import load_recipe

log = logging.getLogger("pretrain.flow")


def main(arguments: list[str] | None = None) -> int:
    """0: trained (or the dry run found nothing missing). 2: the recipe, its data or its model cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.flow",
        description="Train a recipe by flow matching: kontext, align, unified.",
    )
    parser.add_argument("recipe", help="YAML file, for example recipes/pretrain_kontext_sd35m.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and print the plan; no Ray, no GPU"
    )
    add_help_config(parser, FlowRecipe)
    parser.add_argument("--resume", metavar="auto|CHECKPOINT", help="continue a run of the same recipe")
    options = parser.parse_intermixed_args(arguments)
    start_logging()
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        return dry_run(recipe) if options.dry_run else train(recipe, resume=options.resume)
    except (ConfigError, DataError) as error:
        sys.stderr.write(f"This recipe cannot run:\n{error}\n")
        return 2


def dry_run(recipe: FlowRecipe) -> int:
    """Print the plan and what is missing."""
    from pretrain.flow.plan import describe
    from pretrain.flow.preflight import preflight

    sys.stdout.write("\n".join(describe(recipe)) + "\n")
    problems = preflight(recipe)
    if problems:
        sys.stdout.write("Not ready:\n" + "\n".join(f"- {problem}" for problem in problems) + "\n")
        return 2
    sys.stdout.write("Ready to run.\n")
    return 0


def train(recipe: FlowRecipe, *, resume: str | None = None) -> int:
    """Check everything, start the ranks, train to the end of the run."""
    from core.cluster.ranks import start_ranks
    from core.files import atomic_write_text
    from pretrain.flow.preflight import preflight
    from pretrain.flow.rank import FlowRank
    from pretrain.flow.run import RECIPE, FlowRun, find_checkpoint, read_step

    problems = preflight(recipe)
    if problems:
        raise ConfigError(problems)
    checkpoint = find_checkpoint(recipe, resume)
    step = read_step(checkpoint) if checkpoint else 0
    atomic_write_text(recipe.run_dir / RECIPE, to_yaml(recipe))
    ranks = start_ranks(partial(FlowRank, recipe), recipe.resources.ranks, recipe.resources)
    try:
        if checkpoint is not None:
            ranks.call("load", str(checkpoint), step)
            log.info("continuing from %s", checkpoint)
        FlowRun(recipe, ranks, step, fresh=resume is None).run()
    finally:
        ranks.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
