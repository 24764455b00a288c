"""What the rules need from models: objects in pictures, and the colour of an object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from PIL import Image

from rewards.geneval.detection import Detection

Detections: TypeAlias = dict[str, list[Detection]]
"""GenEval class name -> everything found of that class, unfiltered, in any order."""

NO_COLOR = ""
"""The answer for an object whose crop is empty: no colour at all, so whatever is asked is wrong."""


class Detector(Protocol):
    """Finds objects.

    `scoring`: short name of what made boxes and scores; it begins the name of every component in the log, so
    that results of different backends are never mixed. `label`: the same at length, with versions and sha256.
    """

    scoring: str
    label: str

    def detect(self, images: Sequence[Image.Image]) -> list[Detections]:
        """Objects in RGB images of any sizes; masks are bool arrays [H, W] of the image's own size.

        A batch gives what its images give singly, up to rounding. Safe to call from several threads.
        """
        ...


@dataclass(frozen=True)
class ColorQuestion:
    """Which colour has this object? `image` is the whole RGB picture."""

    image: Image.Image
    class_name: str
    detection: Detection


class ColorClassifier(Protocol):
    """Names colours. `scoring` and `label` as in `Detector`."""

    scoring: str
    label: str

    def classify(self, questions: Sequence[ColorQuestion]) -> list[str]:
        """One colour name for each question, or `NO_COLOR`. Safe to call from several threads."""
        ...
