"""What it costs to have a reward behind HTTP: a served call against the same call in process, in one run.

    overhead = (seconds of a served batch - seconds of the batch in process) / batch - codec

The reward does next to nothing, so that what is left is copies, JSON, HTTP on loopback and the event loops. The
codec (pixels to bytes in the client, bytes to pixels in the service) is measured apart, since it depends on the
pictures and can be chosen.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rewards.base import RewardSpec, ServiceSpec
from rewards.calling import RewardBatch, call_reward
from rewards.loading import LoadedReward, load_reward
from rewards.service.wire import CODECS, encode_png

ROOT = Path(__file__).parents[1]
NAME = "bench.service:first_level"


@dataclass(frozen=True)
class Row:
    """One way to call: medians in milliseconds an image, and megabytes an image on the wire."""

    way: str
    total_ms: float
    added_ms: float
    codec_ms: float
    megabytes: float

    @property
    def overhead_ms(self) -> float:
        return self.added_ms - self.codec_ms


def first_level(
    *,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    references: Sequence[Any],
    metadata: Sequence[Any],
) -> list[float]:
    """A reward that costs nothing: the red level of the first pixel, from 0 to 1."""
    return [image.getpixel((0, 0))[0] / 255 for image in images]  # type: ignore[index]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench service`."""
    parser.add_argument("--batch", type=int, default=16, help="samples of a group, one request")
    parser.add_argument("--resolution", type=int, default=512, help="pixels, square")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=30, help="the median is reported")


def run(arguments: argparse.Namespace) -> int:
    """Start a service, measure, and print a Markdown table."""
    with tempfile.TemporaryDirectory() as folder:
        process, url = _start(Path(folder))
        try:
            rows = asyncio.run(_measure(arguments, url))
        finally:
            process.terminate()
            process.wait(timeout=60)
    print(table(rows, arguments), end="")
    return 0


def table(rows: Sequence[Row], arguments: argparse.Namespace) -> str:
    """The rows as Markdown under one line of settings; everything is per image."""
    lines = [
        f"{arguments.resolution} px, batch {arguments.batch}, loopback, service in a process of its own, median of "
        f"{arguments.repeats}; all figures per image",
        "",
        "| way | ms | over in-process ms | of it codec ms | overhead without codec ms | MB sent |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.way} | {row.total_ms:.2f} | {row.added_ms:.2f} | {row.codec_ms:.2f} | {row.overhead_ms:.2f} | "
        f"{row.megabytes:.2f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def pictures(count: int, size: int) -> list[Image.Image]:
    """Waves of colour under a little noise, which compress about as badly as photographs do."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:size, 0:size]
    result = []
    for _ in range(count):
        waves = [np.sin(x / rng.uniform(9, 80) + y / rng.uniform(9, 80)) for _ in range(3)]
        pixels = 128 + 80 * np.stack(waves, -1) + rng.normal(0, 4, (size, size, 3))
        result.append(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)))
    return result


def _start(folder: Path) -> tuple[subprocess.Popen[str], str]:
    prompts = folder / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "a red circle"}))
    stage = {"name": "t2i", "task": "t2i", "prompts": str(prompts), "steps": 1, "rewards": [{"name": NAME}]}
    recipe = folder / "recipe.yaml"  # JSON is YAML
    recipe.write_text(json.dumps({"name": "bench", "model": {"path": "none"}, "stages": [stage]}))
    words = [sys.executable, "-m", "rewards.serve", str(recipe), "--port", "0"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith("listening on "):
        raise RuntimeError(f"the service did not start; try {' '.join(words)}")
    return process, line.split()[2].rstrip(":")


async def _measure(arguments: argparse.Namespace, url: str) -> list[Row]:
    """All ways in turn within each repeat, so that what else the machine does hits them alike."""
    images = pictures(arguments.batch, arguments.resolution)
    count = len(images)
    batch = RewardBatch(images, ["a red circle"] * count, [None] * count, [{}] * count)
    ways: dict[str, LoadedReward] = {"in process": load_reward(RewardSpec(NAME))}
    for codec in CODECS:
        ways[codec] = load_reward(RewardSpec(NAME, service=ServiceSpec((url,), codec=codec)))
        problems = await ways[codec].owner.readiness()  # type: ignore[union-attr]
        if problems:
            raise RuntimeError("; ".join(problems))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(arguments.warmup + arguments.repeats):
        for way, loaded in ways.items():
            began = time.perf_counter()
            await call_reward(loaded, batch)
            if repeat >= arguments.warmup:
                seconds[way].append(time.perf_counter() - began)
    total = {way: 1000 * statistics.median(values) / count for way, values in seconds.items()}
    rows = [Row("in process", total["in process"], 0.0, 0.0, 0.0)]
    for codec in CODECS:
        codec_ms, megabytes = _codec(codec, images, arguments)
        rows.append(
            Row(f"served, {codec}", total[codec], total[codec] - total["in process"], codec_ms, megabytes)
        )
    return rows


def _codec(codec: str, images: Sequence[Image.Image], arguments: argparse.Namespace) -> tuple[float, float]:
    """Milliseconds to encode and decode an image, median over repeats of the whole batch, and megabytes of one."""
    coder: tuple[Callable[[Image.Image], bytes], Callable[[bytes, tuple[int, int]], object]]
    coder = (encode_png, _decode_png) if codec == "png" else (Image.Image.tobytes, _decode_raw)
    encode, decode = coder
    seconds, sizes = [], [len(encode(image)) for image in images]
    for _ in range(arguments.repeats):
        began = time.perf_counter()
        for image in images:
            decode(encode(image), image.size)
        seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds) / len(images), sum(sizes) / len(images) / 1e6


def _decode_png(blob: bytes, size: tuple[int, int]) -> object:
    with Image.open(io.BytesIO(blob), formats=["PNG"]) as image:
        return image.load()


def _decode_raw(blob: bytes, size: tuple[int, int]) -> object:
    return Image.frombytes("RGB", size, blob)
