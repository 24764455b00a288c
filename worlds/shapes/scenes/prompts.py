"""The prompt sets of the shapes world, as JSONL files: `python -m worlds.shapes.scenes.prompts OUTDIR`.

`--edit-train N [--seed S]` writes `edit_train.jsonl` alone, with N lines of fresh draws.

Text-to-image lines take turns over GenEval's six tags, edit lines over the six kinds, so any prefix of a file
is balanced; lines of insertion name two pictures. Pictures are embedded as PNG data URIs. What a tag has too few
texts for is repeated, in rounds: its lines still differ in their noise, since that follows from the line's index.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from worlds.shapes.scenes.captions import FAMILIES, TAGS, Caption, captions
from worlds.shapes.scenes.edits import KINDS, sample_edit
from worlds.shapes.scenes.inserts import sample_insert
from worlds.shapes.scenes.render import render, render_batch
from worlds.shapes.scenes.world import BACKGROUNDS

logger = logging.getLogger(__name__)

COUNTS = {
    "train": {"t2i": 1024, "edit": 1024, "insert": 1024},
    "heldout": {"t2i": 2048, "edit": 2048, "insert": 1024},
}
WIDE_COUNT = 4096
SEEDS = {"train": 1, "heldout": 2}


def t2i_lines(split: str, count: int, seed: int | None = None) -> Iterator[dict[str, Any]]:
    """Prompt lines of the text-to-image task; another `seed` than the split's own gives fresh draws."""
    rng = np.random.default_rng(SEEDS[split] if seed is None else seed)
    each = -(-count // len(TAGS))
    columns = [_tag_captions(rng, tag, split, each) for tag in TAGS]
    for caption in itertools.islice(itertools.chain.from_iterable(zip(*columns, strict=True)), count):
        yield _line(caption)


def _line(caption: Caption) -> dict[str, Any]:
    record = caption.metadata()
    return {"prompt": record.pop("prompt"), "metadata": record}


def _tag_captions(rng: np.random.Generator, tag: str, split: str, count: int) -> list[Caption]:
    """Captions of one tag, without repeats where there are enough; the smaller families whole, then more."""
    families = _families(tag, split)
    chosen: list[Caption] = []
    for left, family in zip(range(len(families), 0, -1), sorted(families, key=len), strict=True):
        share = (count - len(chosen)) // left
        chosen += [family[i] for i in rng.permutation(len(family))[:share]]
    rounds = -(-count // len(chosen))
    order = [index for _ in range(rounds) for index in rng.permutation(len(chosen))]
    return [chosen[index] for index in order[:count]]


def _families(tag: str, split: str) -> list[list[Caption]]:
    """The captions of a tag with and without backgrounds, one list for those without colours and one for those with."""
    return [
        [replace(item, background=b) for item in captions(tag, colored, split) for b in (None, *BACKGROUNDS)]
        for colored in FAMILIES[tag]
    ]


def wide_t2i_lines(count: int, seed: int = SEEDS["train"]) -> Iterator[dict[str, Any]]:
    """Training lines for long runs: tags in proportion to the fourth root of their number of texts, mixed.

    In equal turns a run of thousands of groups sees the few texts of single_object and two_object so often that it
    learns them by heart, which held-out texts gain nothing from.
    """
    rng = np.random.default_rng(seed)
    texts = {tag: sum(len(family) for family in _families(tag, "train")) for tag in TAGS}
    total = sum(n**0.25 for n in texts.values())
    chosen = [
        caption
        for tag, n in texts.items()
        for caption in _tag_captions(rng, tag, "train", math.ceil(count * n**0.25 / total))
    ]
    for index in rng.permutation(len(chosen))[:count]:
        yield _line(chosen[index])


def edit_lines(split: str, count: int, seed: int | None = None) -> Iterator[dict[str, Any]]:
    """Prompt lines of the editing task, no two of them with the same scene and instruction; `seed` as above."""
    rng = np.random.default_rng(SEEDS[split] if seed is None else seed)
    seen: set[tuple[str, str]] = set()
    while len(seen) < count:
        kind = KINDS[len(seen) % len(KINDS)]
        example = sample_edit(rng, split, kind)
        key = (example.source.content, example.instruction)
        if key not in seen:
            seen.add(key)
            image = data_uri(render(example.source))
            yield {"prompt": example.instruction, "image": image, "metadata": example.metadata}


def insert_lines(split: str, count: int, seed: int | None = None) -> Iterator[dict[str, Any]]:
    """Prompt lines of the insertion task, which name two pictures; `seed` as above."""
    rng = np.random.default_rng(SEEDS[split] if seed is None else seed)
    for _ in range(count):
        example = sample_insert(rng, split)
        references = [data_uri(picture) for picture in render_batch([example.source, example.shown])]
        yield {"prompt": example.instruction, "references": references, "metadata": example.metadata}


def data_uri(image: np.ndarray) -> str:
    """A picture, uint8 [H, W, 3], as a data URI: PNG with a palette, lossless.

    Raises ValueError for a picture of more than 256 colours, which no scene has.
    """
    colors, index = np.unique(image.reshape(-1, 3), axis=0, return_inverse=True)
    if len(colors) > 256:
        raise ValueError(f"data_uri: {len(colors)} colours do not fit a palette of 256")
    height, width = image.shape[:2]
    picture = Image.frombytes("P", (width, height), index.astype(np.uint8).tobytes())
    picture.putpalette(colors.astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write(folder: Path) -> None:
    """Write the files `{t2i,edit,insert}_{train,heldout}.jsonl`, and `t2i_train_wide.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, counts in COUNTS.items():
        for task, lines in (("t2i", t2i_lines), ("edit", edit_lines), ("insert", insert_lines)):
            write_lines(folder / f"{task}_{split}.jsonl", lines(split, counts[task]))
    write_lines(folder / "t2i_train_wide.jsonl", wide_t2i_lines(WIDE_COUNT))


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """One prompt a line."""
    rows = [json.dumps(line, separators=(",", ":")) for line in lines]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    logger.info("%s: %d lines", path, len(rows))


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="python -m worlds.shapes.scenes.prompts")
    parser.add_argument("folder", type=Path, metavar="OUTDIR")
    parser.add_argument(
        "--edit-train", type=int, metavar="N", help="N editing prompts for training, no other file"
    )
    parser.add_argument("--seed", type=int, default=SEEDS["train"], help="of --edit-train")
    arguments = parser.parse_args(argv)
    if arguments.edit_train is None:
        write(arguments.folder)
        return
    if arguments.edit_train < 1:
        parser.error(f"--edit-train is {arguments.edit_train}; give 1 or more")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_lines(
        arguments.folder / "edit_train.jsonl", edit_lines("train", arguments.edit_train, arguments.seed)
    )


if __name__ == "__main__":
    main()
