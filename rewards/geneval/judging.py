"""From pictures to verdicts: one detector call and at most one colour call for the whole batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from rewards.geneval.backend import NO_COLOR, ColorClassifier, ColorQuestion, Detector
from rewards.geneval.clauses import ClassifyColor
from rewards.geneval.detection import Detection
from rewards.geneval.rules import GenEvalResult, evaluate


def judge_images(
    images: Sequence[Image.Image],
    metadata: Sequence[Mapping[str, Any]],
    detector: Detector,
    colors: ColorClassifier,
) -> list[GenEvalResult]:
    """Judge each image by its GenEval record.

    The rules run twice. Which objects they ask about depends on the detections alone, so the first run only
    gathers the questions; all are answered in one call, and the second run reads the answers in turn. Raises
    ValueError for malformed metadata, as `evaluate` does, before any colour is looked at.
    """
    pictures = [image.convert("RGB") for image in images]
    found = detector.detect(pictures)
    questions: list[ColorQuestion] = []
    for picture, record, detections in zip(pictures, metadata, found, strict=True):
        evaluate(record, detections, classify_color=_gather(picture, questions))
    answers = iter(colors.classify(questions) if questions else [])

    def answer(class_name: str, asked: Sequence[Detection]) -> list[str]:
        return [next(answers) for _ in asked]

    return [
        evaluate(record, detections, classify_color=answer)
        for record, detections in zip(metadata, found, strict=True)
    ]


def _gather(picture: Image.Image, questions: list[ColorQuestion]) -> ClassifyColor:
    def ask(class_name: str, asked: Sequence[Detection]) -> list[str]:
        questions.extend(ColorQuestion(picture, class_name, detection) for detection in asked)
        return [NO_COLOR] * len(asked)

    return ask
