"""`python -m rewards.geneval check`: loads what a recipe would load and tries it on generated pictures."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from rewards.base import FatalRewardError
from rewards.geneval.detection import (
    SCORE_THRESHOLD,
    ColorClassifier,
    ColorQuestion,
    Detection,
    Detections,
    Detector,
)
from rewards.geneval.lab_colors import SRGB
from rewards.geneval.loading import COLOR_RULES, embedded, load_colors, load_detector
from rewards.geneval.names import COLORS
from rewards.geneval.rewards import GenEval
from rewards.geneval.settings import BACKENDS, DEVICES, EMBEDDED, PUBLISHED_SCALE

SCORE_TOLERANCE = 1e-3
BOX_TOLERANCE = 2.0
"""Largest difference between a batch and its images singly: of scores, and of box edges in px."""


@dataclass(frozen=True)
class Finding:
    """One thing that was tried, whether it works, and what was seen."""

    what: str
    works: bool
    seen: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The keys of a recipe's `geneval` reward as options."""
    parser.add_argument("--detector", choices=BACKENDS, required=True)
    parser.add_argument("--checkpoint", help="weights: a file (mask2former) or a folder (transformers)")
    parser.add_argument("--config", help="mmdet config (default: the published Swin-S config)")
    parser.add_argument("--colors", choices=COLOR_RULES, help="default: clip with --clip, else lab")
    parser.add_argument("--clip", metavar="DIR", help="CLIP ViT-L/14 folder")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--scale", type=int, nargs=2, default=PUBLISHED_SCALE, metavar=("LONG", "SHORT"))
    parser.add_argument("--trust-checkpoint", action="store_true")
    parser.add_argument("--image-size", type=int, default=512, help="edge of the generated pictures, px")


def run(arguments: argparse.Namespace) -> int:
    """Print one line for each thing tried; 0 when all work, else 1."""
    findings = self_check(_reward(arguments), arguments.image_size)
    for finding in findings:
        print(f"{'ok  ' if finding.works else 'FAIL'}  {finding.what}: {finding.seen}")
    return 0 if all(finding.works for finding in findings) else 1


def self_check(reward: GenEval, image_size: int) -> list[Finding]:
    """Configuration, loading, channel order, batching and speed, up to the first that rules out the rest."""
    problems = reward.check()
    if problems:
        return [Finding("configuration", False, problem) for problem in problems]
    findings = [Finding("configuration", True, "values, paths and packages are fine")]
    try:
        detector = load_detector(reward.settings)
        findings.append(Finding("detector", True, f"{detector.scoring}: {detector.label}"))
        colors = load_colors(reward.colors, reward.clip, reward.settings.device)
        findings.append(Finding("colours", True, f"{colors.scoring}: {colors.label}"))
    except FatalRewardError as error:
        return [*findings, Finding("loading", False, str(error))]
    if reward.settings.backend in EMBEDDED:
        pictures, name = embedded(reward.settings.backend).self_check_pictures(), "circle"
    else:
        pictures, name = _pictures(image_size), "ball"
        findings.append(_tried("channels of the detector", lambda: _channels(detector)))
    if reward.colors != "detector":
        findings.append(_tried("channels of the colours", lambda: _colors(colors, name)))
    findings.append(_tried("batch against single images", lambda: _batching(detector, pictures)))
    return findings


def _reward(arguments: argparse.Namespace) -> GenEval:
    params = {name: value for name, value in vars(arguments).items() if name not in ("command", "image_size")}
    if arguments.colors is None:
        params["colors"] = (
            "clip" if arguments.clip else "detector" if arguments.detector == "shapes" else "lab"
        )
    return GenEval(**params)


def _tried(what: str, attempt: Callable[[], tuple[bool, str]]) -> Finding:
    try:
        return Finding(what, *attempt())
    except Exception as error:  # whatever a model raises is the finding
        return Finding(what, False, f"{type(error).__name__}: {error}")


def _channels(detector: Any) -> tuple[bool, str]:
    """Red paint must reach the network as high first, low second and third channel; blue the other way."""
    means = {
        name: detector.network_input(Image.new("RGB", (64, 64), name)).float().mean((1, 2)).tolist()
        for name in ("red", "blue")
    }
    right = means["red"][0] > 0 > means["red"][2] and means["blue"][2] > 0 > means["blue"][0]
    seen = ", ".join(f"{name} {[round(v, 2) for v in values]}" for name, values in means.items())
    return right, f"network sees {seen} {'(red first)' if right else '; red and blue are swapped'}"


def _colors(colors: ColorClassifier, name: str) -> tuple[bool, str]:
    """Red and blue paint must be called so; the other colours are only reported."""
    box = (16.0, 16.0, 48.0, 48.0)
    mask = np.zeros((64, 64), bool)
    mask[16:48, 16:48] = True
    questions = [
        ColorQuestion(Image.new("RGB", (64, 64), SRGB[color]), name, Detection(box, 1.0, mask))
        for color in COLORS
    ]
    answers = dict(zip(COLORS, colors.classify(questions), strict=True))
    wrong = [f"{color} is called {answer!r}" for color, answer in answers.items() if answer != color]
    right = answers["red"] == "red" and answers["blue"] == "blue"
    seen = f"{len(COLORS) - len(wrong)} of {len(COLORS)} right{'; ' if wrong else ''}{', '.join(wrong)}"
    return right, seen if right else f"{seen}: channels are swapped, or this model does not know colours"


def _batching(detector: Detector, pictures: Sequence[Image.Image]) -> tuple[bool, str]:
    """A batch of pictures must give what they give singly. Its times are the speed that is reported."""
    began = time.perf_counter()
    singly = [detector.detect([picture])[0] for picture in pictures]
    between = time.perf_counter()
    together = detector.detect(pictures)
    ended = time.perf_counter()
    differences = [_difference(one, other) for one, other in zip(singly, together, strict=True)]
    score, box = (max(values) for values in zip(*differences, strict=True))
    seen = (
        f"scores differ by {score:.1e}, boxes above score {SCORE_THRESHOLD} by {box:.2g} px; "
        f"{(between - began) / len(pictures):.3g} s an image singly, "
        f"{(ended - between) / len(pictures):.3g} s in a batch of {len(pictures)}"
    )
    return score <= SCORE_TOLERANCE and box <= BOX_TOLERANCE, seen


def _difference(one: Detections, other: Detections) -> tuple[float, float]:
    """Largest difference of the ranked scores, and of each sure box from its nearest of the same class."""
    first, second = (sorted(d.score for found in side.values() for d in found) for side in (one, other))
    if len(first) != len(second):
        return float("inf"), float("inf")
    boxes = [0.0]
    for name, found in one.items():
        twins = np.array([d.box for d in other.get(name, [])]).reshape(-1, 4)
        for item in found:
            if item.score > SCORE_THRESHOLD:
                distances = np.abs(twins - np.array(item.box)).max(axis=1)
                boxes.append(float(distances.min(initial=np.inf)))
    return float(np.abs(np.subtract(first, second)).max(initial=0.0)), max(boxes)


def _pictures(size: int) -> list[Image.Image]:
    """Four pictures of coloured discs and boxes, one of them not square."""
    pictures = []
    for k, color in enumerate(("red", "green", "blue", "yellow")):
        picture = Image.new("RGB", (size, size if k else size * 3 // 4), "grey")
        draw = ImageDraw.Draw(picture)
        draw.ellipse((size // 8, size // 8, size // 2, size // 2), fill=SRGB[color])
        draw.rectangle((size * 5 // 8, size // 4, size * 7 // 8, size * 5 // 8), fill=SRGB["white"])
        pictures.append(picture)
    return pictures
