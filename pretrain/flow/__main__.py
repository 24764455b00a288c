"""`python -m pretrain.flow RECIPE [key=value ...] [--dry-run] [--resume auto|CHECKPOINT [--accept-changes]]`.

Stages kontext, align and unified of UniPic 2.0, under DeepSpeed: one rank in this process, or one Ray actor each.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from core.command_line import add_recipe_arguments, refuse, report_dry_run
from core.failures import ClusterError, DataError
from core.logs import start_logging
from core.recipe import ConfigError
from core.run_lock import hold_run
from pretrain.flow.config import FlowRecipe
from pretrain.flow.validate import load_recipe

if TYPE_CHECKING:
    from core.training.run import Reading, RunState


def main(arguments: list[str] | None = None) -> int:
    """0: trained (or the dry run found nothing missing). 2: the recipe, its data or its model cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.flow",
        description="Train a recipe by flow matching: kontext, align, unified.",
    )
    add_recipe_arguments(
        parser,
        "recipes/pretrain_kontext_sd35m.yaml",
        FlowRecipe,
        dry_run="check everything and print the plan; no Ray, no GPU",
        resume=True,
    )
    options = parser.parse_intermixed_args(arguments)
    start_logging()
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        command = dry_run if options.dry_run else train
        return command(recipe, resume=options.resume, accept=options.accept_changes)
    except (ConfigError, DataError, ClusterError) as error:
        return refuse("This recipe cannot run", error)


def dry_run(recipe: FlowRecipe, *, resume: str | None = None, accept: bool = False) -> int:
    """Print the plan and what is missing, or keeps the run from being continued."""
    from pretrain.flow.plan import describe
    from pretrain.flow.preflight import preflight

    problems = preflight(recipe)
    if resume and not problems:
        try:
            _begin(recipe, resume, accept)
        except ConfigError as error:
            problems = error.problems
    return report_dry_run(describe(recipe), problems)


def _begin(recipe: FlowRecipe, resume: str | None, accept: bool) -> tuple[Path | None, RunState, Reading]:
    """The checkpoint to continue from, if any, where the run stands, and what it reads. Raises ConfigError."""
    from core.training.run import RunState, check_reading, find_checkpoint, read_state
    from pretrain.flow.preflight import held_inputs
    from pretrain.flow.run import FREE

    checkpoint = find_checkpoint(recipe, resume, load_recipe, free=FREE)
    state = read_state(checkpoint, RunState) if checkpoint else RunState()
    return checkpoint, state, check_reading(checkpoint, state.step, held_inputs(recipe), accept=accept)


def train(recipe: FlowRecipe, *, resume: str | None = None, accept: bool = False) -> int:
    """Check everything, start the ranks, train to the end of the run."""
    from core.training.run import train_on_ranks
    from pretrain.flow.preflight import model_folders, preflight
    from pretrain.flow.rank import FlowRank
    from pretrain.flow.run import FlowRun

    problems = preflight(recipe)
    if problems:
        raise ConfigError(problems)
    with hold_run(recipe.run_dir):
        checkpoint, state, reading = _begin(recipe, resume, accept)
        train_on_ranks(
            recipe,
            partial(FlowRank, recipe),
            recipe.resources.ranks,
            recipe.resources,
            lambda ranks: FlowRun(recipe, ranks, state, fresh=resume is None),
            checkpoint=checkpoint,
            step=state.step,
            reading=reading,
            roots=model_folders(recipe),
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
