"""What was encoded ahead: safetensors shards of consecutive samples, read row by row.

    <cache_dir>/encoded/latents-<digest>/<source>/<area>-<shard>.safetensors
    <cache_dir>/encoded/text-<digest>/<source>/<shard>.safetensors
    <cache_dir>/encoded/queries-<digest>/<source>/[<area>-]<shard>.safetensors

The digest is of the encoders' files and of every setting that changes a number. A latent shard holds `buckets` and
`rows` (N, -1 for a sample that could not be read) and for each bucket k `latents.k` and, for edits, `references.k`
(M C h w). A text shard holds `rows` (N T: which embedding is a sample's t-th text, -1 for none), `prompt_embeds`
(U L D) and `pooled_prompt_embeds` (U P); row 0 is the empty prompt. A query shard holds `rows` (N 1+T: which states are
those of the empty prompt and of a sample's t-th text) and `states` (U Q D); it has an area where the VLM is shown the
picture of an edit, since its size counts then.
"""

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import recipes
from core.failures import DataError, SampleError
from core.files import atomic_write_json, file_sha256
from models.folders import TEXT_PARTS
from pretrain.data.buckets import areas
from pretrain.data.config import DataConfig
from pretrain.data.sources import Source

FORMAT = 1
_FILES_KEPT = 128


class Shards:
    """Where the shards of one kind are, and their rows. Safe to use from several threads."""

    def __init__(
        self, data: DataConfig, sources: Sequence[Source], name: str, areas: Sequence[Sequence[int]]
    ) -> None:
        """`name`: of their folder. `areas`: of each source; [0] where the size of pictures does not count."""
        self._sources, self._size = sources, data.cache.samples_per_shard
        self._areas = areas
        self.folder = Path(data.cache_dir) / "encoded" / name
        self._lock = threading.Lock()
        self._open = lru_cache(maxsize=_FILES_KEPT)(lambda path: safe_open(path, framework="pt"))

    def path(self, source: int, shard: int, area: int) -> Path:
        """The file of a source's shard."""
        name = f"{area}-{shard:06d}" if area else f"{shard:06d}"
        return self.folder / self._sources[source].digest / f"{name}.safetensors"

    def ordinals(self, source: int, shard: int) -> range:
        """The samples of a source's shard."""
        return range(shard * self._size, min((shard + 1) * self._size, len(self._sources[source])))

    def all(self) -> Iterator[tuple[int, int, int]]:
        """(source, shard, area) of every shard."""
        for source, sizes in enumerate(self._areas):
            for area in sizes:
                for shard in range(-(-len(self._sources[source]) // self._size)):
                    yield source, shard, area

    def require(self) -> None:
        """Raises DataError unless every shard is there."""
        wanted = [self.path(*shard) for shard in self.all()]
        there = {path for folder in {path.parent for path in wanted} for path in folder.glob("*.safetensors")}
        missing = [path for path in wanted if path not in there]
        if missing:
            raise DataError(
                f"{self.folder}: {len(missing)} of {len(wanted)} shards are not encoded yet, the first "
                f"{missing[0]}; run `python -m pretrain.data.cache RECIPE` with these encoders and settings"
            )

    def file(self, source: int, ordinal: int, area: int) -> tuple[Any, int]:
        """The open shard of a sample, and its row there."""
        shard, row = divmod(ordinal, self._size)
        with self._lock:
            return self._open(self.path(source, shard, area)), row


class EncodedLatents:
    """VAE latents of every sample, at every area of the schedule."""

    def __init__(self, data: DataConfig, sources: Sequence[Source]) -> None:
        settings = [FORMAT, data.multiple, data.aspect_buckets, data.cache.samples_per_shard]
        digest = encoders_digest(data, data.cache.vae, ["vae"], settings)
        self.shards = Shards(data, sources, f"latents-{digest}", [areas(data.resolution)] * len(sources))

    def get(self, source: int, ordinal: int, area: int) -> tuple[Tensor, ...]:
        """(latents,), or (source's, target's) of an edit: C h w each.

        Raises:
            SampleError: one that could not be read when it was to be encoded.
        """
        file, place = self.shards.file(source, ordinal, area)
        row = _row(file, place, 0)
        bucket = int(file.get_slice("buckets")[place : place + 1])
        names = [name for name in (f"references.{bucket}", f"latents.{bucket}") if name in file.keys()]  # noqa: SIM118
        return tuple(file.get_slice(name)[row] for name in names)


class EncodedTexts:
    """SD3's embeddings of every text, and of the empty prompt."""

    def __init__(self, data: DataConfig, sources: Sequence[Source]) -> None:
        cache = data.cache
        settings = [FORMAT, cache.max_sequence_length, cache.text_dtype, cache.samples_per_shard]
        digest = encoders_digest(data, cache.text_encoders, TEXT_PARTS, settings)
        self.shards = Shards(data, sources, f"text-{digest}", [[0]] * len(sources))

    def get(self, source: int, ordinal: int, number: int | None) -> tuple[Tensor, Tensor]:
        """Prompt embeddings L D and pooled ones P of a sample's `number`-th text; None: of the empty prompt.

        Raises:
            SampleError: one that could not be read when it was to be encoded.
        """
        file, place = self.shards.file(source, ordinal, 0)
        row = 0 if number is None else _row(file, place, number)
        embeds: Tensor = file.get_slice("prompt_embeds")[row]
        return embeds, file.get_slice("pooled_prompt_embeds")[row]


class EncodedQueries:
    """The VLM's states at frozen queries: of every text, and of the empty prompt beside every picture it is shown."""

    def __init__(self, data: DataConfig, sources: Sequence[Source]) -> None:
        cache = data.cache
        settings: list[object] = [
            FORMAT,
            data.multiple,
            data.aspect_buckets,
            cache.samples_per_shard,
            cache.text_dtype,
        ]
        settings += [cache.position_mode, cache.show_references]
        settings += [encoders_digest(data, cache.conditioner, ["conditioner"], [])]
        digest = encoders_digest(data, cache.vlm, [""], settings)
        self._shown = [cache.show_references and source.task == "edit" for source in data.sources]
        sizes = [areas(data.resolution) if shown else [0] for shown in self._shown]
        self.shards = Shards(data, sources, f"queries-{digest}", sizes)

    def get(self, source: int, ordinal: int, area: int, number: int | None) -> Tensor:
        """States Q D at a sample's `number`-th text; None: at the empty prompt.

        Raises:
            SampleError: one that could not be read when it was to be encoded.
        """
        file, place = self.shards.file(source, ordinal, area if self._shown[source] else 0)
        states: Tensor = file.get_slice("states")[_row(file, place, 0 if number is None else 1 + number)]
        return states


def _row(file: Any, place: int, column: int) -> int:
    """Where a shard holds the sample at `place`, or its text of that column. Raises SampleError for nowhere."""
    rows = file.get_slice("rows")[place : place + 1].flatten()
    row = int(rows[column]) if column < len(rows) else -1
    if row < 0:
        raise SampleError("it could not be read when it was to be encoded")
    return row


def open_encoded(
    data: DataConfig, sources: Sequence[Source]
) -> tuple[EncodedLatents | None, EncodedTexts | None, EncodedQueries | None]:
    """What the recipe reads from its cache. Raises DataError where shards are missing."""
    latents = EncodedLatents(data, sources) if data.cache.latents else None
    texts = EncodedTexts(data, sources) if data.cache.text else None
    queries = EncodedQueries(data, sources) if data.cache.queries else None
    for encoded in (latents, texts, queries):
        if encoded:
            encoded.shards.require()
    return latents, texts, queries


def encoders_digest(data: DataConfig, folder: str, parts: Sequence[str], settings: list[Any]) -> str:
    """A name for the numbers that these parts of a model folder give under these settings.

    Hashes every file of the parts; the sums are kept, by path, size and time, since weights are large.

    Raises:
        DataError: a part without files.
    """
    memo_path = Path(data.cache_dir) / "encoded" / "weights.json"
    try:
        memo = json.loads(memo_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        memo = {}
    known = len(memo)
    sums = []
    for part in parts:
        root = recipes.resolve(folder) / part
        files = sorted(path for path in root.rglob("*") if path.is_file())
        if not files:
            raise DataError(f"{root}: no such part of a model; correct data.cache")
        for path in files:
            status = path.stat()
            stamp = f"{path.absolute()}:{status.st_size}:{status.st_mtime_ns}"
            if stamp not in memo:
                memo[stamp] = file_sha256(path)
            sums.append([part, path.relative_to(root).as_posix(), memo[stamp]])
    if len(memo) > known:
        atomic_write_json(memo_path, memo)
    return hashlib.sha256(json.dumps([settings, sums]).encode()).hexdigest()[:16]


def stack(rows: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Rows of a batch, each a tuple, as a tuple of tensors with the batch in front."""
    return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
