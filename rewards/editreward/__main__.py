"""Command line: `python -m rewards.editreward COMMAND ...`, one command for each step from edits to a served reward."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "generate": ("rewards.editreward.data.generate", "draw edits of mixed quality from a Kontext checkpoint"),
    "label": ("rewards.editreward.data.label", "have the judge grade edits"),
    "train": ("rewards.editreward.train.command", "train a regressor on labelled shards"),
    "evaluate": ("rewards.editreward.evaluate.command", "measure an exported model and probe it"),
    "export": ("rewards.editreward.train.export", "write the model folder that stock vLLM serves"),
    "serve": ("rewards.editreward.serve.command", "serve an exported model with vLLM"),
}
"""Name -> module with `add_arguments(parser)` and `run(arguments)`, and what it does. Only the one used loads."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit code."""
    words = sys.argv[1:] if argv is None else argv
    program = "python -m rewards.editreward"
    chooser = argparse.ArgumentParser(
        prog=program,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:10} {summary}" for name, (_, summary) in COMMANDS.items()),
    )
    chooser.add_argument("command", choices=COMMANDS)
    name = chooser.parse_args(words[:1]).command
    module = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser(prog=f"{program} {name}", description=COMMANDS[name][1])
    module.add_arguments(parser)
    # Overrides (key=value) may come before, between and after the flags, which subparsers do not allow.
    return module.run(parser.parse_intermixed_args(words[1:]))


if __name__ == "__main__":
    sys.exit(main())
