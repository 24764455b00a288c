"""What every kind of collection offers: its samples by place, texts and encoded pictures apart."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from core.failures import SampleError
from core.text import broken_texts
from pretrain.data.config import SourceConfig

Place = tuple[int, ...]
"""Whole numbers that say where a sample lies in its file; as many for every sample of a source."""


class Reader(ABC):
    """Samples of one kind of file. Safe to use from several threads; opens nothing until asked."""

    def __init__(self, config: SourceConfig) -> None:
        self._pictures = picture_fields(config)
        self._texts = text_fields(config)

    @abstractmethod
    def places(self, path: Path) -> Iterator[tuple[str, Place | SampleError]]:
        """Key and place of every sample of a file, in order, or why it has none.

        Raises:
            DataError: a file that cannot be read at all.
        """

    @abstractmethod
    def texts(self, path: Path, place: Place) -> tuple[str, ...]:
        """The captions that a sample has, or its instruction. Raises SampleError where there is none."""

    @abstractmethod
    def pictures(self, path: Path, place: Place) -> tuple[IO[bytes], ...]:
        """Encoded pictures, open for reading: (image,), or (source, target). Raises SampleError."""


def text_fields(config: SourceConfig) -> list[str]:
    """Names of the text fields of a source, in order."""
    return list(config.captions) if config.task == "t2i" else [config.instruction]


def picture_fields(config: SourceConfig) -> list[str]:
    """Names of the picture fields of a source, in the order of `Reader.pictures`."""
    return [config.image] if config.task == "t2i" else [config.source, config.target]


def clean_texts(values: dict[str, Any]) -> tuple[str, ...]:
    """The texts of the fields, white space collapsed, empty ones left out; a list counts as several texts.

    Raises:
        SampleError: a field of another type, or half of a surrogate pair in it; no text in any.
    """
    texts = []
    for name, value in values.items():
        for text in value if isinstance(value, list | tuple) else [value]:
            if text is not None and not isinstance(text, str):
                raise SampleError(f"{name} is a {type(text).__name__}, not text")
            for _, problem in broken_texts(text):
                raise SampleError(f"{name} {problem}")
            if text and text.split():
                texts.append(" ".join(text.split()))
    if not texts:
        raise SampleError(f"no text in {', '.join(values)}")
    return tuple(texts)
