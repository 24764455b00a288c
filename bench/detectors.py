"""Images a second of every GenEval backend and colour rule, with random weights: no file is needed."""

from __future__ import annotations

import argparse
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.measure import Measurement, device_name, measure
from rewards.geneval.detection import ColorQuestion, Detection
from rewards.geneval.settings import PUBLISHED_SCALE, DetectorSettings

SHAPES_SIZE = 32


@dataclass(frozen=True)
class Row:
    """One line of the table. `images_per_second` counts crops for colour rules."""

    backend: str
    image_size: int
    batch: int
    measured: Measurement

    @property
    def images_per_second(self) -> float:
        return self.batch / self.measured.seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench detectors`."""
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument(
        "--image-size", type=int, default=512, help="px, square; the shapes world has its own"
    )
    parser.add_argument("--scale", type=int, nargs=2, default=PUBLISHED_SCALE, metavar=("LONG", "SHORT"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="the median is reported")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print a Markdown table."""
    print(table(measure_detectors(arguments), arguments), end="")
    return 0


def measure_detectors(arguments: argparse.Namespace) -> list[Row]:
    """Each backend at each batch size; a model is built once and freed before the next."""
    device = torch.device(arguments.device)
    settings = DetectorSettings(
        checkpoint="random", batch_size=max(arguments.batch), scale=tuple(arguments.scale)
    )
    rows = []
    for name in arguments.backend:
        size = SHAPES_SIZE if name == "shapes" else arguments.image_size
        work = BACKENDS[name](settings, device)
        for batch in arguments.batch:
            pictures = _pictures(batch, size)
            measured = measure(
                partial(work, pictures), device=device, warmup=arguments.warmup, repeats=arguments.repeats
            )
            rows.append(Row(name, size, batch, measured))
        del work
    return rows


def table(rows: Sequence[Row], arguments: argparse.Namespace) -> str:
    """The rows as Markdown under one line of settings."""
    lines = [
        f"{device_name(torch.device(arguments.device))}, torch {torch.__version__}, random weights, networks "
        f"resize to {arguments.scale[0]}x{arguments.scale[1]}, median of {arguments.repeats}",
        "",
        "| backend | image px | batch | s/batch | images/s | peak memory GiB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.backend} | {row.image_size} | {row.batch} | {row.measured.seconds:.4g} | "
        f"{row.images_per_second:.3g} | {row.measured.peak_gib:.2f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _pictures(count: int, size: int) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def _mask2former(settings: DetectorSettings, device: torch.device) -> Callable[..., object]:
    from rewards.geneval.mask2former import Mask2Former, build_model

    model, config, _ = build_model(settings)
    return Mask2Former(model.to(device), config, settings, "random weights").detect


def _transformers(settings: DetectorSettings, device: torch.device) -> Callable[..., object]:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    from rewards.geneval.hub import HubMask2Former

    config = Mask2FormerConfig()
    config.num_labels = 80
    model = Mask2FormerForUniversalSegmentation(config).eval()
    detector = HubMask2Former(
        model.to(device), settings, "random weights", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    return detector.detect


def _shapes(settings: DetectorSettings, device: torch.device) -> Callable[..., object]:
    from worlds.shapes.scoring.backend import Detector

    return Detector().detect


def _clip(settings: DetectorSettings, device: torch.device) -> Callable[..., object]:
    """ViT-L/14 at 224 px, one crop an image; the text embeddings are cached by the warm-up."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    from rewards.geneval.clip_colors import ClipColors

    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "projection_dim": 768,
    }
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=768)).eval()
    letters = list(string.ascii_lowercase) + [f"{letter}</w>" for letter in string.ascii_lowercase]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={w: k for k, w in enumerate(words)}, merges=[], model_max_length=77)
    colors = ClipColors(model.to(device), tokenizer, CLIPImageProcessorPil(), "random weights")
    return lambda pictures: colors.classify(_questions(pictures))


def _lab(settings: DetectorSettings, device: torch.device) -> Callable[..., object]:
    from rewards.geneval.lab_colors import LabColors

    return lambda pictures: LabColors().classify(_questions(pictures))


def _questions(pictures: Sequence[Image.Image]) -> list[ColorQuestion]:
    """One object in the middle of each picture, half as wide and high."""
    questions = []
    for picture in pictures:
        low, high = picture.width // 4, 3 * picture.width // 4
        mask = np.zeros((picture.height, picture.width), bool)
        mask[low:high, low:high] = True
        box = (float(low), float(low), float(high), float(high))
        questions.append(ColorQuestion(picture, "ball", Detection(box, 1.0, mask)))
    return questions


BACKENDS: dict[str, Callable[[DetectorSettings, torch.device], Callable[..., Any]]] = {
    "mask2former": _mask2former,
    "transformers": _transformers,
    "shapes": _shapes,
    "clip": _clip,
    "lab": _lab,
}
