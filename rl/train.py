"""Command line: `python -m rl.train RECIPE [key=value ...] [--dry-run] [--resume auto|PATH [--accept-changes]]`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from core.cluster.ranks import RankLost
from core.command_line import add_recipe_arguments, refuse, report_dry_run
from core.failures import ClusterError
from core.inputs import compare_inputs
from core.logs import start_logging
from core.recipe import ConfigError
from core.run_lock import hold_run
from rl.loop.checkpoint import begin_at, set_later_aside, take_served
from rl.recipe.schema import RunConfig, load_config
from rl.recipe.validate import broken_rules, find_problems

if TYPE_CHECKING:
    from rewards.base import RewardSet
    from rl.record.state import RunState

log = logging.getLogger("rl.train")


def main(argv: list[str] | None = None) -> int:
    """Returns 0 when the run finished (or the dry run found nothing missing), 2 for a recipe that cannot run, or a
    cluster that cannot run it, 1 where learner ranks were lost for good. Raises SystemExit with 3 after an alarm that
    stops it, 130 or 143 after a signal."""
    arguments = _parse(argv)
    start_logging()
    try:
        # Values and rules come in one list with what `preflight` finds, where keys and types let it look.
        config = load_config(arguments.recipe, arguments.overrides, rules=broken_rules, defer_values=True)
        command = dry_run if arguments.dry_run else train
        return command(config, resume=arguments.resume, accept=arguments.accept_changes)
    except (ConfigError, ClusterError) as error:
        return refuse("This recipe cannot run", error)
    except RankLost as error:
        return refuse("The run stopped", error, code=1)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m rl.train", description="Train a recipe with Flow-GRPO.")
    add_recipe_arguments(
        parser, "recipes/shapes/pdtr.yaml", RunConfig,
        dry_run="check everything and print the plan; no Ray, no GPU", resume=True,
    )  # fmt: skip
    return parser.parse_intermixed_args(argv)


def dry_run(config: RunConfig, *, resume: str | None = None, accept: bool = False) -> int:
    """Print the plan and what is missing, or keeps the run from being continued. 0 when the recipe is ready to run."""
    from rl.recipe.blind_spots import blind_spots
    from rl.recipe.notes import notes
    from rl.recipe.plan import describe_run
    from rl.recipe.preflight import preflight
    from rl.recipe.reward_plan import reward_lines

    checked, plan = preflight(config), []
    problems = checked.problems
    try:
        # The plan's formulas divide by the recipe's values, so they must be sound first.
        plan = [] if find_problems(config) else [*describe_run(config), *reward_lines(config)]
    except ValueError as error:
        problems += [p for p in [f"model.lora: {error}"] if p not in problems]
    lines = blind_spots(config) if problems else notes(config)
    if resume and not problems:
        try:
            _, state = _begin(config, checked.reward_sets, resume, accept)
            lines = [*lines, f"continues after step {state.step}"]
        except ConfigError as error:
            problems += error.problems
    return report_dry_run([*plan, *(f"note: {line}" for line in lines)], problems)


def train(config: RunConfig, *, resume: str | None = None, accept: bool = False) -> int:
    """Check everything, then run (or continue) the recipe on the Ray cluster."""
    from rl.recipe.notes import notes
    from rl.recipe.preflight import preflight
    from rl.recipe.reward_plan import reward_lines

    log.info("checking the recipe, its prompts, pictures, model and rewards")
    checked = preflight(config)
    if checked.problems:
        raise ConfigError(checked.problems)
    log.info("results go to %s", _run_dir(config))
    for line in reward_lines(config):
        log.info(line)
    for line in notes(config):
        log.warning(line)
    with hold_run(_run_dir(config)):
        _run(config, checked.reward_sets, resume, accept)
    return 0


def _run_dir(config: RunConfig) -> Path:
    return Path(config.output_dir).expanduser().absolute() / config.name


def _begin(
    config: RunConfig, reward_sets: list[RewardSet], resume: str | None, accept: bool
) -> tuple[Path | None, RunState]:
    """The checkpoint to continue from, if any, and where the run stands. Writes nothing. Raises ConfigError where the
    recipe, or what it names, is not what the checkpoint was made with."""
    from rl.recipe.inputs import run_inputs

    checkpoint, state = begin_at(config, _run_dir(config), resume)
    inputs = run_inputs(config, reward_sets, known=state.inputs)
    if checkpoint is not None:
        state.changes += compare_inputs(state.inputs, inputs, step=state.step, accept=accept)
    state.inputs = inputs
    return checkpoint, state


def _run(config: RunConfig, reward_sets: list[RewardSet], resume: str | None, accept: bool) -> None:
    """Choose where to begin, start the actors and train."""
    run_dir = _run_dir(config)
    checkpoint, state = _begin(config, reward_sets, resume, accept)
    if checkpoint is not None:
        set_later_aside(run_dir, state.step)
        log.info("continuing from %s", checkpoint)

    from core.cluster.actors import connect
    from core.run_status import watch_run
    from rl.loop.cluster import start_cluster
    from rl.loop.restarts import train_with_restarts
    from rl.recipe.placement import make_plan

    with watch_run(run_dir, resume=True, stop_timeout_s=config.resources.stop_timeout_s) as watch:
        connect()
        cluster = start_cluster(config, make_plan(config), reward_sets, state.inputs)
        try:
            take_served(state, cluster.served, accept=accept)
            train_with_restarts(
                config, cluster, run_dir, (checkpoint, state), fresh=resume is None, watch=watch
            )
        finally:
            cluster.workers.close()


if __name__ == "__main__":
    sys.exit(main())
