"""The batches of a pre-training run: a pure function of (seed, step, rank), prefetched by threads."""

import logging
import threading
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from core.failures import DataError, SampleError
from models.latents import ASPECT_RATIOS
from pretrain.data.batch import PretrainBatch, fitted_pictures, readable_texts, to_pixels
from pretrain.data.buckets import area_at
from pretrain.data.config import DataConfig, data_problems
from pretrain.data.encoded import open_encoded, stack
from pretrain.data.order import BatchOrder, Draw, Plan, mixed
from pretrain.data.prefetch import Prefetch
from pretrain.data.sources import Source, check_corrupt, open_sources

log = logging.getLogger(__name__)

_CAPTION, _DROPOUT = 11, 12
_ATTEMPTS = 32


@dataclass(frozen=True)
class _Item:
    """One sample of a batch; `pictures` and `latents` are (image,), or (source, target) of an edit."""

    prompt: str
    pictures: tuple[Image.Image, ...] | None
    latents: tuple[Tensor, ...] | None
    embeds: tuple[Tensor, Tensor] | None
    states: Tensor | None


class BatchStream:
    """A rank's batches. Opening it indexes what is not indexed yet. `batch` is safe to call from several threads."""

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        tokenizer: Any = None,
    ) -> None:
        """`batch_size` is the global one, shared equally among ranks; `tokenizer` that of a VLM that will be shown the
        texts, so that a sample with one that it refuses is left out as broken.

        Raises:
            DataError: a configuration or data that cannot be used; sizes that do not divide.
        """
        problems = data_problems(config)
        if batch_size < 1 or batch_size % world_size or not 0 <= rank < world_size:
            problems.append(
                f"batch_size={batch_size} must be a multiple of the {world_size} ranks (rank {rank})"
            )
        if problems:
            raise DataError("; ".join(problems))
        self.config, self.seed, self._tokenizer = config, seed, tokenizer
        share = batch_size // world_size
        self._places = range(rank * share, (rank + 1) * share)
        self._sources = open_sources(config)
        self._order = BatchOrder(config, self._sources, seed=seed, batch_size=batch_size)
        self._latents, self._texts, self._queries = open_encoded(config, self._sources)
        self._broken = BrokenSamples(config, self._sources)

    @property
    def skipped(self) -> int:
        """Samples left out as broken: found while indexing, and by this rank since."""
        return sum(source.known_corrupt for source in self._sources) + len(self._broken)

    def lines(self) -> list[str]:
        """What the batches are made of, for the log."""
        lines = []
        for i, source in enumerate(self._sources):
            config = self.config.sources[i]
            counts = ", ".join(
                f"{ASPECT_RATIOS[bucket][0]}:{ASPECT_RATIOS[bucket][1]} {count}"
                for bucket, count in self._order.counts(i).items()
            )
            lines.append(
                f"sources[{i}] {config.kind} {config.task}: {len(source)} samples ({counts}), "
                f"{source.known_corrupt} corrupt, {self._order.left_out[i]} of other shapes"
            )
        return lines

    def batch(self, step: int, *, prompt_dropout: float | None = None) -> PretrainBatch:
        """The places of this rank in the global batch of a 0-based step.

        `prompt_dropout` takes the place of the configured one: at 1 every prompt is the empty one.

        Raises:
            DataError: more broken samples than `max_corrupt_share` allows.
        """
        plan = self._order.plan(step)
        dropout = self.config.prompt_dropout if prompt_dropout is None else prompt_dropout
        items = [self._item(plan, step, place, dropout) for place in self._places]
        latents = stack([item.latents for item in items if item.latents])
        embeds = stack([item.embeds for item in items if item.embeds])
        pictures = [item.pictures for item in items if item.pictures]
        edit = plan.task == "edit"
        live = self._latents is None
        return PretrainBatch(
            task=plan.task,
            height=plan.height,
            width=plan.width,
            indices=torch.tensor(self._places),
            prompts=[item.prompt for item in items],
            pixels=to_pixels([picture[-1] for picture in pictures]) if live else None,
            references=to_pixels([picture[0] for picture in pictures]) if live and edit else None,
            latents=latents[-1] if latents else None,
            reference_latents=latents[0] if latents and edit else None,
            prompt_embeds=embeds[0] if embeds else None,
            pooled_prompt_embeds=embeds[1] if embeds else None,
            query_states=torch.stack([item.states for item in items if item.states is not None])
            if self._queries
            else None,
            reference_images=[p[0] for p in pictures] if edit and self.config.reference_images else None,
        )

    def batches(self, first_step: int = 0) -> Prefetch:
        """Batches from a step on, without end, prepared ahead as `data.workers` and `data.prefetch` say."""
        config = self.config
        return Prefetch(
            self.batch, first_step, workers=config.workers, depth=config.prefetch, wait_s=config.wait_s
        )

    def _item(self, plan: Plan, step: int, place: int, dropout: float) -> _Item:
        draw = self._order.draw(plan, place)
        for attempt in range(_ATTEMPTS):
            try:
                return self._load(plan, draw, step, place, dropout)
            except SampleError as error:
                self._broken.add(draw, str(error))
                draw = self._order.replacement(draw, plan, step, place, attempt)
        raise DataError(f"data.sources[{draw.source}]: {_ATTEMPTS} samples one after the other are broken")

    def _load(self, plan: Plan, draw: Draw, step: int, place: int, dropout: float) -> _Item:
        texts = self._read_texts(draw)
        number: int | None = mixed(self.seed, _CAPTION, step, place) % len(texts)
        if (mixed(self.seed, _DROPOUT, step, place) >> 11) / 2**53 < dropout:
            number = None
        sample, area = (draw.source, draw.ordinal), area_at(self.config.resolution, step)
        return _Item(
            prompt="" if number is None else texts[number],
            pictures=self._pictures(plan, draw),
            latents=self._latents.get(*sample, area) if self._latents else None,
            embeds=self._texts.get(*sample, number) if self._texts else None,
            states=self._queries.get(*sample, area, number) if self._queries else None,
        )

    def _read_texts(self, draw: Draw) -> tuple[str, ...]:
        source = self._sources[draw.source]
        if self._tokenizer is None:
            return source.texts(draw.ordinal)
        return readable_texts(source, draw.ordinal, self._tokenizer)

    def _pictures(self, plan: Plan, draw: Draw) -> tuple[Image.Image, ...] | None:
        if self._latents and not (plan.task == "edit" and self.config.reference_images):
            return None
        return fitted_pictures(self._sources[draw.source], draw.ordinal, (plan.height, plan.width))


class BrokenSamples:
    """Samples found broken while they were read: each named once, and an error when they are too many."""

    def __init__(self, config: DataConfig, sources: list[Source]) -> None:
        self._config, self._sources = config, sources
        self._found: set[Draw] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._found)

    def add(self, draw: Draw, reason: str) -> None:
        """Count a sample. Raises DataError above the source's share of `max_corrupt_share`."""
        source = self._sources[draw.source]
        file, key = source.name(draw.ordinal)
        with self._lock:
            if draw not in self._found:
                self._found.add(draw)
                log.warning("data.sources[%d]: skipped %s: %s: %s", draw.source, file, key, reason)
            found = sum(other.source == draw.source for other in self._found)
        check_corrupt(self._config, draw.source, source, found, f"the last: {file}: {key}: {reason}")
