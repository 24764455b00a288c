"""What is in the shards: every sample decoded once, its source hashed, broken ones named; then the split.

The result of a shard is kept under the run's folder (`index/`) and made again when the shard changes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

import recipes
from core.files import atomic_write_text
from core.shards.indexing import index_files
from models.qwen25_vl import read_token_pixels
from rewards.editreward.config import DataSection, Recipe
from rewards.editreward.data.shards import (
    DataError,
    EditSample,
    Member,
    SampleError,
    find_shards,
    read_sample,
    shard_members,
)
from rewards.editreward.processing import InputError, refuse_reserved, shown_size

log = logging.getLogger(__name__)
FORMAT = 1
SPLITS = ("train", "validation", "test")
NAMED = 10


@dataclass(frozen=True)
class Entry:
    """One usable sample. `source`: hash of the source picture; `group`: of source and instruction.

    `scores` are in the order of the recipe's dimensions, in label units.
    """

    shard: str
    key: str
    members: dict[str, Member]
    source: str
    group: str
    instruction: str
    edit_type: str
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Corpus:
    """Usable samples by split, in shard order. `corrupt`: (shard, key, reason); `unlabelled`: lacked a dimension."""

    splits: dict[str, list[Entry]]
    corrupt: tuple[tuple[str, str, str], ...]
    unlabelled: int

    def lines(self) -> list[str]:
        """What was found, for the log."""
        lines = [
            f"{name}: {len(entries)} samples, {len({e.group for e in entries})} (source, instruction) groups, "
            f"{len({e.source for e in entries})} sources"
            for name, entries in self.splits.items()
        ]
        if self.unlabelled:
            lines.append(f"left out without a label on every dimension: {self.unlabelled}")
        if self.corrupt:
            lines.append(f"left out as corrupt: {len(self.corrupt)}")
            lines += [f"  {shard}: {key}: {reason}" for shard, key, reason in self.corrupt[:NAMED]]
        return lines


def picture_hash(picture: Image.Image) -> str:
    """Hash of what is seen: equal pictures are equal whatever file they came from."""
    rgb = picture.convert("RGB")
    digest = hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode())
    digest.update(rgb.tobytes())
    return digest.hexdigest()[:32]


def split_of(source: str, data: DataSection) -> str:
    """The split of a source picture, by hash: all its edits go together, and no other data moves it."""
    digest = hashlib.sha256(f"{data.split_salt}:{source}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < data.test_share:
        return "test"
    return "validation" if place < data.test_share + data.validation_share else "train"


def labelled_shards(recipe: Recipe) -> list[Path]:
    """The labelled edits of a recipe. Raises DataError for a pattern without a file."""
    patterns = recipe.data.shards or [str(recipe.run_dir / "labelled" / "*.tar")]
    shards, problems = find_shards("data.shards", patterns)
    if problems:
        raise DataError("; ".join(problems))
    return shards


def load_corpus(recipe: Recipe, index_dir: Path | None = None) -> Corpus:
    """Index all shards of a recipe, by default in its run's `index/`.

    A sample that the recipe's model could not be shown is corrupt too.

    Raises DataError for a broken shard, for a larger share of corrupt samples than `max_corrupt_share` (the first
    are named), or for a split without samples.
    """
    index_dir = index_dir or recipe.run_dir / "index"
    shards = labelled_shards(recipe)
    pending = [shard for shard in shards if not _cached(shard, index_dir)]
    if pending:
        index_files(partial(_index, index_dir=index_dir), pending, recipe.data.index_workers)
    return _assemble(shards, recipe, index_dir)


def _assemble(shards: list[Path], recipe: Recipe, index_dir: Path) -> Corpus:
    data = recipe.data
    splits: dict[str, list[Entry]] = {name: [] for name in SPLITS}
    corrupt: list[tuple[str, str, str]] = []
    seen = unlabelled = 0
    token_pixels = read_token_pixels(recipes.resolve(recipe.model.path))
    for shard in shards:
        record = json.loads(_index_file(shard, index_dir).read_text(encoding="utf-8"))
        corrupt += [(str(shard), key, reason) for key, reason in record["corrupt"]]
        seen += len(record["corrupt"]) + len(record["samples"])
        for item in record["samples"]:
            scores = [item["scores"].get(name) for name in data.dimensions]
            if any(score is None for score in scores):
                unlabelled += 1
                continue
            reason = _unusable(item, scores, recipe, token_pixels)
            if reason:
                corrupt.append((str(shard), item["key"], reason))
                continue
            members = {suffix: Member(*place) for suffix, place in item["members"].items()}
            entry = Entry(
                str(shard), item["key"], members, item["source"], _group(item), item["instruction"],
                item["edit_type"], tuple(map(float, scores)),
            )  # fmt: skip
            splits[split_of(entry.source, data)].append(entry)
    corpus = Corpus(splits, tuple(corrupt), unlabelled)
    if len(corrupt) > data.max_corrupt_share * seen:
        raise DataError(
            f"{len(corrupt)} of {seen} samples are corrupt, above data.max_corrupt_share={data.max_corrupt_share}:\n"
            + "\n".join(f"{shard}: {key}: {reason}" for shard, key, reason in corrupt[:NAMED])
        )
    empty = [name for name, entries in splits.items() if len(entries) < 2]
    if empty:
        raise DataError(
            f"too few samples for the split {' and '.join(empty)}; raise its share or give more sources "
            f"({seen} samples read, {unlabelled} without a label on {', '.join(data.dimensions)})"
        )
    return corpus


def _unusable(item: dict, scores: list[float], recipe: Recipe, token_pixels: int) -> str | None:
    """Why a sample that can be read cannot be used by this recipe."""
    low, high = recipe.data.score_low, recipe.data.score_high
    outside = [score for score in scores if not low <= score <= high]
    if outside:
        return f"score {outside[0]} lies outside [data.score_low, data.score_high] = [{low}, {high}]"
    try:
        refuse_reserved(item["instruction"])
        for width, height in item["sizes"]:
            shown_size(width, height, recipe.input.min_pixels, recipe.input.max_pixels, token_pixels)
    except InputError as error:
        return str(error)
    return None


def _group(item: dict) -> str:
    return hashlib.sha256(f"{item['source']}:{item['instruction']}".encode()).hexdigest()[:32]


def _index_file(shard: Path, index_dir: Path) -> Path:
    return index_dir / f"{hashlib.sha256(str(shard.absolute()).encode()).hexdigest()[:12]}-{shard.stem}.json"


def _stamp(shard: Path) -> list[int]:
    status = shard.stat()
    return [FORMAT, status.st_size, status.st_mtime_ns]


def _cached(shard: Path, index_dir: Path) -> bool:
    try:
        record = json.loads(_index_file(shard, index_dir).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return record["stamp"] == _stamp(shard)


def _index(shard: Path, index_dir: Path) -> None:
    """Decode every sample of a shard once and write what was found."""
    samples, corrupt = [], []
    stamp = _stamp(shard)
    with open(shard, "rb") as file:
        for key, members in shard_members(shard):
            try:
                sample = read_sample(file, key, members)
            except SampleError as error:
                corrupt.append((key, str(error)))
                continue
            samples.append(
                {
                    "key": key,
                    "members": {suffix: dataclasses.astuple(member) for suffix, member in members.items()},
                    "source": picture_hash(sample.source),
                    "sizes": [sample.source.size, sample.result.size],
                    "instruction": sample.instruction,
                    "edit_type": sample.edit_type,
                    "scores": dict(sample.scores),
                }
            )
    text = json.dumps({"stamp": stamp, "samples": samples, "corrupt": corrupt}, ensure_ascii=False)
    atomic_write_text(_index_file(shard, index_dir), text)


def read_entry(entry: Entry) -> EditSample:
    """The pictures of an indexed sample. Raises DataError when the shard is no longer what was indexed."""
    try:
        with open(entry.shard, "rb") as file:
            return read_sample(file, entry.key, entry.members)
    except (OSError, SampleError) as error:
        raise DataError(
            f"{entry.shard}: {entry.key}: {error}; the shard changed since it was indexed"
        ) from error


def label_statistics(entries: Sequence[Entry]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation of every dimension. Raises DataError for one that never varies."""
    import numpy as np

    labels = np.array([entry.scores for entry in entries])
    means, stds = labels.mean(0), labels.std(0)
    if not (stds > 0).all():
        raise DataError("a dimension has the same label on every training sample: there is nothing to learn")
    return tuple(map(float, means)), tuple(map(float, stds))


def whole_groups(entries: Sequence[Entry], most: int) -> list[Entry]:
    """About `most` entries for a measurement: whole groups in the order of their hashes; all where `most` is 0."""
    if not most or len(entries) <= most:
        return list(entries)
    sizes: dict[str, int] = {}
    for entry in entries:
        sizes[entry.group] = sizes.get(entry.group, 0) + 1
    chosen, total = set(), 0
    for group in sorted(sizes):
        if total >= most:
            break
        chosen.add(group)
        total += sizes[group]
    return [entry for entry in entries if entry.group in chosen]
