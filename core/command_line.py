"""What the command lines that run a recipe share: its arguments, and how they say that it cannot run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from core.recipe_help import add_help_config
from core.run_status import ACCEPT_CHANGES


def add_recipe_arguments(
    parser: argparse.ArgumentParser, example: str, schema: type, *, dry_run: str = "", resume: bool = False
) -> None:
    """Recipe and overrides, `--help-config`, `--dry-run` if there is a help text for it, `--resume` with its flag."""
    add_help_config(parser, schema)
    parser.add_argument("recipe", help=f"YAML file, for example {example}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    if dry_run:
        parser.add_argument("--dry-run", action="store_true", help=dry_run)
    if resume:
        parser.add_argument("--resume", metavar="auto|CHECKPOINT", help="continue a run of the same recipe")
        parser.add_argument(
            ACCEPT_CHANGES, action="store_true",
            help="with --resume: go on though prompts, rewards, data or base weights are others than they were",
        )  # fmt: skip


def positive(text: str) -> int:
    """The type of an argument that is a whole number of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def refuse(what: str, error: Exception, *, code: int = 2) -> int:
    """Say on stderr why a command cannot do what it was asked; its exit code."""
    sys.stderr.write(f"{what}:\n{error}\n")
    return code


def report_dry_run(plan: Sequence[str], problems: Sequence[str]) -> int:
    """Print the plan and what is missing; the command's exit code."""
    sys.stdout.write("".join(f"{line}\n" for line in plan))
    if problems:
        sys.stdout.write("Not ready:\n" + "".join(f"- {problem}\n" for problem in problems))
        return 2
    sys.stdout.write("Ready to run.\n")
    return 0
