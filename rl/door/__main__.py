"""`unipic-rl COMMAND ...`, or `python -m rl.door COMMAND ...`: every command of the project by one name."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": ("rl.train", "train a recipe with online RL"),
    "evaluate": ("rl.evaluate.__main__", "generate for a benchmark and score it"),
    "sweep": ("rl.sweep.__main__", "a grid of recipes and seeds, in one table"),
    "report": ("rl.report.__main__", "runs as one HTML page"),
    "export": ("rl.export.__main__", "an adapter to publish, with its model card"),
    "generate": ("models.generate.__main__", "draw and edit pictures"),
    "understand": ("models.understand.__main__", "ask a MetaQuery model about pictures"),
    "pretrain": ("pretrain.flow.__main__", "flow matching: Kontext, MetaQuery"),
    "cache": ("pretrain.data.cache", "encode the data of pre-training beforehand"),
    "editreward": ("rewards.editreward.__main__", "make, train and serve the regressor of edits"),
    "geneval": ("rewards.geneval.__main__", "prompts and checks of GenEval"),
    "serve": ("rewards.serve", "rewards behind HTTP"),
    "recipes": ("rl.door.recipes", "list, show and compare recipes"),
    "doctor": ("rl.door.doctor", "what this machine has, and what a recipe lacks here"),
}
"""Name -> the module whose `main` is the command, and what it does. A module loads only when it is asked for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; its exit code. 2 for no command or an unknown one."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] in ([], ["-h"], ["--help"]):
        sys.stdout.write(_usage())
        return 0 if given else 2
    if given[0] not in COMMANDS:
        sys.stderr.write(f"unipic-rl: there is no command {given[0]!r}\n\n{_usage()}")
        return 2
    command = importlib.import_module(COMMANDS[given[0]][0]).main
    assert inspect.isfunction(command)
    return command(given[1:]) or 0


def _usage() -> str:
    lines = [f"  {name:10}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: unipic-rl COMMAND ...   (COMMAND --help says more)", "", *lines, ""])


if __name__ == "__main__":
    sys.exit(main())
