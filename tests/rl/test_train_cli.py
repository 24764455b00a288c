"""`python -m rl.train`: exit codes, the plan and the list of what is missing. No Ray is started."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.recipe import to_yaml
from core.run_lock import LOCK, RunTaken, hold_run
from rl.loop.checkpoint import save_checkpoint
from rl.loop.observer import Observer
from rl.recipe.schema import load_config
from rl.record.state import RunState
from rl.train import main
from tests.fakes.tiny_run import tiny_recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny_recipe(tmp_path_factory.mktemp("cli") / "tiny")


def test_a_dry_run_prints_the_plan_and_says_ready(recipe, capsys):
    assert main([str(recipe), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for line in (
        "run tiny: edit (edit, 2 steps) -> t2i (t2i, 2 steps)",
        "rollout: 2 prompts x G=4 = 8 samples in chunks of 2, T=4",
        "update: 8 / 2 = 4 samples; per rank 4 in 1 micro-batches of 4 x 3 trained steps",
        "placement shared on cpu",
        "  total    1 CPU, 0 GPU",
    ):
        assert line in out
    assert out.endswith("Ready to run.\n")
    assert not (recipe.parent / "runs").exists(), "a dry run writes nothing"


def test_a_dry_run_notes_an_evaluation_that_sees_the_trained_reward_alone(recipe, capsys):
    assert main([str(recipe), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "note: evaluation of edit: nothing but " in out
    assert out.endswith("Ready to run.\n")


def test_a_dry_run_loads_no_ray(recipe):
    code = (
        "import sys; from rl.train import main; code = main(sys.argv[1:]);"
        "sys.exit(code if 'ray' not in sys.modules else 3)"
    )
    command = [sys.executable, "-c", code, str(recipe), "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Ready to run." in done.stdout


def test_flags_and_overrides_come_in_any_order(recipe, capsys):
    for arguments in (
        ["--dry-run", "name=other"],
        ["name=other", "--dry-run"],
        ["seed=1", "--dry-run", "name=other"],
    ):
        assert main([str(recipe), *arguments]) == 0
        assert "run other: " in capsys.readouterr().out


def test_a_dry_run_of_a_recipe_that_is_not_ready_lists_everything(recipe, capsys):
    code = main(
        [str(recipe), "--dry-run", "model.path=/absent", "model.lora.targets=[x]", "stages[0].prompts=/no"]
    )
    out = capsys.readouterr().out
    assert code == 2
    assert "Not ready:\n- model.path: /absent: no such model folder" in out
    assert "- /no: cannot be read" in out
    assert "- model.lora: LoRA targets match no linear layer" in out


def test_a_missing_model_folder_still_gets_a_plan(recipe, capsys):
    assert main([str(recipe), "--dry-run", "model.path=/absent"]) == 2
    out = capsys.readouterr().out
    assert "2243.17 M parameters" in out
    assert "SD3.5-Medium's shape, since the model folder is absent" in out


@pytest.mark.parametrize("override", ["learner.ranks=0", "model.dtype=fp8", "learner.updates_per_rollout=0"])
def test_values_that_no_plan_can_use_are_listed_and_not_raised(recipe, capsys, override):
    assert main([str(recipe), "--dry-run", override]) == 2
    key, value = override.split("=")
    allowed = "must be at least 1" if value.isdigit() else "is not one of float32, bfloat16"
    assert f"- {key}={value if value.isdigit() else repr(value)} {allowed}" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_recipe_that_cannot_be_read(capsys, flags):
    assert main(["/absent/recipe.yaml", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("This recipe cannot run:\n- recipe /absent/recipe.yaml does not exist")


def test_every_bad_key_comes_in_one_message(recipe, capsys):
    assert main([str(recipe), "learner.kl_bta=1", "rollout.num_steps=x"]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'learner.kl_beta'?" in error
    assert "'rollout.num_steps'" in error


def test_training_refuses_what_the_dry_run_refuses(recipe, capsys):
    assert main([str(recipe), "rollout.group_size=3", "stages[0].prompts=/no"]) == 2
    error = capsys.readouterr().err
    assert "rollout.group_size=3 does not divide" in error
    assert "/no: cannot be read" in error


def test_an_earlier_run_is_not_overwritten(recipe, tmp_path, capsys):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "metrics.jsonl").write_text("{}\n")
    assert main([str(recipe), f"output_dir={tmp_path}"]) == 2
    assert "holds an earlier run; add --resume auto, or set another name=" in capsys.readouterr().err


def test_a_run_that_another_process_writes_is_left_alone(recipe, tmp_path, capsys):
    with hold_run(tmp_path / "tiny"):
        assert main([str(recipe), f"output_dir={tmp_path}", "--resume", "auto"]) == 2
    assert f"another run writes there now, process {os.getpid()} on " in capsys.readouterr().err


def test_a_run_that_was_taken_over_records_no_further_step(tmp_path):
    observer = object.__new__(Observer)
    observer.run_dir = tmp_path
    (tmp_path / LOCK).write_text('{"pid": 4, "host": "node7"}')
    with pytest.raises(RunTaken, match="taken over by process 4 on node7"):
        observer.close_step(None, None, None, None)


def test_resuming_from_a_folder_that_is_not_there(recipe, capsys):
    assert main([str(recipe), "--resume", "/absent/step_000001"]) == 2
    assert "/absent/step_000001: no such folder" in capsys.readouterr().err


def test_resuming_with_another_recipe_names_the_keys(recipe, tmp_path, capsys):
    class Learner:
        def save(self, folder):
            (folder / "engine.pt").write_text(json.dumps({}))

    written = to_yaml(load_config(recipe, [f"output_dir={tmp_path}"]))
    save_checkpoint(tmp_path / "tiny", RunState(step=1), written, Learner(), Path.mkdir, border=False)
    assert main([str(recipe), f"output_dir={tmp_path}", "learner.kl_beta=0.5", "--resume", "auto"]) == 2
    assert (
        "key 'learner.kl_beta' was 0.04 when the checkpoint was written and is 0.5 now"
        in capsys.readouterr().err
    )


def test_wrong_usage_leaves_with_argparses_code(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--dry-run"])
    assert caught.value.code == 2
    assert "recipe" in capsys.readouterr().err
