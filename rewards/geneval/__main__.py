"""Command line: `python -m rewards.geneval check ...` and `python -m rewards.geneval prompts ...`."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "check": (
        "rewards.geneval.selfcheck",
        "load detector and colour rule and try them on generated pictures",
    ),
    "prompts": ("rewards.geneval.train_prompts", "generate training prompts of the six tags"),
}
"""Name -> module with `add_arguments(parser)` and `run(arguments)`, and what it does. Only the one used loads."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit code."""
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m rewards.geneval", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if words[:1] == [name]:
            importlib.import_module(module).add_arguments(command)
    arguments = parser.parse_args(words)
    return importlib.import_module(COMMANDS[arguments.command][0]).run(arguments)


if __name__ == "__main__":
    sys.exit(main())
