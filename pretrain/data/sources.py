"""Samples by number, whatever they lie in: sizes to bucket them by, texts, and upright RGB pictures."""

import importlib
import logging
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from core.failures import DataError, SampleError
from core.pictures import decode_picture
from pretrain.data.config import DataConfig, SourceConfig
from pretrain.data.index import READERS, named, open_index
from pretrain.data.readers import picture_fields

log = logging.getLogger(__name__)

GENERATED = {"shapes": "worlds.shapes.training.source:ShapesSource"}
"""Kinds whose samples are drawn by code and lie in no file: where the class is, which takes a `SourceConfig`."""


class Source(Protocol):
    """N samples of one task. Safe to use from several threads.

    Attributes:
        widths, heights: N int32, upright pixels; of an edit's target.
        digest: names the samples: where it is equal, they are.
        known_corrupt: how many were left out when it was opened.
    """

    widths: np.ndarray
    heights: np.ndarray
    digest: str
    known_corrupt: int

    def __len__(self) -> int: ...

    def name(self, ordinal: int) -> tuple[str, str]:
        """File and key of a sample, for messages."""
        ...

    def texts(self, ordinal: int) -> tuple[str, ...]:
        """Its captions, or its instruction. Raises SampleError."""
        ...

    def pictures(self, ordinal: int) -> tuple[Image.Image, ...]:
        """(image,), or (source, target) of an edit. Raises SampleError."""
        ...


def open_sources(data: DataConfig) -> list[Source]:
    """Every source of a recipe, indexed. Raises DataError, also where one has more broken samples than it may."""
    return [_open(i, config, data) for i, config in enumerate(data.sources)]


def _open(number: int, config: SourceConfig, data: DataConfig) -> Source:
    if config.kind in GENERATED:
        return generated_source(config)
    source = FileSource(config, data)
    corrupt, total = source.index.corrupt, len(source) + source.known_corrupt
    if corrupt:
        log.warning(
            "data.sources[%d]: left out %d of %d as corrupt:\n%s", number, len(corrupt), total, named(corrupt)
        )
    check_corrupt(data, number, source, 0, named(corrupt))
    return source


def check_corrupt(data: DataConfig, number: int, source: Source, found: int, examples: str = "") -> None:
    """Raises DataError where `found` broken samples, beside those known before, are too many of a source."""
    broken, total = source.known_corrupt + found, source.known_corrupt + len(source)
    if broken > data.max_corrupt_share * total:
        raise DataError(
            f"data.sources[{number}]: {broken} of {total} samples are corrupt, above "
            f"data.max_corrupt_share={data.max_corrupt_share}: {examples or 'the log names them'}"
        )


class FileSource:
    """Samples of tar shards or tables, found through their index."""

    def __init__(self, config: SourceConfig, data: DataConfig) -> None:
        self.reader = READERS[config.kind](config)
        self.index = open_index(
            config, Path(data.cache_dir) / "index", workers=data.index_workers, wait_s=data.wait_s
        )
        self.widths, self.heights = self.index.widths, self.index.heights
        self.digest = self.index.digest
        self.known_corrupt = len(self.index.corrupt)
        self._fields = picture_fields(config)

    def __len__(self) -> int:
        return len(self.index)

    def name(self, ordinal: int) -> tuple[str, str]:
        return str(self.index.locate(ordinal)[0]), self.index.key(ordinal)

    def texts(self, ordinal: int) -> tuple[str, ...]:
        return self.reader.texts(*self.index.locate(ordinal))

    def pictures(self, ordinal: int) -> tuple[Image.Image, ...]:
        pictures = []
        for name, file in zip(self._fields, self.reader.pictures(*self.index.locate(ordinal)), strict=True):
            with file:
                try:
                    pictures.append(decode_picture(file.read(), name))
                except ValueError as error:
                    raise SampleError(str(error)) from error
        indexed = (int(self.widths[ordinal]), int(self.heights[ordinal]))
        if pictures[-1].size != indexed:
            raise SampleError(f"its picture is {pictures[-1].size}, and was {indexed} by its header")
        return tuple(pictures)


def generated_source(config: SourceConfig) -> Source:
    """The source behind a kind of `GENERATED`; its module loads when it is used."""
    module, _, name = GENERATED[config.kind].partition(":")
    source: Source = getattr(importlib.import_module(module), name)(config)
    return source
