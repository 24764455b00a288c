"""Command line: `python -m rl.train RECIPE [key=value ...] [--dry-run] [--resume auto|PATH]`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from core.logs import start_logging
from core.recipe import ConfigError, to_yaml
from rl.loop.checkpoint import CheckpointError, check_same_recipe, find_checkpoint, read_state
from rl.recipe.schema import RunConfig, load_config
from rl.recipe.validate import broken_rules, find_problems

log = logging.getLogger("rl.train")


def main(argv: list[str] | None = None) -> int:
    """Returns 0 when the run finished (or the dry run found nothing missing), 2 for a recipe that cannot run."""
    arguments = _parse(argv)
    start_logging()
    try:
        # Values and rules come in one list with what `preflight` finds, where keys and types let it look.
        config = load_config(arguments.recipe, arguments.overrides, rules=broken_rules, defer_values=True)
        return dry_run(config) if arguments.dry_run else train(config, resume=arguments.resume)
    except (ConfigError, CheckpointError) as error:
        sys.stderr.write(f"This recipe cannot run:\n{error}\n")
        return 2


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m rl.train", description="Train a recipe with Flow-GRPO.")
    parser.add_argument("recipe", help="path of a YAML recipe, for example recipes/shapes/pdtr.yaml")
    parser.add_argument(
        "overrides", nargs="*", help="key=value, for example learner.kl_beta=0.01 stages[0].steps=5"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and print the plan; no Ray, no GPU"
    )
    parser.add_argument("--resume", default=None, metavar="auto|PATH", help="continue from a checkpoint")
    return parser.parse_intermixed_args(argv)


def dry_run(config: RunConfig) -> int:
    """Print the plan and what is missing. 0 when the recipe is ready to run."""
    from rl.recipe.blind_spots import blind_spots
    from rl.recipe.plan import describe_run
    from rl.recipe.preflight import preflight
    from rl.recipe.reward_plan import reward_lines

    problems = preflight(config).problems
    try:
        # The plan's formulas divide by the recipe's values, so they must be sound first.
        for line in [] if find_problems(config) else [*describe_run(config), *reward_lines(config)]:
            sys.stdout.write(line + "\n")
    except ValueError as error:
        problems += [p for p in [f"model.lora: {error}"] if p not in problems]
    for line in blind_spots(config):
        sys.stdout.write(f"note: {line}\n")
    if problems:
        sys.stdout.write("Not ready:\n" + "\n".join(f"- {problem}" for problem in problems) + "\n")
        return 2
    sys.stdout.write("Ready to run.\n")
    return 0


def train(config: RunConfig, *, resume: str | None = None) -> int:
    """Check everything, then run (or continue) the recipe on the Ray cluster."""
    from rl.recipe.blind_spots import blind_spots
    from rl.recipe.preflight import preflight
    from rl.recipe.reward_plan import reward_lines
    from rl.record.state import RunState

    checked = preflight(config)
    if checked.problems:
        raise ConfigError(checked.problems)
    for line in reward_lines(config):
        log.info(line)
    for line in blind_spots(config):
        log.warning(line)
    run_dir = Path(config.output_dir).expanduser().absolute() / config.name
    checkpoint = find_checkpoint(run_dir, resume) if resume else None
    if checkpoint is not None:
        if checkpoint.absolute().parent.parent != run_dir:
            raise ConfigError(
                [f"checkpoint {checkpoint} belongs to another run than {run_dir}; set output_dir and name"]
            )
        check_same_recipe((checkpoint / "config.yaml").read_text(), to_yaml(config))
        log.info("continuing from %s", checkpoint)
    elif resume and (run_dir / "config.yaml").is_file():
        check_same_recipe((run_dir / "config.yaml").read_text(), to_yaml(config))
    elif resume is None and (run_dir / "metrics.jsonl").exists():
        raise ConfigError([f"{run_dir} holds an earlier run; add --resume auto, or set another name="])
    state = read_state(checkpoint) if checkpoint else RunState()

    from core.cluster.actors import connect
    from rl.loop.cluster import start_cluster
    from rl.loop.controller import Controller
    from rl.recipe.placement import make_plan

    connect()
    cluster = start_cluster(config, make_plan(config), checked.reward_sets)
    try:
        Controller(config, cluster, run_dir, state, checkpoint, fresh=resume is None).run()
    finally:
        cluster.workers.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
