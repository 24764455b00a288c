"""`python -m rewards.editreward train RECIPE [key=value ...] [--dry-run] [--resume auto|PATH [--accept-changes]]`."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import recipes
from core.command_line import add_recipe_arguments, report_dry_run
from core.failures import ClusterError, DataError
from core.logs import relative_path_problems
from core.output import output_problems
from core.recipe import ConfigError
from core.run_lock import hold_run
from rewards.editreward.config import Recipe
from rewards.editreward.settings import FILE, SettingsError
from rewards.editreward.validate import load_recipe

if TYPE_CHECKING:
    from core.training.run import Reading
    from rewards.editreward.train.run import TrainState

log = logging.getLogger("rewards.editreward.train.command")
REFUSALS = (ConfigError, DataError, SettingsError, ClusterError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of every command that reads a recipe, and the flags of training."""
    add_recipe_arguments(
        parser,
        "recipes/editreward.yaml",
        Recipe,
        dry_run="check and print memory and speed; no Ray, no GPU",
        resume=True,
    )


def run(arguments: argparse.Namespace) -> int:
    """0: trained, or the dry run found nothing missing (2: it did)."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    command = dry_run if arguments.dry_run else train
    return command(recipe, resume=arguments.resume, accept=arguments.accept_changes)


def dry_run(recipe: Recipe, *, resume: str | None = None, accept: bool = False) -> int:
    """Print the plan and what is missing, or keeps the run from being continued."""
    from rewards.editreward.train.plan import describe

    plan, problems = [], preflight(recipe)
    try:
        plan = describe(recipe)
    except ValueError as error:
        problems.append(str(error))
    if resume and not problems:
        try:
            _begin(recipe, resume, accept)
        except ConfigError as error:
            problems = error.problems
    return report_dry_run(plan, problems)


def preflight(recipe: Recipe) -> list[str]:
    """What would stop the run, found without loading weights or decoding pictures."""
    from models.folders import check_vlm_folder
    from models.qwen25_vl import read_chat_template
    from rewards.editreward.data.index import labelled_shards
    from rewards.editreward.train.plan import disk_needs, measure

    folder = recipes.resolve(recipe.model.path)
    problems = check_vlm_folder(folder)
    if folder.is_dir():
        try:
            read_chat_template(folder)
        except ValueError as error:
            problems.append(str(error))
    problems = [f"model.path={recipe.model.path}: {problem}" for problem in problems]
    needs = None
    with contextlib.suppress(ValueError):  # LoRA targets that match nothing, which the plan tells
        needs = None if problems else disk_needs(recipe, measure(recipe))
    try:
        labelled_shards(recipe)
    except DataError as error:
        problems.append(str(error))
    problems += output_problems(f"output_dir={recipe.output_dir!r}", recipe.run_dir, needs)
    return problems + relative_path_problems(
        {f"output_dir={recipe.output_dir!r}": recipe.output_dir},
        read={f"model.path={recipe.model.path!r}": recipe.model.path},
    )


def _begin(recipe: Recipe, resume: str | None, accept: bool) -> tuple[Path | None, TrainState, Reading]:
    """The checkpoint to continue from, if any, where the run stands, and what it reads. Raises ConfigError."""
    from core.inputs import folder_files, hash_files, stamp_files
    from core.training.run import check_reading, find_checkpoint, read_state
    from rewards.editreward.data.index import labelled_shards
    from rewards.editreward.train.run import FREE, TrainState

    checkpoint = find_checkpoint(recipe, resume, load_recipe, free=FREE)
    held = hash_files(folder_files("model.path", recipe.model.path))
    held["data.shards"] = stamp_files(labelled_shards(recipe))
    state = read_state(checkpoint, TrainState) if checkpoint else TrainState()
    return checkpoint, state, check_reading(checkpoint, state.step, held, accept=accept)


def train(recipe: Recipe, *, resume: str | None = None, accept: bool = False) -> int:
    """Check, then train to the end of the run in a folder that no other process writes."""
    problems = preflight(recipe)
    if problems:
        raise ConfigError(problems)
    with hold_run(recipe.run_dir):
        _train(recipe, resume, accept)
    return 0


def _train(recipe: Recipe, resume: str | None, accept: bool) -> None:
    """Index the data, start the ranks, train."""
    from core.files import atomic_write_json, atomic_write_text
    from core.training.run import train_on_ranks
    from models.qwen25_vl import read_chat_template, read_token_pixels
    from rewards.editreward.data.index import label_statistics, load_corpus, whole_groups
    from rewards.editreward.processing import EditProcessor
    from rewards.editreward.train.rank import TrainRank
    from rewards.editreward.train.run import TrainingRun
    from rewards.editreward.validate import make_settings

    checkpoint, state, reading = _begin(recipe, resume, accept)
    run_dir, base = recipe.run_dir, recipes.resolve(recipe.model.path)
    corpus = load_corpus(recipe)
    lines = corpus.lines()
    for line in lines:
        log.info(line)
    means, stds = label_statistics(corpus.splits["train"])
    settings = make_settings(
        recipe,
        means=means,
        stds=stds,
        chat_template=read_chat_template(base),
        token_pixels=read_token_pixels(base),
    )
    if checkpoint is not None and json.loads((checkpoint / FILE).read_text()) != json.loads(
        json.dumps(settings.to_json())
    ):
        raise ConfigError(
            [f"{checkpoint} was trained with other constants: the shards or the base model changed"]
        )
    EditProcessor(base, settings)  # raises for a base that cannot be shown pictures as the recipe says
    atomic_write_json(run_dir / FILE, settings.to_json())
    atomic_write_text(run_dir / "data.txt", "\n".join(lines) + "\n")
    validation = whole_groups(corpus.splits["validation"], recipe.train.validation_samples)
    done = train_on_ranks(
        recipe,
        partial(TrainRank, recipe, settings),
        recipe.train.ranks,
        recipe.resources,
        lambda ranks: TrainingRun(recipe, settings, ranks, validation, state, fresh=resume is None),
        checkpoint=checkpoint,
        step=state.step,
        reading=reading,
        roots={"model.path": recipe.model.path},
    )
    log.info("step %d done; best validation %s at step %d", done.step, done.best_score, done.best_step)
