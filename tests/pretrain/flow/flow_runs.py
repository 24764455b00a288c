"""Flow-matching recipes at tiny size: random models of the real classes on the shapes world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from pretrain.flow.config import FlowRecipe
from pretrain.flow.validate import load_recipe

SOURCES = [{"kind": "shapes", "task": task, "samples": 64} for task in ("t2i", "edit")]
CONNECTOR = {
    "num_queries": 6, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def flow_recipe(
    folder: Path, model: Path, *overrides: str, vlm: Path | None = None, **changes: Any
) -> FlowRecipe:
    """A recipe in `folder`, for stage unified with a VLM and kontext without one; `changes` replace top-level keys."""
    parts: dict[str, Any] = {"path": str(model), "dtype": "float32", "gradient_checkpointing": False}
    parts |= {"vlm": str(vlm), "connector": CONNECTOR} if vlm else {"max_sequence_length": 16}
    recipe: dict[str, Any] = {
        "name": "run",
        "output_dir": str(folder),
        "stage": "unified" if vlm else "kontext",
        "model": parts,
        "data": {
            "sources": SOURCES, "aspect_buckets": False, "multiple": 8, "resolution": [{"side": 32}], "workers": 1,
            "prefetch": 2, "prompt_dropout": 0.25,
        },
        "steps": 4, "batch_size": 4, "micro_batch_size": 2, "log_every": 2, "save_every": 2,
        "optimization": {"lr": 1e-3},
        "samples": {"every": 0, "count": 2, "steps": 2, "guidance_scale": 2.0},
        "resources": {
            "ranks": 1, "device": "cpu", "rank_cpus": 0.25, "threads": 1, "placement_timeout_s": 120,
            "start_timeout_s": 300, "collective_timeout_s": 240, "call_timeout_s": 300,
        },
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return load_recipe(path, list(overrides))


def records(recipe: FlowRecipe) -> list[dict[str, Any]]:
    """The run's records without what a clock says."""
    lines = (recipe.run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("throughput/")} for line in lines]


def last_checkpoint(recipe: FlowRecipe) -> Path:
    return sorted((recipe.run_dir / "checkpoints").glob("step_*"))[-1]


def exported(recipe: FlowRecipe, part: str) -> dict[str, Any]:
    """The tensors of one part of the exported model."""
    return load_file(recipe.run_dir / "model" / part / "diffusion_pytorch_model.safetensors")
