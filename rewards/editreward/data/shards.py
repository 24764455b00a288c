"""The one form in which edits lie on disk: tar shards (WebDataset layout), three members a sample, in this order.

    KEY.source.png   the picture before the edit, RGB
    KEY.result.png   the picture after it, RGB; its size may differ
    KEY.json         {"instruction": text, "edit_type": text, "scores": {dimension: number | null},
                      "provenance": {anything JSON: settings, seeds, checkpoint, judge, outcome}}

KEY has no dot and is unique in its shard. A `null` score, or one that is absent, was not given; nothing stands in
its place. Shards are uncompressed, so that a sample can be read at its offset, and each appears complete or not at
all: the unit of work of whoever writes them.
"""

from __future__ import annotations

import glob
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

import recipes
from core.failures import DataError, SampleError
from core.pictures import decode_picture
from core.shards.tar import Member, list_shard, read_member, write_shard_file
from core.text import parse_json

SUFFIXES = ("source.png", "result.png", "json")
EXTENSION = ".tar"


@dataclass(frozen=True)
class EditSample:
    """One edit. `scores`: dimension -> label, `None` where it was not given; empty before labelling."""

    key: str
    source: Image.Image
    result: Image.Image
    instruction: str
    edit_type: str
    scores: Mapping[str, float | None] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


def write_shard(path: str | Path, samples: Iterable[EditSample]) -> int:
    """Write one shard, whole or not at all, and return the number of samples. Equal samples give equal bytes.

    Raises DataError for a bad name, a key with a dot, a repeated key, or a score that is not finite.
    """
    path, keys = Path(path), set[str]()
    if path.suffix != EXTENSION:
        raise DataError(f"{path}: a shard's name ends in {EXTENSION}")

    def members() -> Iterator[tuple[str, bytes]]:
        for sample in samples:
            _check(sample, keys, path)
            for suffix, content in zip(SUFFIXES, _contents(sample), strict=True):
                yield f"{sample.key}.{suffix}", content

    write_shard_file(path, members())
    return len(keys)


def find_shards(key: str, patterns: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Files that paths and globs name, sorted, and a sentence for each of the recipe's `key` that names none."""
    found = {pattern: glob.glob(str(recipes.resolve(pattern))) for pattern in patterns}
    problems = [f"{key}: no file matches {pattern!r}" for pattern, files in found.items() if not files]
    return sorted({Path(file) for files in found.values() for file in files}), problems


def read_shard(path: str | Path) -> Iterator[EditSample]:
    """All samples of a shard, in order. Raises DataError for a broken shard, SampleError for a broken sample."""
    with open(path, "rb") as file:
        for key, members in shard_members(path):
            yield read_sample(file, key, members)


def shard_members(path: str | Path) -> list[tuple[str, dict[str, Member]]]:
    """Keys of a shard, in order, each with its files by suffix. Raises DataError for a file that is no whole tar."""
    listing = list_shard(path)
    if listing.cut:
        raise DataError(f"{path}: {listing.cut}; copy or make it again")
    return listing.samples


def read_sample(file: io.BufferedIOBase, key: str, members: Mapping[str, Member]) -> EditSample:
    """Decode one sample from an open shard. Raises SampleError naming what is wrong with it."""
    absent = [suffix for suffix in SUFFIXES if suffix not in members]
    if absent:
        raise SampleError(f"no {' and no '.join(f'{key}.{suffix}' for suffix in absent)}")
    raw = {suffix: read_member(file, members[suffix], f"{key}.{suffix}") for suffix in SUFFIXES}
    record = parse_record(raw["json"])
    return EditSample(
        key,
        _picture(raw["source.png"], f"{key}.source.png"),
        _picture(raw["result.png"], f"{key}.result.png"),
        record["instruction"],
        record["edit_type"],
        record["scores"],
        record["provenance"],
    )


def parse_record(content: bytes) -> dict[str, Any]:
    """The checked JSON of a sample. Raises SampleError."""
    try:
        record = parse_json(content)
    except ValueError as error:
        raise SampleError(f"its JSON cannot be read ({error})") from error
    if not isinstance(record, dict):
        raise SampleError("its JSON is not an object")
    if not isinstance(record.get("instruction"), str) or not record["instruction"].strip():
        raise SampleError("no instruction")
    scores = record.setdefault("scores", {})
    if not isinstance(scores, dict):
        raise SampleError("scores is not an object")
    for name, value in scores.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value)):
            raise SampleError(f"score {name!r} is {value!r}, neither a finite number nor null")
    record.setdefault("provenance", {})
    record["edit_type"] = str(record.get("edit_type", "unknown"))
    return record


def _check(sample: EditSample, keys: set[str], path: Path) -> None:
    if not sample.key or "." in sample.key or "/" in sample.key:
        raise DataError(f"{path}: key {sample.key!r} must not be empty nor hold a dot or a slash")
    if sample.key in keys:
        raise DataError(f"{path}: key {sample.key!r} comes twice")
    for name, value in sample.scores.items():
        if value is not None and not math.isfinite(value):
            raise DataError(
                f"{path}: {sample.key}: score {name!r} is {value}; write None for one that is missing"
            )
    keys.add(sample.key)


def _contents(sample: EditSample) -> tuple[bytes, bytes, bytes]:
    record = {
        "instruction": sample.instruction,
        "edit_type": sample.edit_type,
        "scores": dict(sample.scores),
        "provenance": dict(sample.provenance),
    }
    text = json.dumps(record, ensure_ascii=False, sort_keys=True, allow_nan=False)
    return _png(sample.source), _png(sample.result), text.encode("utf-8")


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _picture(content: bytes, name: str) -> Image.Image:
    try:
        return decode_picture(content, name)
    except ValueError as error:
        raise SampleError(f"{name} cannot be decoded ({error})") from error
