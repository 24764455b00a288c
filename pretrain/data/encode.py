"""Encodes shards of samples: VAE latents by bucket, SD3's text embeddings by distinct text, states at queries."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import recipes
from core.failures import SampleError
from models.components import load_vae
from models.latents import encode_images
from models.metaquery.conditioner import load_conditioner
from models.metaquery.reading import QueryReader
from models.text import SD3TextEncoder
from pretrain.data.batch import fitted_pictures, readable_texts, to_pixels
from pretrain.data.buckets import bucket_size, nearest_buckets
from pretrain.data.config import DataConfig
from pretrain.data.encoded import EncodedLatents, EncodedQueries, EncodedTexts, Shards, stack
from pretrain.data.sources import Source, check_corrupt, open_sources


@dataclass(frozen=True)
class Job:
    """One shard to encode: its kind (latents, text, queries), and where it is among the shards of this kind."""

    kind: str
    source: int
    shard: int
    area: int


@dataclass(frozen=True)
class Broken:
    """A sample that could not be read: the source's number, and what messages say."""

    source: int
    file: str
    key: str
    reason: str


class ShardEncoder:
    """The shards of a recipe; its encoders are loaded when they are first needed."""

    def __init__(self, data: DataConfig) -> None:
        """Indexes the sources. Raises DataError, as opening sources and reading the encoders' files does."""
        self._data = data
        self._sources = open_sources(data)
        kinds: dict[str, Callable[[DataConfig, list[Source]], EncodedLatents | EncodedTexts | EncodedQueries]]
        kinds = {"latents": EncodedLatents, "text": EncodedTexts, "queries": EncodedQueries}
        self._shards: dict[str, Shards] = {
            kind: encoded(data, self._sources).shards
            for kind, encoded in kinds.items()
            if getattr(data.cache, kind)
        }

    def jobs(self) -> list[Job]:
        """Every shard, those that exist too."""
        return [Job(kind, *shard) for kind, shards in self._shards.items() for shard in shards.all()]

    def path(self, job: Job) -> Path:
        """Where a job's shard goes."""
        return self._shards[job.kind].path(job.source, job.shard, job.area)

    def run(self, job: Job) -> list[Broken]:
        """Encode and write a shard, whole or not at all; returns its samples that could not be read."""
        source, ordinals = self._sources[job.source], self._shards[job.kind].ordinals(job.source, job.shard)
        if job.kind == "latents":
            tensors, broken = encode_latents(self._data, source, ordinals, job.area, self._vae)
        elif job.kind == "text":
            tensors, broken = encode_texts(source, ordinals, self._text_encoder)
        else:
            tensors, broken = encode_queries(self._data, source, ordinals, job.area, *self._reader)
        write_shard(self.path(job), tensors)
        return [Broken(job.source, *source.name(ordinal), reason) for ordinal, reason in broken.items()]

    def check_broken(self, source: int, found: int) -> None:
        """Raises DataError where `found` broken samples, beside those known, are too many of a source."""
        check_corrupt(self._data, source, self._sources[source], found)

    @cached_property
    def _vae(self) -> AutoencoderKL:
        return load_vae(recipes.resolve(self._data.cache.vae), device=self._data.cache.device)

    @cached_property
    def _text_encoder(self) -> SD3TextEncoder:
        cache = self._data.cache
        return SD3TextEncoder.from_pretrained(
            recipes.resolve(cache.text_encoders),
            dtype=getattr(torch, cache.text_dtype),
            device=cache.device,
            max_sequence_length=cache.max_sequence_length,
        )

    @cached_property
    def _reader(self) -> tuple[QueryReader, Tensor]:
        cache, dtype = self._data.cache, getattr(torch, self._data.cache.text_dtype)
        reader = QueryReader.from_pretrained(
            recipes.resolve(cache.vlm),
            dtype=dtype,
            device=cache.device,
            position_mode=cache.position_mode,  # type: ignore[arg-type]
        )
        conditioner = load_conditioner(recipes.resolve(cache.conditioner), dtype=dtype)
        return reader, conditioner.meta_queries.detach()


def encode_latents(
    data: DataConfig, source: Source, ordinals: range, area: int, vae: AutoencoderKL
) -> tuple[dict[str, Tensor], dict[int, str]]:
    """The tensors of a latent shard, as `encoded.py` describes them, and why samples are broken by ordinal."""
    broken: dict[int, str] = {}
    part = slice(ordinals.start, ordinals.stop)
    buckets = nearest_buckets(source.widths[part], source.heights[part], bucketed=data.aspect_buckets)
    rows = torch.full((len(ordinals),), -1, dtype=torch.int32)
    tensors = {"rows": rows, "buckets": torch.from_numpy(buckets)}
    for bucket in np.unique(buckets).tolist():
        size = bucket_size(bucket, area, data.multiple)
        done: list[tuple[Tensor, ...]] = []
        places = np.flatnonzero(buckets == bucket).tolist()
        for chunk in _chunks(places, data.cache.batch_size):
            pictures = []
            for place in chunk:
                try:
                    pictures.append(fitted_pictures(source, ordinals[place], size))
                except SampleError as error:
                    broken[ordinals[place]] = str(error)
                    continue
                rows[place] = sum(len(group[0]) for group in done) + len(pictures) - 1
            if pictures:
                done.append(
                    tuple(
                        encode_images(vae, to_pixels(column)).cpu() for column in zip(*pictures, strict=True)
                    )
                )
        for name, parts in zip(("latents", "references"), _from_the_last(done), strict=False):
            tensors[f"{name}.{bucket}"] = torch.cat(parts)
    return tensors, broken


def encode_texts(
    source: Source, ordinals: range, encoder: SD3TextEncoder
) -> tuple[dict[str, Tensor], dict[int, str]]:
    """The tensors of a text shard, as `encoded.py` describes them, and why samples are broken by ordinal."""
    broken: dict[int, str] = {}
    rows: list[list[int]] = []
    numbers = {"": 0}
    for ordinal in ordinals:
        try:
            texts = source.texts(ordinal)
        except SampleError as error:
            broken[ordinal], texts = str(error), ()
        rows.append([numbers.setdefault(text, len(numbers)) for text in texts])
    embeds = encoder.encode(list(numbers))
    prompt_embeds, pooled = stack([(item.prompt_embeds, item.pooled_prompt_embeds) for item in embeds])
    tensors = {
        "rows": _padded(rows),
        "prompt_embeds": prompt_embeds,
        "pooled_prompt_embeds": pooled,
    }
    return tensors, broken


@torch.no_grad()
def encode_queries(
    data: DataConfig, source: Source, ordinals: range, area: int, reader: QueryReader, queries: Tensor
) -> tuple[dict[str, Tensor], dict[int, str]]:
    """The tensors of a query shard, as `encoded.py` describes them, and why samples are broken by ordinal.

    `area` 0: no picture is shown, and a text has the same states wherever it stands.
    """
    broken: dict[int, str] = {}
    rows: list[list[int]] = []
    numbers: dict[tuple[int, str], int] = {}
    part = slice(ordinals.start, ordinals.stop)
    buckets = nearest_buckets(source.widths[part], source.heights[part], bucketed=data.aspect_buckets)
    done = [torch.empty(0, *queries.shape, dtype=queries.dtype)]
    for places in _chunks(range(len(ordinals)), data.cache.batch_size):
        prompts: list[str] = []
        pictures: list[list[Image.Image]] = []
        for place in places:
            ordinal = ordinals[place]
            try:
                texts, picture = readable_texts(source, ordinal, reader.tokenizer), None
                if area:
                    size = bucket_size(int(buckets[place]), area, data.multiple)
                    picture = fitted_pictures(source, ordinal, size)[0]
            except SampleError as error:
                broken[ordinal], texts = str(error), ()
            rows.append([])
            for text in ("", *texts) if texts else ():
                key = (ordinal if area else -1, text)
                if key not in numbers:
                    numbers[key] = len(numbers)
                    prompts.append(text)
                    pictures.append([] if picture is None else [picture])
                rows[-1].append(numbers[key])
        if prompts:
            done.append(reader.hidden_states(queries, prompts, pictures).cpu())
    return {"rows": _padded(rows), "states": torch.cat(done)}, broken


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a shard under another name and rename it, so that a killed process leaves no part of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.*.partial"):
        stale.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    partial.chmod(0o644)
    partial.rename(path)


def _padded(rows: list[list[int]]) -> Tensor:
    """N T int32 of rows of unequal lengths, -1 where a row ends."""
    width = max(1, *map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int32)


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _from_the_last(done: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """By role, (source, target) as (target, source): the picture that is made comes first."""
    return list(zip(*(group[::-1] for group in done), strict=True))
