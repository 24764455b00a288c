"""The `data:` section of a pre-training recipe: schema, defaults and the rules that join keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import MinLen
from omegaconf import MISSING

from core.keys import AtLeast0, Count, NonNegative, PositionMode, Positive, Seed, Share, Task
from core.recipe import value_problems

TASKS = ("t2i", "edit")


@dataclass
class SourceConfig:
    """One collection of samples of one task.

    Fields are columns of a table (`parquet`, `hf`). In `webdataset` shards a picture field is the member
    `KEY.<field>.<jpg|png|webp>`, `image` also plain `KEY.jpg`; a text field is a key of `KEY.json`, `caption`
    also the whole of `KEY.txt`.
    """

    kind: Literal["webdataset", "parquet", "hf", "shapes"] = MISSING
    """webdataset: tar shards; parquet: files; hf: `save_to_disk` folders of one split; shapes: drawn."""
    task: Task = MISSING
    """What its samples teach."""
    paths: list[str] = field(default_factory=list)
    """Files or folders; globs are expanded. None for `shapes`."""
    weight: NonNegative = 1.0
    """Share of the task's samples that come from here, against the other sources of the task."""
    image: str = "image"
    """t2i: the picture."""
    captions: Annotated[list[str], MinLen(1)] = field(default_factory=lambda: ["caption"])
    """t2i: text fields; each use of a sample draws one of those that it has."""
    source: str = "source"
    """edit: the picture before the edit."""
    target: str = "target"
    """edit: the picture after it."""
    instruction: str = "instruction"
    """edit: the text field."""
    samples: Count = 50000
    """shapes: how many samples of the training split are drawn."""
    seed: Seed = 0
    """shapes: what they are drawn from."""


@dataclass
class Resolution:
    """Size of the batches before a step: exactly one of `area` and `side`."""

    until_step: AtLeast0 = 0
    """First step that this no longer holds for; 0 = to the end, in the last entry only."""
    area: AtLeast0 = 0
    """Pixels of a picture, about; the bucket's sides are multiples."""
    side: AtLeast0 = 0
    """Side of the square of that area, in pixels."""


@dataclass
class CacheConfig:
    """What `python -m pretrain.data.cache RECIPE` encodes ahead, and what batches then bring along."""

    latents: bool = False
    """VAE latents in place of pixels."""
    text: bool = False
    """SD3's text embeddings; 2.7 MB a distinct text at full size."""
    queries: bool = False
    """The VLM's states at queries that are not trained; at full size 1.8 MB a distinct text, 3.7 MB an edit."""
    vae: str = ""
    """Folder that holds `vae/`."""
    text_encoders: str = ""
    """Folder that holds `text_encoder{,_2,_3}/` and `tokenizer{,_2,_3}/`."""
    max_sequence_length: Count = 256
    """T5 tokens of a prompt."""
    vlm: str = ""
    """Folder of the Qwen2.5-VL."""
    conditioner: str = ""
    """Folder that holds `conditioner/`, of which the queries are read."""
    position_mode: PositionMode = "flat"
    """Positions in the VLM."""
    show_references: bool = True
    """Show the VLM the picture of an edit."""
    text_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type the text encoders and the VLM run in; what they give is kept in it, latents always in float32."""
    device: str = "cpu"
    """Where they run, as torch names it."""
    batch_size: Count = 16
    """Pictures per call of the VAE, samples per call of the VLM."""
    samples_per_shard: Count = 1024
    """Samples of a file, the unit that a killed run repeats."""


@dataclass
class DataConfig:
    """What batches are made of, and how."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Collections of samples; those of a task are mixed by weight."""
    edit_share: Share = 0.5
    """Share of batches that are editing; batches alternate, they never mix tasks."""
    aspect_buckets: bool = True
    """Batches of 1:1, 4:3, 3:2, 16:9 and their transposes; false: every picture is cut to a square."""
    multiple: Count = 32
    """Both sides of a batch are multiples of this: 16 for SD3.5 alone, 32 with the VLM, 8 for the shapes world."""
    resolution: list[Resolution] = field(default_factory=lambda: [Resolution(side=512)])
    """Progressive resolution, in the order of steps."""
    max_crop_loss: Share = 0.5
    """Samples that would lose a larger share of their area to their bucket are left out and counted."""
    prompt_dropout: Share = 0.1
    """Share of prompts that the batch replaces by the empty one (and its embedding), by (seed, step, place):
    the trainer drops none itself."""
    reference_images: bool = False
    """Edit batches bring the source as PIL pictures of the batch's size, for the VLM."""
    max_corrupt_share: Share = 0.01
    """Of a source's samples: above it, broken ones are an error; below it, they are named, counted and skipped."""
    cache_dir: str = ""
    """Shared folder of the sources' indexes and of what is encoded ahead; not needed for `shapes` alone."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """What is encoded ahead."""
    index_workers: Count = 4
    """Processes that index, when an index is missing or its files have changed."""
    workers: Count = 2
    """Threads that prepare batches."""
    prefetch: Count = 4
    """Batches that may wait, prepared."""
    wait_s: Positive = 600.0
    """Longest wait for a batch, and for an index that another process is making, in seconds."""


@dataclass
class DataRecipe:
    """The only section of a recipe that `pretrain.data.cache` reads."""

    data: DataConfig = field(default_factory=DataConfig)
    """What batches are made of."""


def data_problems(data: DataConfig) -> list[str]:
    """Every value that cannot be, and every rule between keys that is broken; looks at no file."""
    return value_problems(data, "data.") + broken_data_rules(data)


def broken_data_rules(data: DataConfig) -> list[str]:
    """What keys break together. Bears values that are out of range."""
    return [f"data.{problem}" for problem in _problems(data)]


def _problems(data: DataConfig) -> Iterator[str]:
    if not data.sources:
        yield "sources is empty: name at least one source"
    for i, source in enumerate(data.sources):
        if source.kind == "shapes" and source.paths:
            yield f"sources[{i}].paths={list(source.paths)} has no meaning for kind shapes: remove it"
        if source.kind != "shapes" and not source.paths:
            yield f"sources[{i}].paths is empty: name files or globs"
    tasks = {source.task for source in data.sources if source.weight > 0}
    if data.sources and data.edit_share > 0 and "edit" not in tasks:
        yield f"edit_share={data.edit_share} needs a source of task edit: add one, or set it to 0"
    if data.sources and data.edit_share < 1 and "t2i" not in tasks:
        yield f"edit_share={data.edit_share} needs a source of task t2i: add one, or set it to 1"
    yield from _resolution_problems(data.resolution)
    if any(source.kind != "shapes" for source in data.sources) and not data.cache_dir:
        yield "cache_dir is empty: name a folder for the sources' indexes"
    yield from _cache_problems(data)


def _resolution_problems(schedule: list[Resolution]) -> Iterator[str]:
    if not schedule:
        yield "resolution is empty: name at least one"
    before = 0
    for i, entry in enumerate(schedule):
        last = i == len(schedule) - 1
        if (entry.area > 0) == (entry.side > 0):
            yield f"resolution[{i}]: give a positive value to exactly one of area ({entry.area}), side ({entry.side})"
        if last and entry.until_step:
            yield f"resolution[{i}].until_step={entry.until_step}: the last one holds to the end, leave it at 0"
        if not last and entry.until_step <= before:
            yield f"resolution[{i}].until_step={entry.until_step} must be above {before}, the steps before it"
        before = max(before, entry.until_step)


def _cache_problems(data: DataConfig) -> Iterator[str]:
    cache = data.cache
    if (cache.latents or cache.text or cache.queries) and not data.cache_dir:
        yield "cache_dir is empty: name the folder of what cache.latents, .text and .queries encode ahead"
    if cache.latents and not cache.vae:
        yield "cache.vae is empty: cache.latents needs the folder that holds vae/"
    if cache.text and not cache.text_encoders:
        yield "cache.text_encoders is empty: cache.text needs the folder that holds text_encoder/"
    if cache.queries and not (cache.vlm and cache.conditioner):
        yield "cache.vlm or cache.conditioner is empty: cache.queries needs a VLM's folder and one with conditioner/"
