"""The folder protocol of checkpoints: whole or absent, found by step, refused when changed or of another recipe."""

import logging
from dataclasses import replace

import pytest

from core.checkpoints import CHECKPOINTS, CheckpointError, prune
from core.recipe import ConfigError, to_yaml
from rewards.recipe import RewardConfig, ServiceConfig, StagePartConfig
from rl.loop.checkpoint import (
    begin_at,
    check_same_recipe,
    find_checkpoint,
    read_state,
    save_checkpoint,
    set_later_aside,
)
from rl.recipe.schema import RunConfig, StageConfig
from rl.record.state import RunState, StageProgress


class FileLearner:
    """Stands for the learner group: what it saves is one file."""

    def __init__(self, content="weights"):
        self.content = content

    def save(self, folder):
        (folder / "engine.pt").write_text(self.content)


class KilledLearner(FileLearner):
    """Dies in the middle of writing."""

    def save(self, folder):
        super().save(folder)
        raise KeyboardInterrupt


def write_adapter(folder):
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_text("adapter")


def state(step: int, stage: int = 0) -> RunState:
    return RunState(stage=stage, step=step, version=step + 1, stages=[StageProgress("edit", steps=step)])


def save(run_dir, step, *, border=False, stage=0, learner=None):
    return save_checkpoint(
        run_dir, state(step, stage), "name: x\n", learner or FileLearner(), write_adapter, border=border
    )


def test_a_checkpoint_holds_all_its_parts(tmp_path):
    folder = save(tmp_path, 7)
    assert folder == tmp_path / CHECKPOINTS / "step_000007"
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert files == [
        "COMPLETE", "adapter/adapter_model.safetensors", "config.yaml", "learner/engine.pt", "state.json",
    ]  # fmt: skip
    assert read_state(folder) == state(7)
    assert find_checkpoint(tmp_path, "auto") == folder
    assert find_checkpoint(tmp_path, str(folder)) == folder


def test_the_state_survives_a_checkpoint(tmp_path):
    full = RunState(
        1, 12, 13, 400, 3.5, 2, 1,
        [StageProgress("edit", 8, 2.0, 0.25, 256, 3), StageProgress("t2i", 4, 1.5, None, 128, 0)],
    )  # fmt: skip
    folder = save_checkpoint(tmp_path, full, "", FileLearner("w"), write_adapter, border=False)
    assert read_state(folder) == full


def test_a_kill_while_writing_leaves_the_older_checkpoint(tmp_path):
    older = save(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, learner=KilledLearner("torn"))
    assert not (tmp_path / CHECKPOINTS / "step_000002").exists()
    assert find_checkpoint(tmp_path, "auto") == older
    again = save(tmp_path, 2)
    assert (again / "learner" / "engine.pt").read_text() == "weights"
    assert find_checkpoint(tmp_path, "auto") == again
    assert sorted(p.name for p in (tmp_path / CHECKPOINTS).iterdir()) == ["step_000001", "step_000002"]


def test_saving_a_step_again_replaces_it_whole(tmp_path):
    save(tmp_path, 3, learner=FileLearner("first"))
    folder = save(tmp_path, 3, learner=FileLearner("second"))
    assert (folder / "learner" / "engine.pt").read_text() == "second"
    assert find_checkpoint(tmp_path, str(folder)) == folder


def test_auto_takes_the_most_steps_whatever_the_names_say(tmp_path):
    save(tmp_path, 9)
    border = save(tmp_path, 10, border=True)
    assert border.name == "stage_0_end"
    assert find_checkpoint(tmp_path, "auto") == border
    newest = save(tmp_path, 11, stage=1)
    assert find_checkpoint(tmp_path, "auto") == newest


def test_without_checkpoints_auto_starts_afresh(tmp_path):
    assert find_checkpoint(tmp_path, "auto") is None
    (tmp_path / CHECKPOINTS).mkdir()
    assert find_checkpoint(tmp_path, "auto") is None


@pytest.mark.parametrize("damage", ["changed", "missing", "surplus", "no marker"])
def test_a_damaged_checkpoint_is_passed_over_aloud(tmp_path, caplog, damage):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    engine = newer / "learner" / "engine.pt"
    if damage == "changed":
        engine.write_text("weightz")
    elif damage == "missing":
        engine.unlink()
    elif damage == "surplus":
        (newer / "learner" / "more.pt").write_text("x")
    else:
        (newer / "COMPLETE").unlink()
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path, "auto") == older
    assert "passing over a damaged checkpoint" in caplog.text
    assert str(newer) in caplog.text
    with pytest.raises(CheckpointError, match="step_000002"):
        find_checkpoint(tmp_path, str(newer))


def test_an_explicit_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        find_checkpoint(tmp_path, str(tmp_path / "absent"))


def test_pruning_keeps_the_newest_and_the_borders(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    save(tmp_path, 4, border=True)
    save(tmp_path, 10, stage=1)
    prune(tmp_path / CHECKPOINTS, 10, keep=2)
    assert sorted(p.name for p in (tmp_path / CHECKPOINTS).iterdir()) == [
        "stage_0_end",
        "step_000003",
        "step_000010",
    ]


def test_damage_of_every_checkpoint_is_no_fresh_start(tmp_path):
    for folder in (save(tmp_path, 1), save(tmp_path, 2, border=True)):
        (folder / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="restore one of them") as caught:
        find_checkpoint(tmp_path, "auto")
    assert "step_000001/state.json" in str(caught.value) and "stage_0_end/state.json" in str(caught.value)


def test_a_stray_file_is_no_damage(tmp_path):
    newest = save(tmp_path, 2)
    (newest / ".DS_Store").write_text("")
    (newest.parent / "notes.txt").write_text("")
    assert find_checkpoint(tmp_path, "auto") == newest


def test_going_back_sets_later_ones_aside_whatever_their_kind(tmp_path):
    back = save(tmp_path, 1)
    save(tmp_path, 2)
    save(tmp_path, 3, border=True)
    save(tmp_path, 1_000_000, stage=1)
    assert find_checkpoint(tmp_path, "auto").name == "step_1000000"
    set_later_aside(tmp_path, read_state(back).step)
    assert find_checkpoint(tmp_path, "auto") == back
    aside = sorted(path.name for path in (tmp_path / "abandoned" / "1" / CHECKPOINTS).iterdir())
    assert aside == ["stage_0_end", "step_000002", "step_1000000"]


# ---- the recipe of the checkpoint and the present one -----------------------------------------------------------


def recipe(**changes) -> str:
    config = RunConfig(name="x")
    config.model.path = "m"
    config.stages = [StageConfig("edit", "edit", "e.jsonl", 5)]
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = config
        for part in parents:
            node = node[int(part)] if part.isdigit() else getattr(node, part)
        setattr(node, last, value)
    return to_yaml(config)


def test_the_same_recipe_may_continue():
    check_same_recipe(recipe(), recipe())


@pytest.mark.parametrize(
    "change",
    [
        {"output_dir": "/elsewhere"},
        {"resources__threads": 1, "resources__reward_workers": 5},
        {"rollout__workers": 2},
        {"checkpoint__every": 3},
        {"gallery__prompts": 0},
        {"alarms__trained_task": "stop"},
    ],
)
def test_who_does_the_work_may_change(change):
    check_same_recipe(recipe(), recipe(**change))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"resources__threads": 1}, ["resources.threads"]),
        (
            {"resources__device": "cpu", "resources__encode_gpus": 0.5},
            ["resources.device", "resources.encode_gpus"],
        ),
        ({"resources__reward_workers": 5, "resources__encode_workers": 3, "rollout__workers": 2}, []),
    ],
)
def test_the_log_names_what_moves_the_bits(change, named, caplog):
    check_same_recipe(recipe(), recipe(**change))
    assert [record.args[0] for record in caplog.records] == named


@pytest.mark.parametrize(
    ("change", "key", "was", "now"),
    [
        ({"seed": 1}, "seed", 0, 1),
        ({"learner__kl_beta": 0.1}, "learner.kl_beta", 0.04, 0.1),
        ({"learner__log_prob_tolerance": 0.1}, "learner.log_prob_tolerance", None, 0.1),
        ({"stages__0__steps": 4}, "stages.0.steps", 5, 4),
        ({"stages__0__name": "t2i"}, "stages.0.name", "edit", "t2i"),
        ({"rollout__chunk_size": 4}, "rollout.chunk_size", 8, 4),
        ({"evaluation__num_steps": 4}, "evaluation.num_steps", 28, 4),
    ],
)
def test_what_is_computed_may_not_change(change, key, was, now):
    with pytest.raises(ConfigError) as caught:
        check_same_recipe(recipe(), recipe(**change))
    (problem,) = caught.value.problems
    assert problem.startswith(f"key '{key}' was {was!r} when the checkpoint was written and is {now!r} now")


def test_every_changed_key_is_named():
    stages = [StageConfig("edit", "edit", "e.jsonl", 5), StageConfig("t2i", "t2i", "t.jsonl", 5)]
    with pytest.raises(ConfigError) as caught:
        check_same_recipe(recipe(), recipe(seed=3, learner__clip_range=0.5, stages=stages))
    keys = [problem.split("'")[1] for problem in caught.value.problems]
    assert keys == ["learner.clip_range", "seed"]


LONGER = [StageConfig("edit", "edit", "e.jsonl", 9), StageConfig("t2i", "t2i", "t.jsonl", 5)]


def test_a_run_may_be_lengthened():
    check_same_recipe(recipe(), recipe(stages=LONGER[:1]))
    check_same_recipe(recipe(), recipe(stages=LONGER))
    check_same_recipe(
        recipe(stages=LONGER), recipe(stages=[*LONGER, StageConfig("more", "edit", "e.jsonl", 1)])
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (recipe(stages=LONGER), recipe(stages=[StageConfig("edit", "edit", "e.jsonl", 10), LONGER[1]])),
        (recipe(stages=LONGER), recipe(stages=LONGER[:1])),
        (
            recipe(learner__final_learning_rate=1e-5),
            recipe(learner__final_learning_rate=1e-5, stages=LONGER[:1]),
        ),
    ],
    ids=["an earlier stage", "a stage less", "a rate that falls over the stage"],
)
def test_what_lengthening_would_change_is_refused(before, after):
    with pytest.raises(ConfigError, match=r"key 'stages\.\d\."):
        check_same_recipe(before, after)


def test_the_end_of_the_old_steps_is_looked_at_as_a_step(tmp_path):
    config = RunConfig(name="x", output_dir=str(tmp_path), stages=LONGER[:1])
    for steps, unseen in ((9, False), (5, True)):
        old = RunConfig(name="x", stages=[StageConfig("edit", "edit", "e.jsonl", steps)])
        folder = save_checkpoint(
            tmp_path / "x", state(steps), to_yaml(old), FileLearner(), write_adapter, border=True
        )
        assert begin_at(config, tmp_path / "x", "auto") == (folder, replace(state(steps), unseen=unseen))


def judged(*, joint=False, params=None, service=None, **keys):
    given = {"protocol": "viescore", "model": "gpt-4.1", **(params or {})}
    reward = RewardConfig("judge", params=given, service=service and ServiceConfig(**service), **keys)
    part = StagePartConfig("edit", "e.jsonl", [reward])
    if joint:
        return recipe(stages=[StageConfig("e", "joint", steps=2, parts=[part])])
    return recipe(stages=[StageConfig("e", "edit", "e.jsonl", 2, [reward])])


@pytest.mark.parametrize(
    "change",
    [
        {"timeout_s": 9.0, "attempts": 7, "max_missing_share": 0.5, "constant_steps": 3},
        {"params": {"max_cost_usd": 99.0, "cache": "/x", "concurrency": 3, "mode": "replay"}},
        {"params": {"base_url": ["http://a/v1", "http://b/v1"]}},
        {"service": {"urls": ["http://a:8100"]}},
    ],
)
@pytest.mark.parametrize("joint", [False, True])
def test_how_a_score_is_obtained_may_change(change, joint):
    check_same_recipe(judged(joint=joint), judged(joint=joint, **change))


@pytest.mark.parametrize(
    "change", [{"params": {"model": "gpt-5"}}, {"params": {"protocol": "structured"}}, {"weight": 2.0}]
)
def test_what_a_score_is_may_not_change(change):
    with pytest.raises(ConfigError, match="when the checkpoint was written"):
        check_same_recipe(judged(), judged(**change))
