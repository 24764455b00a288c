"""Whole runs on a real Ray with a real DeepSpeed learner, at tiny size, compared bit for bit."""

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import ray
from safetensors.torch import load_file

from core.checkpoints import CheckpointError
from core.recipe import ConfigError
from models.components import load_transformer
from models.lora.attach import hash_state
from models.lora.files import read_adapter
from rl.loop import controller as loop
from rl.loop.checkpoint import find_checkpoint
from rl.loop.controller import Controller
from rl.recipe.schema import load_config
from rl.record.summary import run_finished
from rl.train import train
from tests.chaos.harness import InRay
from tests.fakes.tiny_run import tiny_recipe


def run(recipe, *overrides, resume=None):
    assert train(load_config(recipe, list(overrides)), resume=resume) == 0


def final_hash(folder, name="tiny"):
    state, settings = read_adapter(folder / "runs" / name / "adapter")
    assert settings.alpha / settings.rank == 2.0
    return hash_state(state)


def records(folder, name="tiny"):
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def groups(folder):
    return (folder / "runs" / "tiny" / "groups.jsonl").read_text()


def learned(folder, name="tiny"):
    """What must be equal between two runs: all but times, counts of workers and where it ran."""
    skipped = ("time", "throughput/", "workers/", "policy/version")
    return [{k: v for k, v in r.items() if not k.startswith(skipped)} for r in records(folder, name)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, ray_session):
    """The reference: 2 + 2 steps, one rollout worker, shared placement."""
    folder = tmp_path_factory.mktemp("straight")
    recipe = tiny_recipe(folder)
    run(recipe)
    return folder, recipe


def copy_run(source, target, keep):
    """The run folder as a kill right after checkpoint `keep` would have left it, later records included."""
    shutil.copytree(source / "runs", target / "runs")
    for checkpoint in (target / "runs" / "tiny" / "checkpoints").iterdir():
        if checkpoint.name not in keep:
            shutil.rmtree(checkpoint)
    for name in ("adapter", "transformer"):
        shutil.rmtree(target / "runs" / "tiny" / name)
    (target / "runs" / "tiny" / "summary.json").unlink()


def test_a_run_leaves_everything_it_promises(straight):
    folder, _ = straight
    out = folder / "runs" / "tiny"
    summary = json.loads((out / "summary.json").read_text())
    assert [(s["name"], s["task"], s["steps"]) for s in summary["stages"]] == [
        ("edit", "edit", 2),
        ("t2i", "t2i", 2),
    ]
    for stage in summary["stages"]:
        assert set(stage["evaluations"]) == {"edit", "t2i"}
        for result in stage["evaluations"].values():
            assert result["num_prompts"] == 4
            assert result["difference"] == pytest.approx(result["after"] - result["before"])
    assert summary["images"] == 2 * 2 * 8 + 3 * 2 * 4 + summary_gallery_images(out)
    for name in ("config.yaml", "trace.json", "spans.jsonl", "tensorboard", "samples/before_after_edit.png",
                 "samples/t2i/step_000000.png", "evaluations/after_t2i/edit.json"):  # fmt: skip
        assert (out / name).exists(), name
    weights = load_file(next((out / "transformer").glob("*.safetensors")))
    merged = load_transformer(out, dtype=weights.popitem()[1].dtype)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    steps = [r for r in records(folder) if "loss/total" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4]
    assert all(r["gate/log_prob_gap_max"] <= 1e-6 for r in steps)
    assert any(r["policy/clip_fraction_low"] + r["policy/clip_fraction_high"] > 0 for r in steps)
    assert {s["name"] for s in map(json.loads, (out / "spans.jsonl").read_text().splitlines())} >= {
        "rollout", "reward", "update", "publish", "evaluate", "checkpoint"
    }  # fmt: skip


def test_every_group_is_on_record_with_pictures_of_the_best_and_the_worst(straight):
    folder, _ = straight
    out = folder / "runs" / "tiny"
    found = [json.loads(line) for line in groups(folder).splitlines()]
    assert [record["step"] for record in found] == [1, 1, 2, 2, 3, 3, 4, 4]
    by_step = {r["step"]: r["reward/mean"] for r in records(folder) if "loss/total" in r}
    for step, mean in by_step.items():
        rewards = [reward for r in found if r["step"] == step for reward in r["rewards"]]
        assert len(rewards) == 8 and np.mean(rewards) == pytest.approx(mean)
        assert all(r["components"]["redness"] == r["rewards"] for r in found if r["step"] == step)
    for record in found:  # two groups a step are the best and the worst
        index = out / "groups" / f"step_{record['step']:06d}_{record['group']}.json"
        assert [s["reward"] for s in json.loads(index.read_text())["samples"]] == record["rewards"]


def summary_gallery_images(out):
    """Two gallery samples at each step that is not a stage's last: one such step in each stage."""
    return 2 * 2


def test_a_lengthened_run_equals_the_straight_run(straight, tmp_path):
    """One step, then one more of that stage and a stage after it."""
    folder, recipe = straight
    config = load_config(recipe, [f"output_dir={tmp_path / 'runs'}"])
    config.stages = [replace(config.stages[0], steps=1)]
    assert train(config) == 0
    run(recipe, f"output_dir={tmp_path / 'runs'}", resume="auto")
    assert final_hash(tmp_path) == final_hash(folder)
    assert learned(tmp_path) == learned(folder)
    assert groups(tmp_path) == groups(folder)


def test_resume_equals_the_straight_run(straight, tmp_path):
    """From a stage border, in a copied folder. From a step within a stage: the test of a stopped run."""
    folder, recipe = straight
    copy_run(folder, tmp_path, ("stage_0_end",))
    run(recipe, f"output_dir={tmp_path / 'runs'}", resume="auto")
    assert final_hash(tmp_path) == final_hash(folder)
    assert learned(tmp_path) == learned(folder)
    assert groups(tmp_path) == groups(folder)
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    back = [path for path in files if str(folder / "runs").encode() in path.read_bytes()]
    copied = tmp_path / "runs" / "tiny" / "checkpoints" / "stage_0_end" / "config.yaml"
    assert back in ([copied], []), "the folder goes on where it was copied to"


def test_three_workers_equal_one(straight, tmp_path):
    folder, recipe = straight
    # Squares are what they were, whichever key says so.
    run(recipe, f"output_dir={tmp_path / 'runs'}", "rollout.workers=3", "resources.placement=separate",
        "resources.reward_workers=2", "model.longer_edge=32", "model.sizes=[{height: 32, width: 32}]")  # fmt: skip
    assert final_hash(tmp_path) == final_hash(folder)
    assert learned(tmp_path) == learned(folder)


def test_a_group_in_chunks_branches_from_one_trajectory(tmp_path, ray_session):
    """The learner replays a group's first stochastic step from one sample's latents for all four, so chunks with
    other initial noise would show as log-probabilities of another policy."""
    recipe = tiny_recipe(tmp_path)
    run(recipe, "rollout.branch=true", "rollout.window_size=2", "rollout.window_last=3",
        "rollout.chunk_size=2", "learner.micro_batch_size=8")  # fmt: skip
    steps = [r for r in records(tmp_path) if "loss/total" in r]
    assert len(steps) == 4 and all(r["gate/log_prob_gap_max"] <= 1e-6 for r in steps)
    spread = [np.std(record["rewards"]) for record in map(json.loads, groups(tmp_path).splitlines())]
    assert min(spread) > 0


def die_on(monkeypatch, owner, name):
    """SIGKILL the only learner rank when `owner.name` is called for the second time."""
    groups, inner, calls = [], getattr(owner, name), []
    begin = Controller.__init__

    def watched(self, config, cluster, *args, **options):
        groups.append(cluster.learner)
        begin(self, config, cluster, *args, **options)

    def killing(*args, **options):
        calls.append(name)
        if len(calls) == 2:
            info = ray.get(groups[-1].actors[0].ready.remote(), timeout=60)
            os.kill(int(info.worker.rpartition(":")[2]), signal.SIGKILL)
        return inner(*args, **options)

    monkeypatch.setattr(Controller, "__init__", watched)
    monkeypatch.setattr(owner, name, killing)
    return groups


def test_a_lost_learner_rank_changes_nothing(straight, tmp_path, monkeypatch):
    """While it samples, in placement `inprocess`; back to the beginning. In an update, and in a save: tests/chaos."""
    folder, recipe = straight
    groups_of = die_on(monkeypatch, loop, "group_requests")
    run(recipe, f"output_dir={tmp_path / 'runs'}", "resources.placement=inprocess", "checkpoint.every=100")
    assert len(groups_of) == 2, "the ranks were not replaced"
    assert final_hash(tmp_path) == final_hash(folder)
    assert learned(tmp_path) == learned(folder)
    assert groups(tmp_path) == groups(folder)
    assert (status(tmp_path)["state"], status(tmp_path)["learner_restarts"]) == ("finished", 1)
    assert json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())["learner_restarts"] == 1


def status(folder):
    return json.loads((folder / "runs" / "tiny" / "status.json").read_text())


def interrupt_after_the_first_step(metrics):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (metrics.exists() and '"loss/total"' in metrics.read_text()):
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGINT)


def left_after(before):
    """What Ray holds beyond `before`, once it has ended what it was told to."""
    deadline = time.monotonic() + 60
    while (left := InRay.now().living - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def test_a_run_that_is_stopped_and_then_fails_ends_like_the_straight_one(straight, tmp_path, monkeypatch):
    folder, recipe = straight
    out = tmp_path / "runs" / "tiny"
    overrides = f"output_dir={tmp_path / 'runs'}", "checkpoint.every=100"
    thread = threading.Thread(
        target=interrupt_after_the_first_step, args=(out / "metrics.jsonl",), daemon=True
    )
    thread.start()
    with pytest.raises(SystemExit) as left:
        run(recipe, *overrides)
    assert left.value.code == 130
    assert status(tmp_path)["state"] == "stopped" and status(tmp_path)["step"] == 1
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000001"]

    def fail(*_):
        raise RuntimeError("the rewards are worthless")

    before = InRay.now().living
    with monkeypatch.context() as patched:
        patched.setattr(Controller, "_guard", fail)
        with pytest.raises(RuntimeError, match="worthless"):
            run(recipe, *overrides, resume="auto")
    assert left_after(before) == set(), "actors and placement groups"
    assert (status(tmp_path)["state"], status(tmp_path)["step"]) == ("failed", 1)
    assert status(tmp_path)["cause"] == "RuntimeError: the rewards are worthless"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["stages"][0]["steps"] == 1 and not run_finished(out)
    assert json.loads((out / "trace.json").read_text())["traceEvents"]
    run(recipe, *overrides, resume="auto")
    assert status(tmp_path)["state"] == "finished" and run_finished(out)
    assert final_hash(tmp_path) == final_hash(folder)
    assert learned(tmp_path) == learned(folder)
    assert groups(tmp_path) == groups(folder)


def test_an_earlier_run_is_not_overwritten(straight):
    _, recipe = straight
    with pytest.raises(ConfigError, match="holds an earlier run"):
        run(recipe)


def test_resume_refuses_another_recipe_and_a_damaged_checkpoint(straight, tmp_path):
    folder, recipe = straight
    with pytest.raises(ConfigError, match="learner.kl_beta"):
        run(recipe, "learner.kl_beta=0.5", resume="auto")
    copy_run(folder, tmp_path, ("step_000001", "stage_0_end"))
    damaged = tmp_path / "runs" / "tiny" / "checkpoints" / "stage_0_end"
    (damaged / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="state.json"):
        find_checkpoint(tmp_path / "runs" / "tiny", str(damaged))
    assert find_checkpoint(tmp_path / "runs" / "tiny", "auto").name == "step_000001"


def test_metrics_are_those_of_the_rewards(straight):
    folder, _ = straight
    first = next(r for r in records(folder) if "loss/total" in r)
    assert first["reward/mean"] == first["reward/redness/mean"]
    assert first["reward/missing_share"] == 0.0 and np.isfinite(first["optimizer/grad_norm"])
