"""Both stages on one card, with NCCL and DeepSpeed's CUDA accelerator, compared with the same run on CPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fakes.tiny_run import tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
REHEARSAL = "{beta: 0.1, num_prompts: 4, samples: 2}"


def run(recipe: Path, *words: str) -> Path:
    """Train in a process of its own and return the run's folder."""
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-m", "rl.train", str(recipe), *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return recipe.parent / "runs" / "tiny"


def steps(folder: Path) -> list[dict[str, float]]:
    """The records of training steps."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "loss/total" in record]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return run(tiny_recipe(tmp_path_factory.mktemp("cuda"), resources__device="cuda"))


def test_a_run_is_that_of_the_cpu(straight, tmp_path):
    """First step: same rollout, same gradient. Later ones part slowly, as rounding moves the policy."""
    cpu = run(tiny_recipe(tmp_path))
    (first, *_), (other, *_) = steps(straight), steps(cpu)
    for name in ("reward/mean", "reward/std", "optimizer/grad_norm", "loss/total"):
        assert first[name] == pytest.approx(other[name], rel=1e-2, abs=1e-6), name
    assert len(steps(straight)) == len(steps(cpu)) == 4
    assert all(r["gate/log_prob_gap_max"] <= 1e-5 for r in steps(straight))


def test_a_resumed_run_goes_on_where_it_was(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "runs" / "tiny")
    folder = tmp_path / "runs" / "tiny"
    for checkpoint in (folder / "checkpoints").iterdir():
        if checkpoint.name != "step_000001":
            shutil.rmtree(checkpoint)
    shutil.rmtree(folder / "adapter")
    run(straight.parents[1] / "recipe.yaml", f"output_dir={tmp_path / 'runs'}", "--resume", "auto")
    expected = adapter(straight)
    for name, tensor in adapter(folder).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"model__dtype": "bfloat16", "learner__zero_stage": 3, "model__gradient_checkpointing": True},
        {"model__dtype": "bfloat16", "resources__placement": "inprocess", "rollout__guidance_scale": 3.0},
        {
            "model__dtype": "bfloat16", "rollout__branch": True, "rollout__window_size": 1, "rollout__window_last": 2,
            "learner__old_log_prob": "replay", "learner__zero_stage": 2,
        },
        {"model__compile": True, "learner__old_log_prob": "replay"},
    ],
    ids=["zero3", "inprocess", "branch", "compile"],
)  # fmt: skip
def test_other_ways_to_run_on_a_card(tmp_path, changes):
    """They train the adapter, within the bound on the log-probability gap (a run that breaks it stops)."""
    recipe = tiny_recipe(tmp_path, resources__device="cuda", **changes)
    folder = run(recipe, f"stages[1].rehearsal={REHEARSAL}")
    assert len(steps(folder)) == 4 and all(record["optimizer/updates"] == 2 for record in steps(folder))
    moved = [name for name, tensor in adapter(folder).items() if "lora_B" in name and bool(tensor.any())]
    assert moved
