"""The `data:` section of a pre-training recipe: schema, defaults and the rules that join keys."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from omegaconf import MISSING

KINDS = ("webdataset", "parquet", "hf", "shapes")
TASKS = ("t2i", "edit")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class SourceConfig:
    """One collection of samples of one task.

    Fields are columns of a table (`parquet`, `hf`). In `webdataset` shards a picture field is the member
    `KEY.<field>.<jpg|png|webp>`, `image` also plain `KEY.jpg`; a text field is a key of `KEY.json`, `caption`
    also the whole of `KEY.txt`.
    """

    kind: str = MISSING
    """webdataset: tar shards; parquet: files; hf: `save_to_disk` folders of one split; shapes: drawn."""
    task: str = MISSING
    """t2i or edit."""
    paths: list[str] = field(default_factory=list)
    """Files or folders; globs are expanded. None for `shapes`."""
    weight: float = 1.0
    """Share of the task's samples that come from here, against the other sources of the task."""
    image: str = "image"
    """t2i: the picture."""
    captions: list[str] = field(default_factory=lambda: ["caption"])
    """t2i: text fields; each use of a sample draws one of those that it has."""
    source: str = "source"
    """edit: the picture before the edit."""
    target: str = "target"
    """edit: the picture after it."""
    instruction: str = "instruction"
    """edit: the text field."""
    samples: int = 50000
    """shapes: how many samples of the training split are drawn."""
    seed: int = 0
    """shapes: what they are drawn from."""


@dataclass
class Resolution:
    """Size of the batches before a step: exactly one of `area` and `side`."""

    until_step: int = 0
    """First step that this no longer holds for; 0 = to the end, in the last entry only."""
    area: int = 0
    """Pixels of a picture, about; the bucket's sides are multiples."""
    side: int = 0
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
    max_sequence_length: int = 256
    """T5 tokens of a prompt."""
    vlm: str = ""
    """Folder of the Qwen2.5-VL."""
    conditioner: str = ""
    """Folder that holds `conditioner/`, of which the queries are read."""
    position_mode: str = "flat"
    """Positions in the VLM: flat or mrope."""
    show_references: bool = True
    """Show the VLM the picture of an edit."""
    text_dtype: str = "bfloat16"
    """Type the text encoders and the VLM run in; what they give is kept in it, latents always in float32."""
    device: str = "cpu"
    batch_size: int = 16
    """Pictures per call of the VAE, samples per call of the VLM."""
    samples_per_shard: int = 1024


@dataclass
class DataConfig:
    sources: list[SourceConfig] = field(default_factory=list)
    edit_share: float = 0.5
    """Share of batches that are editing; batches alternate, they never mix tasks."""
    aspect_buckets: bool = True
    """Batches of 1:1, 4:3, 3:2, 16:9 and their transposes; false: every picture is cut to a square."""
    multiple: int = 32
    """Both sides of a batch are multiples of this: 16 for SD3.5 alone, 32 with the VLM, 8 for the shapes world."""
    resolution: list[Resolution] = field(default_factory=lambda: [Resolution(side=512)])
    """Progressive resolution, in the order of steps."""
    max_crop_loss: float = 0.5
    """Samples that would lose a larger share of their area to their bucket are left out and counted."""
    prompt_dropout: float = 0.1
    """Share of prompts that the batch replaces by the empty one (and its embedding), by (seed, step, place):
    the trainer drops none itself."""
    reference_images: bool = False
    """Edit batches bring the source as PIL pictures of the batch's size, for the VLM."""
    max_corrupt_share: float = 0.01
    """Of a source's samples: above it, broken ones are an error; below it, they are named, counted and skipped."""
    cache_dir: str = ""
    """Shared folder of the sources' indexes and of what is encoded ahead; not needed for `shapes` alone."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    index_workers: int = 4
    """Processes that index, when an index is missing or its files have changed."""
    workers: int = 2
    """Threads that prepare batches."""
    prefetch: int = 4
    """Batches that may wait, prepared."""
    wait_s: float = 600.0
    """Longest wait for a batch, and for an index that another process is making, in seconds."""


def data_problems(data: DataConfig, prefix: str = "data") -> list[str]:
    """Every value that cannot be, and every rule between keys that is broken; looks at no file."""
    return [f"{prefix}.{problem}" for problem in _problems(data)]


def _problems(data: DataConfig) -> Iterator[str]:
    if not data.sources:
        yield "sources is empty: name at least one source"
    for i, source in enumerate(data.sources):
        yield from (f"sources[{i}].{problem}" for problem in _source_problems(source))
    tasks = {source.task for source in data.sources if source.weight > 0}
    if data.sources and data.edit_share > 0 and "edit" not in tasks:
        yield f"edit_share={data.edit_share} needs a source of task edit: add one, or set it to 0"
    if data.sources and data.edit_share < 1 and "t2i" not in tasks:
        yield f"edit_share={data.edit_share} needs a source of task t2i: add one, or set it to 1"
    yield from _resolution_problems(data.resolution)
    for name, low, high in (
        ("edit_share", 0, 1),
        ("max_crop_loss", 0, 1),
        ("prompt_dropout", 0, 1),
        ("max_corrupt_share", 0, 1),
    ):
        if not low <= getattr(data, name) <= high:
            yield f"{name}={getattr(data, name)} must be in [{low}, {high}]"
    for name in ("multiple", "index_workers", "workers", "prefetch", "wait_s"):
        if getattr(data, name) <= 0:
            yield f"{name}={getattr(data, name)} must be positive"
    if any(source.kind != "shapes" for source in data.sources) and not data.cache_dir:
        yield "cache_dir is empty: name a folder for the sources' indexes"
    yield from _cache_problems(data)


def _source_problems(source: SourceConfig) -> Iterator[str]:
    if source.kind not in KINDS:
        yield f"kind={source.kind!r} is not one of {', '.join(KINDS)}"
    if source.task not in TASKS:
        yield f"task={source.task!r} is not one of {', '.join(TASKS)}"
    if source.kind == "shapes" and source.paths:
        yield f"paths={list(source.paths)} has no meaning for kind shapes: remove it"
    if source.kind != "shapes" and not source.paths:
        yield "paths is empty: name files or globs"
    if source.weight < 0:
        yield f"weight={source.weight} must not be negative"
    if source.samples < 1:
        yield f"samples={source.samples} must be at least 1"
    if not source.captions:
        yield "captions is empty: name at least one text field"


def _resolution_problems(schedule: list[Resolution]) -> Iterator[str]:
    if not schedule:
        yield "resolution is empty: name at least one"
    before = 0
    for i, entry in enumerate(schedule):
        last = i == len(schedule) - 1
        if (entry.area > 0) == (entry.side > 0) or min(entry.area, entry.side) < 0:
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
    if cache.position_mode not in ("flat", "mrope"):
        yield f"cache.position_mode={cache.position_mode!r} is neither flat nor mrope"
    if cache.text_dtype not in DTYPES:
        yield f"cache.text_dtype={cache.text_dtype!r} is not one of {', '.join(DTYPES)}"
    for name in ("max_sequence_length", "batch_size", "samples_per_shard"):
        if getattr(cache, name) < 1:
            yield f"cache.{name}={getattr(cache, name)} must be at least 1"
