"""Where each benchmark keeps pictures, so that a folder somebody else generated is read and ours can be by others.

layout     pictures of a prompt
---------  -----------------------------------------------------------------------------------------------
numbered   KEY/samples/00000.png, 00001.png ... with the prompt's record in KEY/metadata.jsonl (GenEval)
keyed      KEY.png: four pictures in two rows (DPG-Bench),
           or one alone (ImgEdit; GEdit-Bench below fullset/, KEY being GROUP/LANGUAGE/KEY)
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from core.files import atomic_write_bytes, atomic_write_text
from core.pictures import refuse_large, to_rgb
from core.text import parse_json, read_text
from rewards.benchmarks.items import Item

GRID = 4


@dataclass(frozen=True)
class Picture:
    """A picture in a file: all of it, or (`cell` 0 to 3, in reading order) a quarter of a grid."""

    path: Path
    cell: int | None = None

    def load(self) -> Image.Image:
        """Upright RGB. Raises ValueError naming an unreadable file or a grid of odd size."""
        with self._open() as image:
            picture = to_rgb(image)
        return picture if self.cell is None else picture.crop(_cell_box(self.path, picture.size, self.cell))

    def check(self) -> None:
        """The same without decoding the pixels."""
        with self._open() as image:
            image.verify()
            size = image.size
        if self.cell is not None:
            _cell_box(self.path, size, self.cell)

    @contextmanager
    def _open(self) -> Iterator[Image.Image]:
        try:
            with Image.open(self.path) as image:
                refuse_large(image)
                yield image
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{self.path}: is not a readable picture ({error}); make it again") from error


class Layout(Protocol):
    """One benchmark's way of naming files below a folder."""

    def find(self, folder: Path, item: Item, count: int) -> list[Picture | None]:
        """The `count` pictures of an item, None for each that is absent."""
        ...

    def problems(self, folder: Path, item: Item, count: int) -> list[str]:
        """What is wrong with what is there of an item; what is absent is not."""
        ...

    def write(self, folder: Path, item: Item, images: Sequence[Image.Image]) -> None:
        """All pictures of an item, each file whole or not at all; those that are there stay."""
        ...


class Numbered:
    """GenEval's layout, for any number of pictures."""

    def find(self, folder: Path, item: Item, count: int) -> list[Picture | None]:
        files = [Picture(path) for path in _numbered(folder / item.key / "samples")[:count]]
        return [*files, *[None] * (count - len(files))]

    def problems(self, folder: Path, item: Item, count: int) -> list[str]:
        found = _numbered(folder / item.key / "samples")
        record = folder / item.key / "metadata.jsonl"
        problems = _unreadable([Picture(path) for path in found[:count]])
        if len(found) > count:
            problems.append(
                f"{folder / item.key / 'samples'}: holds {len(found)} pictures; give --num-images-per-prompt "
                f"{len(found)}, or take the surplus away"
            )
        try:
            prompt = parse_json(read_text(record))["prompt"] if record.is_file() else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            return [*problems, f"{record}: is not the record of a prompt ({type(error).__name__}: {error})"]
        if prompt is not None and prompt != item.prompt.prompt:
            problems.append(
                f"{record}: these pictures are of {prompt!r}, and the data has {item.prompt.prompt!r} here; give "
                "the data that they were made from"
            )
        return problems

    def write(self, folder: Path, item: Item, images: Sequence[Image.Image]) -> None:
        record = {"prompt": item.prompt.prompt, **item.prompt.metadata}
        atomic_write_text(folder / item.key / "metadata.jsonl", json.dumps(record, ensure_ascii=False) + "\n")
        for k, image in enumerate(images):
            _save(folder / item.key / "samples" / f"{k:05d}.png", image)


class Keyed:
    """One file per prompt, below `root`: four pictures make one of twice the width and height, one stands alone."""

    def __init__(self, root: str = "") -> None:
        self.root = root

    def find(self, folder: Path, item: Item, count: int) -> list[Picture | None]:
        path = folder / self.root / f"{item.key}.png"
        if not path.is_file():
            return [None] * count
        return [Picture(path, cell if count > 1 else None) for cell in range(count)]

    def problems(self, folder: Path, item: Item, count: int) -> list[str]:
        return _unreadable(self.find(folder, item, count)[:1])

    def write(self, folder: Path, item: Item, images: Sequence[Image.Image]) -> None:
        if len(images) == 1:
            _save(folder / self.root / f"{item.key}.png", images[0])
            return
        width, height = images[0].size
        grid = Image.new("RGB", (2 * width, 2 * height))
        for cell, image in enumerate(images):
            grid.paste(image, (cell % 2 * width, cell // 2 * height))
        _save(folder / self.root / f"{item.key}.png", grid)


def _numbered(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    files = [path for path in folder.iterdir() if re.fullmatch(r"\d+\.png", path.name)]
    return sorted(files, key=lambda path: int(path.stem))


def _unreadable(pictures: Sequence[Picture | None]) -> list[str]:
    problems = []
    for picture in pictures:
        try:
            if picture is not None:
                picture.check()
        except ValueError as error:
            problems.append(str(error))
    return problems


def _cell_box(path: Path, size: tuple[int, int], cell: int) -> tuple[int, int, int, int]:
    """Quarters of whatever size the file has: a stated resolution that is wrong would crop beside the pictures."""
    if size[0] % 2 or size[1] % 2:
        raise ValueError(
            f"{path}: {size[0]} x {size[1]} px do not divide into a grid of four; if it is one picture, give "
            "--num-images-per-prompt 1"
        )
    width, height = size[0] // 2, size[1] // 2
    left, top = cell % 2 * width, cell // 2 * height
    return (left, top, left + width, top + height)


def _save(path: Path, image: Image.Image) -> None:
    if path.is_file():
        return
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    atomic_write_bytes(path, buffer.getvalue())
