"""Command line: `python -m rewards.editreward COMMAND ...`, one command for each step from edits to a served reward."""

from __future__ import annotations

import sys

from core.command_line import run_one_of

COMMANDS = {
    "generate": ("rewards.editreward.data.generate", "draw edits of mixed quality from a Kontext checkpoint"),
    "label": ("rewards.editreward.data.label", "have the judge grade edits"),
    "train": ("rewards.editreward.train.command", "train a regressor on labelled shards"),
    "evaluate": ("rewards.editreward.evaluate.command", "measure an exported model and probe it"),
    "export": ("rewards.editreward.train.export", "write the model folder that stock vLLM serves"),
    "serve": ("rewards.editreward.serve.command", "serve an exported model with vLLM"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit code, which is 2 where it cannot do what it was asked."""
    return run_one_of(COMMANDS, argv, program="python -m rewards.editreward", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
