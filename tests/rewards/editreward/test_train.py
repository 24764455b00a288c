"""Training a tiny regressor for real: it learns, resumes bit for bit, and does not depend on ranks or ZeRO stage."""

import json
import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from core.recipe import ConfigError
from core.run_lock import RunTaken, hold_run
from core.training.run import read_state
from rewards.editreward.__main__ import main
from rewards.editreward.data.shards import find_shards
from rewards.editreward.settings import FILE
from rewards.editreward.train.command import train
from rewards.editreward.train.export import newest_best
from rewards.editreward.train.rank import TRAINABLE_FILE
from rewards.editreward.train.run import TrainingRun, TrainState
from rewards.editreward.validate import load_recipe
from tests.rewards.editreward.editreward_data import make_base, make_recipe, make_samples, write_shards


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), make_samples(24))


def last_checkpoint(recipe):
    return sorted((recipe.run_dir / "checkpoints").glob("step_*"))[-1]


def weights(recipe):
    """The trained weights of a run whose only validation was its last step."""
    best = sorted((recipe.run_dir / "best").glob("step_*"))[-1]
    return load_file(best / TRAINABLE_FILE)


def engine_weights(recipe):
    """The trained weights in the last checkpoint."""
    path = last_checkpoint(recipe) / "engine" / "mp_rank_00_model_states.pt"
    return torch.load(path, weights_only=True)["module"]


def records(recipe):
    return [json.loads(line) for line in (recipe.run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def overfitted(base, tmp_path_factory):
    """A run that has seen 16 edits of 4 sources often, with its export; the test split is its training split."""
    folder = tmp_path_factory.mktemp("overfitted")
    shards = write_shards(folder, make_samples(8), shards=1)
    recipe = make_recipe(
        folder, base, shards, data={"validation_share": 0.3, "test_share": 0.3},
        train={"steps": 150, "batch_size": 16, "micro_batch_size": 16, "evaluate_every": 150, "save_every": 150,
               "log_every": 20, "optimization": {"lr": 3e-3, "weight_decay": 0.0, "final_lr_fraction": 0.0}},
        evaluate={"split": "train", "resamples": 50, "batch_size": 16, "probes": {"samples": 8, "min_drop": 0.3}},
    )  # fmt: skip
    assert train(recipe) == 0
    assert main(["export", str(folder / "recipe.yaml")]) == 0
    return recipe


def test_it_learns_its_training_edits_by_heart(overfitted, capsys):
    code = main(["evaluate", str(overfitted.run_dir.parent / "recipe.yaml")])
    report = json.loads((overfitted.run_dir / "evaluation-train" / "report.json").read_text())
    assert report["overall"]["spearman"]["mean"] > 0.95 and report["within_groups"]["spearman"]["mean"] > 0.95
    assert report["overall"]["mae"]["mean"] < 1.0
    assert set(report["by_edit_type"]) <= {"paint", "recolour"}
    failed = [probe["name"] for probe in report["probes"] if not probe["passed"]]
    assert code == (1 if failed else 0)
    out = capsys.readouterr().out
    assert "averaged within (source, instruction) groups" in out and "probe unchanged" in out
    assert (overfitted.run_dir / "evaluation-train" / "calibration.png").is_file()
    losses = [r["train/loss"] for r in records(overfitted) if "train/loss" in r]
    assert len(losses) == 150 and losses[-1] < 0.05 < losses[0]
    state = read_state(last_checkpoint(overfitted), TrainState)
    assert (state.step, state.best_step) == (150, 150)


class FakeRanks:
    """All see the run's folder."""

    def call(self, method, *arguments):
        return [True]


@pytest.mark.parametrize(("folder", "score"), [("step_0000002", 0.5), ("step_0000008", None)])
def test_a_best_whose_weights_are_gone_is_none(tmp_path, base, shards, folder, score):
    recipe = make_recipe(tmp_path, base, shards)
    (recipe.run_dir / "best" / folder).mkdir(parents=True)
    state = TrainState(4, best_step=2, best_score=0.5)
    assert TrainingRun(recipe, None, FakeRanks(), [], state, fresh=False).state.best_score == score


def test_a_run_that_another_process_writes_is_left_alone(tmp_path, base, shards):
    recipe = make_recipe(tmp_path, base, shards)
    with hold_run(recipe.run_dir), pytest.raises(RunTaken, match="another run writes there now"):
        train(recipe, resume="auto")


def test_the_best_of_a_run_is_its_newest_by_number(tmp_path):
    for name in ("step_9999999", "step_10000000"):
        (tmp_path / "best" / name).mkdir(parents=True)
    assert newest_best(tmp_path).name == "step_10000000"


def test_an_evaluation_is_compared_with_another_by_its_predictions(overfitted, tmp_path, capsys):
    recipe = overfitted.run_dir.parent / "recipe.yaml"
    out = tmp_path / "first"
    main(["evaluate", str(recipe), "--out", str(out)])
    lines = (out / "predictions.jsonl").read_text().splitlines()
    reversed_scores = [json.dumps(json.loads(line) | {"score": -json.loads(line)["score"]}) for line in lines]
    (tmp_path / "worse.jsonl").write_text("\n".join(reversed_scores))
    main(["evaluate", str(recipe), "--out", str(out), "--against", str(tmp_path / "worse.jsonl")])
    against = json.loads((out / "report.json").read_text())["against"]
    assert against["spearman"]["mean"] > 1.9 and against["pairwise"]["low"] > 0.9
    assert main(["evaluate", str(recipe), "data.score_high=5", "--out", str(out)]) == 2
    assert "data.score_high is 5.0, the model was made with 10.0" in capsys.readouterr().err


def test_a_checkpoint_that_minds_nothing_is_refused(base, shards, tmp_path, capsys):
    """Zero steps of learning: the head's noise alone cannot pass a probe, and the exit code says so."""
    recipe = make_recipe(
        tmp_path, base, shards, train={"steps": 1, "evaluate_every": 1, "optimization": {"lr": 1e-5}}
    )
    assert train(recipe) == 0
    best = sorted((recipe.run_dir / "best").glob("step_*"))
    assert [p.name for p in best] == ["step_0000001"]
    assert main(["export", str(tmp_path / "recipe.yaml")]) == 0
    assert main(["evaluate", str(tmp_path / "recipe.yaml"), "evaluate.split=train"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_stopping_and_resuming_changes_no_bit(base, shards, tmp_path, kind):
    ranking = {"weight": 0.5, "group_size": 2}
    options = {
        "model": {"trainable": kind, "lora": {"rank": 2}},
        "train": {"steps": 6, "zero_stage": 2, "ranking": ranking, "save_every": 3, "evaluate_every": 3},
    }
    straight = make_recipe(tmp_path / "a", base, shards, **options)
    assert train(straight) == 0
    stopped = make_recipe(tmp_path / "b", base, shards, **options)
    assert train(load_recipe(tmp_path / "b" / "recipe.yaml", ["train.stop_step=3"])) == 0
    with pytest.raises(ConfigError, match="holds an earlier run; add --resume auto"):
        train(stopped)
    with pytest.raises(ConfigError, match="train.optimization.lr was 0.002 .* and is 0.1 now"):
        train(load_recipe(tmp_path / "b" / "recipe.yaml", ["train.optimization.lr=0.1"]), resume="auto")
    (shard, *_), _ = find_shards("data.shards", [shards])
    stamp = shard.stat()
    os.utime(shard, (1, 1))
    with pytest.raises(ConfigError, match="data.shards changed since step 3"):
        train(stopped, resume="auto")
    os.utime(shard, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert train(stopped, resume="auto") == 0
    assert records(straight) == records(stopped)
    for name in ("state.json", "inputs.json", FILE):
        assert (last_checkpoint(straight) / name).read_bytes() == (
            last_checkpoint(stopped) / name
        ).read_bytes()
    left, right = engine_weights(straight), engine_weights(stopped)
    assert left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)
    if kind == "lora":
        assert all("lora_" in n or n.startswith("score.") for n in left)


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(base, shards, tmp_path, caplog):
    options = {"train": {"steps": 4, "save_every": 2, "evaluate_every": 4}}
    straight = make_recipe(tmp_path / "a", base, shards, **options)
    train(straight)
    recipe = make_recipe(tmp_path / "b", base, shards, **options)
    shutil.copytree(straight.run_dir, recipe.run_dir)
    newest = last_checkpoint(recipe)
    victim = next(p for p in newest.rglob("*") if p.suffix == ".pt")
    victim.write_bytes(victim.read_bytes()[:-10])
    with pytest.raises(ConfigError, match="changed, its sha256"):
        train(recipe, resume=str(newest))
    with caplog.at_level(logging.WARNING):
        assert train(recipe, resume="auto") == 0
    assert "passing over a damaged checkpoint" in caplog.text
    assert records(recipe) == records(straight)


def test_bfloat16_with_checkpointing_and_a_loader_process(base, shards, tmp_path):
    recipe = make_recipe(
        tmp_path, base, shards,
        model={"dtype": "bfloat16", "gradient_checkpointing": True},
        train={"steps": 2, "loader_workers": 1, "zero_stage": 3, "evaluate_every": 2,
               "loss": "huber", "optimization": {"lr": 1e-3, "head_lr": 1e-2}},
    )  # fmt: skip
    assert train(recipe) == 0
    trained = weights(recipe)
    assert all(t.dtype == torch.bfloat16 for t in trained.values()) and trained["score.weight"].any()
    assert main(["export", str(tmp_path / "recipe.yaml")]) == 0
    config = json.loads((recipe.run_dir / "model" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_two_ranks_and_zero_3_learn_what_one_rank_learns(base, shards, tmp_path, ray_session):
    """Also with LoRA, the ranking term, and micro-batches of another size."""
    found = []
    for name, ranks, stage, micro, checkpointing in (
        ("a", 1, 1, 8, False),
        ("b", 1, 3, 4, True),
        ("c", 2, 3, 2, False),
    ):
        recipe = make_recipe(
            tmp_path / name, base, shards,
            model={"trainable": "lora", "lora": {"rank": 2}, "gradient_checkpointing": checkpointing},
            train={"steps": 3, "evaluate_every": 3, "ranks": ranks, "zero_stage": stage, "micro_batch_size": micro,
                   "ranking": {"weight": 0.5, "group_size": 2}},
        )  # fmt: skip
        assert train(recipe) == 0
        found.append((records(recipe), weights(recipe)))
    (expected_records, expected), *others = found
    for other_records, other in others:
        for one, two in zip(expected_records, other_records, strict=True):
            assert one.keys() == two.keys()
            assert {k: pytest.approx(v, rel=2e-4, abs=1e-5) for k, v in one.items()} == two
        assert expected.keys() == other.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)
