"""What the command lines that run a recipe share: its arguments, and how they say that it cannot run."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence

from core.logs import start_logging
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


def run_one_of(
    commands: Mapping[str, tuple[str, str]],
    argv: Sequence[str] | None,
    *,
    program: str,
    description: str | None,
) -> int:
    """Run the command that `argv` begins with; its exit code, which is 2 where it cannot do what it was asked.

    commands: name -> module and what it does. A module, of which only the one used loads, has `add_arguments(parser)`,
    `run(arguments)` and, where there are any, the errors of `run` that a user can mend (`REFUSALS`).
    """
    given = sys.argv[1:] if argv is None else argv
    chooser = argparse.ArgumentParser(
        prog=program,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:10} {summary}" for name, (_, summary) in commands.items()),
    )
    chooser.add_argument("command", choices=commands)
    name = chooser.parse_args(given[:1]).command
    module = importlib.import_module(commands[name][0])
    parser = argparse.ArgumentParser(prog=f"{program} {name}", description=commands[name][1])
    module.add_arguments(parser)
    # Overrides (key=value) may come before, between and after the flags, which subparsers do not allow.
    arguments = parser.parse_intermixed_args(given[1:])
    start_logging()
    try:
        return module.run(arguments)
    except getattr(module, "REFUSALS", ()) as error:
        return refuse(f"Cannot {name}", error)


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
