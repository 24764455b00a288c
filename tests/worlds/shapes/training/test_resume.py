"""A run of N steps equals k steps, a resume, and the rest: bit for bit, in every stage."""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from core.checkpoints import resume_folder, step_folders
from core.recipe import ConfigError
from core.run_lock import hold_run
from models.components import load_transformer
from worlds.shapes.training.checkpoint import load_checkpoint, save_checkpoint
from worlds.shapes.training.config import load_recipe
from worlds.shapes.training.evaluate import Base, heldout_questions, score
from worlds.shapes.training.kontext import ScoreTargets, edit_share, task_of
from worlds.shapes.training.loop import Look, TrainingLoop
from worlds.shapes.training.train import build_stage, main

SHAPES = Path(__file__).parents[4] / "recipes" / "shapes"
STEPS, CUT = 6, 4
COMMON = [f"steps={STEPS}", "stop_step=0", "save_every=2", "log_every=2", "sample_every=0", "threads=1"]
NO_TARGETS = ["targets.t2i=0", "targets.edit=0"]
VAE = ["batch_size=4", "model.block_out_channels=[8,8,8,8]", "statistics_images=8"]
TEXT = [
    "batch_size=8", "vocabulary_captions=400", "probe_captions=64", "vision_width=8", "model.clip_widths=[32,32]",
    "model.clip_layers=2", "model.t5_width=64", "model.t5_layers=1",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tiny VAE and tiny text encoders, through the command line."""
    folder = tmp_path_factory.mktemp("parts")
    for stage, overrides in (("vae", VAE), ("text", TEXT)):
        recipe = str(SHAPES / f"{stage}.yaml")
        assert main([recipe, *COMMON, *overrides, "steps=1", f"output_dir={folder / stage}"]) == 0
    return folder


def overrides_of(stage, parts, output):
    kontext = [
        "batch_size=4", "model.layers=2", "model.heads=2", f"vae={parts}/vae/model", f"text={parts}/text/model",
        f"pool_dir={parts}/pool", "pool_size=16", *NO_TARGETS,
    ]  # fmt: skip
    return [*COMMON, *{"vae": VAE, "text": TEXT, "kontext": kontext}[stage], f"output_dir={output}"]


def new_loop(stage, overrides):
    recipe = load_recipe(SHAPES / f"{stage}.yaml", overrides)
    return TrainingLoop(build_stage(recipe), recipe)


@pytest.mark.parametrize("stage", ["vae", "text", "kontext"])
def test_resumed_equals_straight(stage, parts, tmp_path):
    straight = new_loop(stage, overrides_of(stage, parts, tmp_path / "straight"))
    straight.run()

    cut = new_loop(stage, [*overrides_of(stage, parts, tmp_path / "cut"), f"stop_step={CUT}"])
    cut.run()
    torch.manual_seed(99)  # whatever the global generator holds must not matter
    resumed = new_loop(stage, overrides_of(stage, parts, tmp_path / "cut"))
    resumed.resume("auto")
    assert resumed.step == CUT
    resumed.run()

    states = [
        load_checkpoint(tmp_path / name / f"checkpoints/step-{STEPS:06d}")[0] for name in ("straight", "cut")
    ]
    assert _flat(states[0]) == _flat(states[1])
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("straight", "cut")]
    last = [json.loads(text[-1]) for text in lines]
    assert last[0]["loss"] == last[1]["loss"]
    files = sorted(
        path.relative_to(tmp_path / "cut") for path in (tmp_path / "cut/model").rglob("*.safetensors")
    )
    assert files
    for path in files:
        assert (tmp_path / "cut" / path).read_bytes() == (tmp_path / "straight" / path).read_bytes()


def test_a_run_that_is_asked_to_stop_saves_where_its_log_has_a_line(parts, tmp_path):
    loop = new_loop("vae", [*overrides_of("vae", parts, tmp_path), "save_every=100"])
    loss = loop.stage.loss

    def interrupted(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(step)

    loop.stage.loss = interrupted
    with pytest.raises(SystemExit) as left:
        loop.run()
    assert left.value.code == 128 + signal.SIGTERM
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000004"]
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "stopped"
    assert not (tmp_path / "model").exists()


@dataclass
class Scores:
    """An end rule that reads its scores from a list."""

    scores: list[float]
    every: int = 2

    def look(self):
        value = self.scores.pop(0)
        return Look({"score_edit": value}, reached=value >= 0.5)


def test_a_run_ends_at_its_score_with_the_weights_of_that_step(parts, tmp_path, caplog):
    straight = new_loop(
        "kontext", [*overrides_of("kontext", parts, tmp_path / "straight"), f"stop_step={CUT}"]
    )
    straight.run()
    stopped = new_loop("kontext", overrides_of("kontext", parts, tmp_path / "stopped"))
    stopped.end_rule = Scores([0.4, 0.6])
    stopped.run()
    assert stopped.step == CUT
    assert "not reached" not in caplog.text
    weights = [tmp_path / name / "model/transformer" for name in ("straight", "stopped")]
    files = [next(folder.glob("*.safetensors")).read_bytes() for folder in weights]
    assert files[0] == files[1]
    lines = (tmp_path / "stopped/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["score_edit"] for line in lines] == [0.4, 0.6]

    again = new_loop("kontext", overrides_of("kontext", parts, tmp_path / "stopped"))
    again.end_rule = Scores([0.6])
    again.resume("auto")
    again.run()
    assert again.step == CUT and (tmp_path / "stopped/metrics.jsonl").read_text().splitlines() == lines


def test_a_resumed_run_writes_the_scores_of_the_straight_one(parts, tmp_path, caplog):
    words = overrides_of("kontext", parts, tmp_path)
    straight = new_loop("kontext", words)
    straight.end_rule = Scores([0.4], CUT)
    straight.run()
    assert f"step {STEPS} is the last of this run, and its targets were not reached" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("score_edit") for line in lines] == [None, 0.4, None]

    resumed = new_loop("kontext", words)
    resumed.end_rule = Scores([0.4], CUT)
    resumed.resume(str(tmp_path / f"checkpoints/step-{CUT:06d}"))
    resumed.run()
    again = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("score_edit") for line in again] == [None, 0.4, None]
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]


TARGETS = ["targets.t2i=1", "targets.edit=.9", "targets.prompts=6", "targets.every=2", "preview_steps=2"]


def test_the_targets_of_a_recipe_look_at_the_averaged_weights(parts, tmp_path):
    words = [*overrides_of("kontext", parts, tmp_path), *TARGETS, "steps=2"]
    assert main([str(SHAPES / "kontext.yaml"), *words]) == 0
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    for task in ("t2i", "edit"):
        questions = heldout_questions(task, 6, 7)
        drawn = Base.load(tmp_path / "model").draw(questions, 1.0, 2, 7)
        measured = score(task, questions, drawn).mean()
        assert json.loads(line)[f"score_{task}"] == pytest.approx(measured, abs=1e-3)


def test_a_run_with_targets_resumes_to_the_bit_with_the_share_of_its_last_look(parts, tmp_path):
    words = [*overrides_of("kontext", parts, tmp_path), *TARGETS]

    def run(resume):
        recipe = load_recipe(SHAPES / "kontext.yaml", words)
        stage = build_stage(recipe)
        loop = TrainingLoop(stage, recipe, ScoreTargets(recipe, stage))
        if resume:
            loop.resume(str(tmp_path / f"checkpoints/step-{CUT:06d}"))
        loop.run()
        state = load_checkpoint(tmp_path / f"checkpoints/step-{STEPS:06d}")[0]
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        return _flat(state), [(line["edit_share"], line["loss"]) for line in lines], stage.edit_share

    straight = run(resume=False)
    assert straight[1][0][0] != 0.5
    assert run(resume=True) == straight


def test_insertion_is_trained_from_given_weights_and_resumes_to_the_bit(parts, tmp_path):
    begun = new_loop("kontext", [*overrides_of("kontext", parts, tmp_path / "begun"), "steps=1"])
    begun.run()
    start = f"start={tmp_path / 'begun/model'}"
    words = [
        *overrides_of("kontext", parts, tmp_path / "run"),
        start,
        "insert_share=0.5",
        *TARGETS,
        "targets.insert=1",
    ]

    def run(resume):
        recipe = load_recipe(SHAPES / "kontext.yaml", words)
        stage = build_stage(recipe)
        if not resume:
            assert _flat(stage.transformer.state_dict()) == _flat(
                load_transformer(tmp_path / "begun/model", dtype=torch.float32).state_dict()
            )
        loop = TrainingLoop(stage, recipe, ScoreTargets(recipe, stage))
        if resume:
            loop.resume(str(tmp_path / f"run/checkpoints/step-{CUT:06d}"))
        loop.run()
        lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
        state = load_checkpoint(tmp_path / f"run/checkpoints/step-{STEPS:06d}")[0]
        return _flat(state), [(line["loss"], line["loss_insert"], line["score_insert"]) for line in lines]

    assert run(resume=False) == run(resume=True)


def test_insertion_has_its_share_and_the_others_have_theirs_of_the_rest():
    tasks = [task_of(step, 0.5, 0.6) for step in range(100)]
    assert [tasks.count(task) for task in ("insert", "edit", "t2i")] == [60, 20, 20]
    assert set(tasks[40:50]) == {"insert", "edit", "t2i"}
    assert [task_of(step, 0.3) for step in range(50)] == [task_of(step, 0.3, 0.0) for step in range(50)]


def test_batches_go_where_the_most_is_lacking():
    targets = {"t2i": 0.6, "edit": 0.5}
    assert edit_share({"t2i": 0.5, "edit": 0.2}, targets) == pytest.approx(0.75)
    assert edit_share({"t2i": 0.7, "edit": 0.2}, targets) == 0.9
    assert edit_share({"t2i": 0.1, "edit": 0.6}, targets) == pytest.approx(0.1)
    assert edit_share({"t2i": 0.6, "edit": 0.5}, targets) == 0.5


def test_a_resume_under_another_recipe_is_refused(parts, tmp_path):
    first = new_loop("vae", overrides_of("vae", parts, tmp_path))
    first.save()
    other = new_loop("vae", [*overrides_of("vae", parts, tmp_path), "kl_weight=1", "threads=2"])
    with pytest.raises(ConfigError, match="other values of kl_weight: restore"):
        other.resume("auto")


def test_a_cut_off_checkpoint_is_passed_over(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"step": step}, {}, keep=2)
    assert [path.name for path in step_folders(tmp_path)] == ["step-000002", "step-000003"]
    (tmp_path / "step-000003" / "COMPLETE").unlink()
    assert resume_folder(tmp_path, "auto", step_folders(tmp_path)) == tmp_path / "step-000002"
    with pytest.raises(FileNotFoundError, match="not a complete checkpoint"):
        load_checkpoint(tmp_path / "step-000003")


def test_an_earlier_run_is_not_written_over(parts, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert main([str(SHAPES / "vae.yaml"), *overrides_of("vae", parts, tmp_path)]) == 2
    assert "holds an earlier run; add --resume auto" in capsys.readouterr().err


def test_a_run_that_another_process_writes_is_left_alone(parts, tmp_path, capsys):
    with hold_run(tmp_path):
        assert (
            main([str(SHAPES / "vae.yaml"), *overrides_of("vae", parts, tmp_path), "--resume", "auto"]) == 2
        )
    assert "another run writes there now" in capsys.readouterr().err


def test_going_back_sets_later_checkpoints_aside(parts, tmp_path):
    loop = new_loop("vae", overrides_of("vae", parts, tmp_path))
    for loop.step in (2, 4):
        loop.save()
    loop.resume(str(tmp_path / "checkpoints/step-000002"))
    assert [path.name for path in step_folders(tmp_path / "checkpoints")] == ["step-000002"]
    assert (tmp_path / "abandoned/1/checkpoints/step-000004/state.pt").is_file()


def test_damage_of_every_checkpoint_is_no_fresh_start(parts, tmp_path):
    loop = new_loop("vae", overrides_of("vae", parts, tmp_path))
    loop.save()
    (tmp_path / "checkpoints/step-000000/state.pt").write_bytes(b"torn")
    with pytest.raises(ConfigError, match=r"no checkpoint of .* can be used.*\n.*state.pt: changed"):
        loop.resume("auto")


def test_the_command_names_what_is_wrong(tmp_path, capsys):
    assert main([str(SHAPES / "vae.yaml"), "stepz=3"]) == 2
    assert "did you mean 'steps'?" in capsys.readouterr().err


def _flat(value):
    """Nested state as comparable Python: tensors become their bytes."""
    if isinstance(value, torch.Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            value.contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else value.item(),
        )
    if isinstance(value, dict):
        return {key: _flat(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_flat(item) for item in value]
    return value
