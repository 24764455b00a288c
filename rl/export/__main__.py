"""Command line: `python -m rl.export RUN|CHECKPOINT FOLDER [--merged]`: an adapter to publish, with a model card."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import recipes
from core.checkpoints import CHECKPOINTS
from core.command_line import refuse
from core.files import atomic_write_text, new_folder, verify_folder
from models.lora.attach import hash_state
from models.lora.files import read_adapter, save_adapter, save_merged_transformer
from rl.export.card import model_card
from rl.recipe.schema import RunConfig, load_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the folder and print what is in it; 2 where there is nothing to export."""
    parser = argparse.ArgumentParser(
        prog="python -m rl.export",
        description="The adapter of a run or a checkpoint for PEFT and diffusers, with a model card that says what it "
        "was trained on and what it scores.",
    )
    parser.add_argument("source", type=Path, metavar="RUN|CHECKPOINT", help="folder that rl.train made")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="new folder to write")
    parser.add_argument("--merged", action="store_true", help="also transformer/, the adapter merged into it")
    options = parser.parse_args(arguments)
    try:
        names = export(options.source, options.folder, merged=options.merged)
    except (OSError, ValueError) as error:
        return refuse("Cannot export", error)
    sys.stdout.write("".join(f"{options.folder / name}\n" for name in names))
    return 0


def export(source: Path, folder: Path, *, merged: bool) -> list[str]:
    """The names of what `folder` then holds, which is written whole or not at all.

    Raises ValueError for a source without an adapter, a damaged checkpoint or a folder that is there already; OSError
    for what cannot be read.
    """
    if folder.exists():
        raise ValueError(f"{folder} is there already; give a new folder")
    if source.parent.name == CHECKPOINTS and (problems := verify_folder(source)):
        raise ValueError("\n".join(problems))
    if not (source / "config.yaml").is_file():
        raise ValueError(f"{source} is no run and no checkpoint: it has no config.yaml")
    config = load_config(source / "config.yaml")
    state, settings = read_adapter(source / "adapter")
    run_dir = source.parent.parent if source.parent.name == CHECKPOINTS else source
    with new_folder(folder) as temporary:
        save_adapter(state, temporary, **asdict(settings))
        if merged:
            save_merged_transformer(
                _base(config), state, temporary / "transformer", rank=settings.rank, alpha=settings.alpha
            )
        atomic_write_text(temporary / "recipe.yaml", (source / "config.yaml").read_text(encoding="utf-8"))
        card = model_card(
            config, run_dir, hash_state(state), recipes.resolve(config.model.path), merged=merged
        )
        atomic_write_text(temporary / "README.md", card)
    return sorted(path.name for path in folder.iterdir())


def _base(config: RunConfig):  # type: ignore[no-untyped-def]
    from models.components import load_transformer, torch_dtype

    dtype = torch_dtype(config.model.dtype)
    return load_transformer(recipes.resolve(config.model.path), dtype=dtype, device="cpu")


if __name__ == "__main__":
    raise SystemExit(main())
