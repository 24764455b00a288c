"""`python -m rewards.editreward train RECIPE [key=value ...] [--dry-run] [--resume auto|CHECKPOINT]`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from functools import partial
from pathlib import Path

import recipes
from core.logs import start_logging
from core.recipe import ConfigError, to_yaml
from core.recipe_help import add_help_config
from rewards.editreward.config import Recipe
from rewards.editreward.data.shards import DataError
from rewards.editreward.settings import FILE, SettingsError
from rewards.editreward.validate import load_recipe

log = logging.getLogger("rewards.editreward.train.command")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of every command that reads a recipe, and the flags of training."""
    add_recipe_arguments(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="check and print memory and speed; no Ray, no GPU"
    )
    parser.add_argument("--resume", metavar="auto|CHECKPOINT", help="continue a run of the same recipe")


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Recipe and overrides."""
    parser.add_argument("recipe", help="YAML file, for example recipes/editreward.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    add_help_config(parser, Recipe)


def run(arguments: argparse.Namespace) -> int:
    """0: trained (or the dry run found nothing missing). 2: the recipe, its data or its model cannot be used."""
    start_logging()
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        return dry_run(recipe) if arguments.dry_run else train(recipe, resume=arguments.resume)
    except (ConfigError, DataError, SettingsError) as error:
        sys.stderr.write(f"This recipe cannot run:\n{error}\n")
        return 2


def dry_run(recipe: Recipe) -> int:
    """Print the plan and what is missing."""
    from rewards.editreward.train.plan import describe

    problems = preflight(recipe)
    try:
        sys.stdout.write("\n".join(describe(recipe)) + "\n")
    except ValueError as error:
        problems.append(str(error))
    if problems:
        sys.stdout.write("Not ready:\n" + "\n".join(f"- {problem}" for problem in problems) + "\n")
        return 2
    sys.stdout.write("Ready to run.\n")
    return 0


def preflight(recipe: Recipe) -> list[str]:
    """What would stop the run, found without loading weights or decoding pictures."""
    from core.logs import submitted_job
    from rewards.editreward.data.index import find_shards, shard_patterns
    from rewards.editreward.processing import read_chat_template

    problems = []
    folder = recipes.resolve(recipe.model.path)
    if not (folder / "config.json").is_file():
        problems.append(f"model.path={recipe.model.path}: no config.json there; give a Qwen2.5-VL folder")
    else:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind != "qwen2_5_vl":
            problems.append(f"model.path={recipe.model.path}: model_type is {kind!r}, not 'qwen2_5_vl'")
        if not any(folder.glob("*.safetensors")):
            problems.append(f"model.path={recipe.model.path}: no *.safetensors there")
        try:
            read_chat_template(folder)
        except SettingsError as error:
            problems.append(f"model.path={recipe.model.path}: {error}")
    try:
        find_shards(shard_patterns(recipe))
    except DataError as error:
        problems.append(str(error))
    if submitted_job():
        paths = {"output_dir": recipe.output_dir, "model.path": recipe.model.path}
        problems += [
            f"{key}={path!r} is relative, and a submitted job runs in a temporary copy; give an absolute path"
            for key, path in paths.items()
            if not Path(path).is_absolute() and (key == "output_dir" or not recipes.is_packaged(path))
        ]
    return problems


def train(recipe: Recipe, *, resume: str | None = None) -> int:
    """Index the data, start the ranks, train to the end."""
    from core.cluster.ranks import start_ranks
    from core.files import atomic_write_json, atomic_write_text
    from rewards.editreward.data.index import label_statistics, load_corpus, whole_groups
    from rewards.editreward.processing import EditProcessor, read_chat_template, read_token_pixels
    from rewards.editreward.train.rank import INDEX, TrainRank
    from rewards.editreward.train.run import RECIPE, RunState, TrainingRun, find_checkpoint, read_state
    from rewards.editreward.validate import make_settings

    problems = preflight(recipe)
    if problems:
        raise ConfigError(problems)
    checkpoint = find_checkpoint(recipe, resume)
    state = read_state(checkpoint) if checkpoint else RunState()
    run_dir, base = recipe.run_dir, recipes.resolve(recipe.model.path)
    corpus = load_corpus(recipe, run_dir / INDEX)
    for line in corpus.lines():
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
    EditProcessor(base, settings)
    atomic_write_text(run_dir / RECIPE, to_yaml(recipe))
    atomic_write_json(run_dir / FILE, settings.to_json())
    atomic_write_text(run_dir / "data.txt", "\n".join(corpus.lines()) + "\n")
    ranks = start_ranks(partial(TrainRank, recipe, settings), recipe.train.ranks, recipe.resources)
    try:
        if checkpoint is not None:
            ranks.call("load", str(checkpoint), state.step)
            log.info("continuing from %s", checkpoint)
        validation = whole_groups(corpus.splits["validation"], recipe.train.validation_samples)
        done = TrainingRun(recipe, settings, ranks, validation, state, fresh=resume is None).run()
    finally:
        ranks.close()
    log.info("step %d done; best validation %s at step %d", done.step, done.best_score, done.best_step)
    return 0
