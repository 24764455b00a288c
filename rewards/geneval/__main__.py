"""Command line: `python -m rewards.geneval check ...` and `python -m rewards.geneval prompts ...`."""

from __future__ import annotations

import sys

from core.command_line import run_one_of

COMMANDS = {
    "check": (
        "rewards.geneval.selfcheck",
        "load detector and colour rule and try them on generated pictures",
    ),
    "prompts": ("rewards.geneval.train_prompts", "generate training prompts of the six tags"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit code."""
    return run_one_of(COMMANDS, argv, program="python -m rewards.geneval", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
