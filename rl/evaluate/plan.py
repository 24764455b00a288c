"""An evaluation as fixed pieces of work: which pictures, of which seeds and sizes, in which batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.keys import ModelDtype, PositionMode
from core.prompts import load_references
from core.seeds import derive_seed
from rewards.benchmarks.items import Item
from rewards.benchmarks.registry import Benchmark, Part
from rl.recipe.schema import ResourcesConfig

Size = tuple[int, int]


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: Euler steps of the flow's ODE with guidance. `size`: edge in px of a square of the
    area that is generated; an edit takes the aspect ratio nearest to its source's among those of training."""

    size: int
    num_steps: int
    guidance_scale: float
    negative_prompt: str
    max_sequence_length: int
    dtype: ModelDtype
    seed: int


@dataclass(frozen=True)
class Batch:
    """Whole items of one part and one size, generated and scored together.

    Which items share a batch depends on the data alone, never on what is there already or who works: in bfloat16
    the neighbours in a batch move the last bits of a picture.
    """

    index: int
    part: int
    size: Size
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Scorer:
    """A part's reward as far as it decides scores: its name, parameters, and the sha256 of its code, weights and
    templates where it has any in files."""

    name: str
    params: dict[str, Any]
    files: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """One evaluation. `model` None: the pictures in `images` are somebody else's and only scored.

    `vlm`: the Qwen2.5-VL of a MetaQuery model, which sees positions by `position_mode`.
    """

    benchmark: Benchmark
    parts: tuple[Part, ...]
    count: int
    compat: bool
    sampling: Sampling
    batch_size: int
    batches: tuple[Batch, ...]
    model: Path | None
    adapter: Path | None
    images: Path
    output: Path
    resources: ResourcesConfig
    workers: int
    gallery: int
    vlm: Path | None
    position_mode: PositionMode

    @property
    def items(self) -> list[Item]:
        return [item for part in self.parts for item in part.items]

    def seeds(self, item: Item) -> tuple[int, ...]:
        """One seed per picture, from the evaluation's seed, the prompt and the picture's number."""
        return tuple(
            derive_seed(self.sampling.seed, "benchmark", item.key, item.prompt.prompt, k)
            for k in range(self.count)
        )


def reward_set_name(part: int) -> str:
    """The name under which reward workers know the reward of a part."""
    return f"benchmark:{part}"


def make_batches(
    parts: Sequence[Part], sizes: dict[str, Size], count: int, batch_size: int
) -> tuple[Batch, ...]:
    """Items in order, by part and size, as many to a batch as give at most `batch_size` pictures, but one at least.

    sizes: item key -> height and width in px.
    """
    batches: list[Batch] = []
    for number, part in enumerate(parts):
        by_size: dict[Size, list[Item]] = {}
        for item in part.items:
            by_size.setdefault(sizes[item.key], []).append(item)
        each = max(1, batch_size // count)
        for size, items in by_size.items():
            for start in range(0, len(items), each):
                batches.append(Batch(len(batches), number, size, tuple(items[start : start + each])))
    return tuple(batches)


def item_sizes(items: Sequence[Item], size: int, multiple: int) -> tuple[dict[str, Size], list[str]]:
    """Height and width in px of each item's pictures, and what is wrong with its source picture."""
    from models.latents import nearest_size

    sizes, problems = {}, []
    for item in items:
        sizes[item.key] = (size, size)
        if not item.prompt.references:
            continue
        try:
            source = load_references(item.prompt)[0]
            sizes[item.key] = nearest_size(source.height, source.width, size * size, multiple=multiple)
        except ValueError as error:
            problems.append(f"{item.key}: {error}")
    return sizes, problems


def prompts_sha256(items: Sequence[Item]) -> str:
    """Over all that decides which pictures are made: keys, tasks, prompts and the bytes of source pictures."""
    digest = hashlib.sha256()
    for line in _identities(items):
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def scoring_sha256(plan: Plan, scorers: Sequence[Scorer]) -> str:
    """Over all that decides a given picture's score: the rewards, and the prompts with the metadata that they read."""
    metadata = [[item.key, item.prompt.metadata] for item in plan.items]
    text = json.dumps([[asdict(scorer) for scorer in scorers], metadata], sort_keys=True, default=str)
    return hashlib.sha256(f"{text}\n{prompts_sha256(plan.items)}".encode()).hexdigest()


def generation_record(
    plan: Plan, model_sha256: str | None, vlm_sha256: str | None, adapter_sha256: str | None
) -> dict[str, Any]:
    """What must be the same for pictures that are there already to be taken for this evaluation's."""
    record = {
        "benchmark": plan.benchmark.name,
        "prompts_sha256": prompts_sha256(plan.items),
        "images_per_prompt": plan.count,
    }
    if plan.model is None:
        return record | {"images": str(plan.images)}
    own = {"model_sha256": model_sha256, "adapter_sha256": adapter_sha256, "batch_size": plan.batch_size}
    if plan.vlm is not None:
        own |= {"vlm_sha256": vlm_sha256, "position_mode": plan.position_mode}
    return record | own | asdict(plan.sampling)


def _identities(items: Sequence[Item]) -> Iterator[str]:
    for item in items:
        references = [_reference_sha256(source) for source in item.prompt.references]
        yield json.dumps([item.key, item.prompt.task, item.prompt.prompt, references])


def _reference_sha256(source: str) -> str:
    if source.startswith("data:"):
        return hashlib.sha256(source.encode()).hexdigest()
    with open(source, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
