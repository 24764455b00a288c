"""Backend `shapes`: the shapes world's detector and its own colour rule behind the common interfaces."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from rewards.geneval.detection import ColorQuestion, Detections
from worlds.shapes.scenes.render import render, stack
from worlds.shapes.scenes.world import Scene, Shape
from worlds.shapes.scoring.detector import detect


class Detector:
    """Classes are the four shapes and `background`. Raises ValueError for a picture of another size."""

    scoring = "shapes"
    label = "shapes world, moments of connected components"

    def detect(self, images: Sequence[Image.Image]) -> list[Detections]:
        """See `rewards.geneval.detection.Detector.detect`."""
        return [found.detections for found in detect(stack(images))]


class Colors:
    """Colour rule `detector` of the shapes world: nearest of its own colours. Only for its own detections."""

    scoring = "shapes"
    label = "shapes world, nearest RGB colour of the component's core"

    def classify(self, questions: Sequence[ColorQuestion]) -> list[str]:
        """See `ColorClassifier.classify`. Looks at each picture once more, which takes a millisecond."""
        pictures = list({id(question.image): question.image for question in questions}.values())
        found = dict(zip(map(id, pictures), detect(stack(pictures)), strict=True))
        return [
            found[id(question.image)].classify_color(question.class_name, [question.detection])[0]
            for question in questions
        ]


def self_check_pictures() -> list[Image.Image]:
    """What `python -m rewards.geneval check` shows this backend: a disc in each of four colours."""
    names = ("red", "green", "blue", "yellow")
    return [Image.fromarray(render(Scene("grey", (Shape("circle", color, 12.0, 16.0),)))) for color in names]
