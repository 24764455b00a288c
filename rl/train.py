"""Command line: `python -m rl.train RECIPE [key=value ...] [--dry-run] [--resume auto|PATH]`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from core.cluster.ranks import RankLost
from core.command_line import add_recipe_arguments, refuse, report_dry_run
from core.failures import ClusterError
from core.logs import start_logging
from core.recipe import ConfigError
from core.run_lock import hold_run
from rl.loop.checkpoint import begin_at
from rl.recipe.schema import RunConfig, load_config
from rl.recipe.validate import broken_rules, find_problems

if TYPE_CHECKING:
    from rewards.base import RewardSet

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
        return dry_run(config) if arguments.dry_run else train(config, resume=arguments.resume)
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


def dry_run(config: RunConfig) -> int:
    """Print the plan and what is missing. 0 when the recipe is ready to run."""
    from rl.recipe.blind_spots import blind_spots
    from rl.recipe.notes import notes
    from rl.recipe.plan import describe_run
    from rl.recipe.preflight import preflight
    from rl.recipe.reward_plan import reward_lines

    problems, plan = preflight(config).problems, []
    try:
        # The plan's formulas divide by the recipe's values, so they must be sound first.
        plan = [] if find_problems(config) else [*describe_run(config), *reward_lines(config)]
    except ValueError as error:
        problems += [p for p in [f"model.lora: {error}"] if p not in problems]
    lines = blind_spots(config) if problems else notes(config)
    return report_dry_run([*plan, *(f"note: {line}" for line in lines)], problems)


def train(config: RunConfig, *, resume: str | None = None) -> int:
    """Check everything, then run (or continue) the recipe on the Ray cluster."""
    from rl.recipe.notes import notes
    from rl.recipe.preflight import preflight
    from rl.recipe.reward_plan import reward_lines

    checked = preflight(config)
    if checked.problems:
        raise ConfigError(checked.problems)
    for line in reward_lines(config):
        log.info(line)
    for line in notes(config):
        log.warning(line)
    run_dir = Path(config.output_dir).expanduser().absolute() / config.name
    with hold_run(run_dir):
        _run(config, checked.reward_sets, run_dir, resume)
    return 0


def _run(config: RunConfig, reward_sets: list[RewardSet], run_dir: Path, resume: str | None) -> None:
    """Choose where to begin, start the actors and train."""
    from core.cluster.actors import connect
    from core.run_status import watch_run
    from rl.loop.cluster import start_cluster
    from rl.loop.restarts import train_with_restarts
    from rl.recipe.placement import make_plan

    start = begin_at(config, run_dir, resume)
    with watch_run(run_dir, resume=True, stop_timeout_s=config.resources.stop_timeout_s) as watch:
        connect()
        cluster = start_cluster(config, make_plan(config), reward_sets)
        try:
            train_with_restarts(config, cluster, run_dir, start, fresh=resume is None, watch=watch)
        finally:
            cluster.workers.close()


if __name__ == "__main__":
    sys.exit(main())
