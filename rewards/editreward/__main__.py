"""Command line: `python -m rewards.editreward COMMAND ...`, one command for each step from edits to a served reward."""

from __future__ import annotations

import argparse
import importlib
import sys

from core.command_line import refuse
from core.logs import start_logging

COMMANDS = {
    "generate": ("rewards.editreward.data.generate", "draw edits of mixed quality from a Kontext checkpoint"),
    "label": ("rewards.editreward.data.label", "have the judge grade edits"),
    "train": ("rewards.editreward.train.command", "train a regressor on labelled shards"),
    "evaluate": ("rewards.editreward.evaluate.command", "measure an exported model and probe it"),
    "export": ("rewards.editreward.train.export", "write the model folder that stock vLLM serves"),
    "serve": ("rewards.editreward.serve.command", "serve an exported model with vLLM"),
}
"""Name -> module with `add_arguments(parser)`, `run(arguments)` and the errors of `run` that a user can mend
(`REFUSALS`), and what it does. Only the one used loads."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit code, which is 2 where it cannot do what it was asked."""
    given = sys.argv[1:] if argv is None else argv
    program = "python -m rewards.editreward"
    chooser = argparse.ArgumentParser(
        prog=program,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:10} {summary}" for name, (_, summary) in COMMANDS.items()),
    )
    chooser.add_argument("command", choices=COMMANDS)
    name = chooser.parse_args(given[:1]).command
    module = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser(prog=f"{program} {name}", description=COMMANDS[name][1])
    module.add_arguments(parser)
    # Overrides (key=value) may come before, between and after the flags, which subparsers do not allow.
    arguments = parser.parse_intermixed_args(given[1:])
    start_logging()
    try:
        return module.run(arguments)
    except module.REFUSALS as error:
        return refuse(f"Cannot {name}", error)


if __name__ == "__main__":
    sys.exit(main())
