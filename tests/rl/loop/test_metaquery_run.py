"""PDTR on a tiny MetaQuery model: both stages on a real Ray, guided, with the log-probability gate and exact resume."""

import json
import shutil

import pytest

from models.lora.attach import hash_state
from models.lora.files import read_adapter
from rl.recipe.schema import load_config
from rl.train import train
from tests.fakes.tiny_metaquery import make_tiny_metaquery
from tests.fakes.tiny_run import tiny_recipe


def run(recipe, *overrides, resume=None):
    assert train(load_config(recipe, list(overrides)), resume=resume) == 0


def final_hash(folder):
    return hash_state(read_adapter(folder / "runs" / "tiny" / "adapter")[0])


def steps(folder):
    """The records of the training steps, without what depends on time and place."""
    lines = (folder / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    skipped = ("time", "throughput/", "workers/", "policy/version")
    return [
        {key: value for key, value in record.items() if not key.startswith(skipped)}
        for record in map(json.loads, lines)
        if "loss/total" in record
    ]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, ray_session):
    """Two steps of editing, one of text-to-image; guidance runs the negative prompt beside every sample."""
    folder = tmp_path_factory.mktemp("straight")
    model, vlm = make_tiny_metaquery(folder / "metaquery")
    recipe = tiny_recipe(
        folder,
        model__path=str(model),
        model__vlm=str(vlm),
        rollout__num_steps=3,
        rollout__guidance_scale=3.0,
        rollout__negative_prompt="blurry",
        evaluation__guidance_scale=3.0,
        gallery__prompts=0,
    )
    overrides = ("stages[1].steps=1", *(f"evaluation.tasks[{k}].num_prompts=2" for k in (0, 1)))
    run(recipe, *overrides)
    return folder, recipe, overrides


def test_both_stages_learn_behind_the_gate(straight):
    folder, *_ = straight
    records = steps(folder)
    assert [(record["stage"], record["step"]) for record in records] == [("edit", 1), ("edit", 2), ("t2i", 3)]
    assert all(record["gate/log_prob_gap_max"] <= 1e-6 for record in records)
    assert any(
        record["policy/clip_fraction_low"] + record["policy/clip_fraction_high"] > 0 for record in records
    )
    summary = json.loads((folder / "runs" / "tiny" / "summary.json").read_text())
    for stage in summary["stages"]:
        assert set(stage["evaluations"]) == {"edit", "t2i"}


def test_resume_equals_the_straight_run(straight, tmp_path):
    """From the middle of editing; the learner's rank samples here, so nothing depends on the placement either."""
    folder, recipe, overrides = straight
    shutil.copytree(folder / "runs", tmp_path / "runs")
    out = tmp_path / "runs" / "tiny"
    for checkpoint in (out / "checkpoints").iterdir():
        if checkpoint.name != "step_000001":
            shutil.rmtree(checkpoint)
    for name in ("adapter", "transformer"):
        shutil.rmtree(out / name)
    (out / "summary.json").unlink()
    run(recipe, *overrides, f"output_dir={tmp_path / 'runs'}", "resources.placement=inprocess", resume="auto")
    assert final_hash(tmp_path) == final_hash(folder)
    assert steps(tmp_path) == steps(folder)
