"""Edits that a tiny regressor can learn: a square is to be recoloured, the label says how far the result got."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from rewards.editreward.config import Recipe
from rewards.editreward.data.shards import EditSample, write_shard
from rewards.editreward.validate import load_recipe
from tests.fakes.tiny_vlm import make_tiny_vlm

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "white": (245, 245, 245)}
SIDE = 56


def square(color: tuple[int, int, int], background: int, x: int = 14) -> Image.Image:
    """A square of 28 pixels on grey."""
    pixels = np.full((SIDE, SIDE, 3), background, dtype=np.uint8)
    pixels[14:42, x : x + 28] = color
    return Image.fromarray(pixels)


def make_samples(sources: int, per_group: int = 4, *, seed: int = 0) -> list[EditSample]:
    """`per_group` results of each (source, instruction), from untouched (label 0) to done (label 10)."""
    rng = np.random.default_rng(seed)
    samples = []
    for n in range(sources):
        first, wanted = (list(COLORS)[int(i)] for i in rng.permutation(len(COLORS))[:2])
        background, x = int(rng.integers(60, 200)), int(rng.integers(0, 28))
        source = square(COLORS[first], background, x)
        for k in range(per_group):
            share = k / (per_group - 1)
            mixed = tuple(
                round((1 - share) * a + share * b) for a, b in zip(COLORS[first], COLORS[wanted], strict=True)
            )
            samples.append(
                EditSample(
                    f"s{n:04d}-{k}",
                    source,
                    square(mixed, background, x),  # type: ignore[arg-type]
                    f"make it {wanted}",
                    "recolour" if n % 2 else "paint",
                    {"overall": 10 * share, "quality": 5 + 5 * share},
                    {"share": share},
                )
            )
    return samples


def write_shards(folder: Path, samples: list[EditSample], *, shards: int = 2) -> str:
    """The glob of the written shards."""
    size = -(-len(samples) // shards)
    for k in range(shards):
        write_shard(folder / f"edits-{k:03d}.tar", samples[k * size : (k + 1) * size])
    return str(folder / "edits-*.tar")


def make_recipe(
    folder: Path, base: Path, shards: str, overrides: list[str] | None = None, **sections: Any
) -> Recipe:
    """A recipe for the tiny model on the CPU; `sections` update those below."""
    recipe: dict[str, Any] = {
        "name": "run",
        "output_dir": str(folder),
        "model": {"path": str(base), "dtype": "float32", "gradient_checkpointing": False},
        "input": {"rubric": "{instruction}", "min_pixels": 4 * 28 * 28, "max_pixels": 16 * 28 * 28},
        "data": {"shards": [shards], "validation_share": 0.2, "test_share": 0.2, "index_workers": 1},
        "train": {
            "steps": 4, "batch_size": 8, "micro_batch_size": 4, "ranks": 1, "zero_stage": 1, "loader_workers": 0,
            "log_every": 2, "evaluate_every": 4, "save_every": 2,
            "optimization": {"lr": 2e-3, "warmup_fraction": 0.1},
        },
        "evaluate": {"resamples": 50, "probes": {"samples": 8}},
        "resources": {
            "device": "cpu", "rank_cpus": 0.25, "threads": 1, "placement_timeout_s": 60, "start_timeout_s": 240,
            "collective_timeout_s": 120, "call_timeout_s": 240,
        },
    }  # fmt: skip
    for name, values in sections.items():
        recipe[name] |= values
    path = folder / "recipe.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe))
    return load_recipe(path, overrides or [])


def make_base(path: Path) -> Path:
    """The tiny Qwen2.5-VL with weights of ordinary size, from which something can be learned in a few steps."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    make_tiny_vlm(path)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                std = 0.5 if "embed_tokens" in name else parameter[0].numel() ** -0.5
                parameter.normal_(0, std, generator=generator)
    model.save_pretrained(path)
    return path
