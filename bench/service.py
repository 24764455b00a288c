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
    """All ways and codecs in turn within each repeat, so that what else the machine does hits them alike."""
    images = pictures(arguments.batch, arguments.resolution)
    count = len(images)
    batch = RewardBatch(images, ["a red circle"] * count, [[]] * count, [{}] * count)
    ways: dict[str, LoadedReward] = {"in process": load_reward(RewardSpec(NAME))}
    for codec in CODECS:
        ways[codec] = load_reward(RewardSpec(NAME, service=ServiceSpec((url,), codec=codec)))
        problems = await ways[codec].owner.readiness()  # type: ignore[union-attr]
        if problems:
            raise RuntimeError("; ".join(problems))
    calls: dict[str, list[float]] = {way: [] for way in ways}
    codings: dict[str, list[float]] = {codec: [] for codec in CODECS}
    for _ in range(arguments.warmup + arguments.repeats):
        for way, loaded in ways.items():
            began = time.perf_counter()
            await call_reward(loaded, batch)
            calls[way].append(time.perf_counter() - began)
        for codec in CODECS:
            codings[codec].append(await asyncio.to_thread(_code, codec, images))

    def milliseconds(seconds: list[float]) -> float:
        return 1000 * statistics.median(seconds[arguments.warmup :]) / count

    here = milliseconds(calls["in process"])
    rows = [Row("in process", here, 0.0, 0.0, 0.0)]
    for codec in CODECS:
        total, coding = milliseconds(calls[codec]), milliseconds(codings[codec])
        megabytes = sum(len(_CODERS[codec][0](image)) for image in images) / count / 1e6
        rows.append(Row(f"served, {codec}", total, total - here, coding, megabytes))
    return rows


def _code(codec: str, images: Sequence[Image.Image]) -> float:
    """Seconds to encode and decode the batch."""
    encode, decode = _CODERS[codec]
    began = time.perf_counter()
    for image in images:
        decode(encode(image), image.size)
    return time.perf_counter() - began


def _decode_png(blob: bytes, size: tuple[int, int]) -> object:
    with Image.open(io.BytesIO(blob), formats=["PNG"]) as image:
        return image.load()


def _decode_raw(blob: bytes, size: tuple[int, int]) -> object:
    return Image.frombytes("RGB", size, blob)


_Coder = tuple[Callable[[Image.Image], bytes], Callable[[bytes, tuple[int, int]], object]]
_CODERS: dict[str, _Coder] = {
    "png": (encode_png, _decode_png),
    "raw": (Image.Image.tobytes, _decode_raw),
}
