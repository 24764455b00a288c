"""Checkpoints of supervised runs: complete or absent, the newest sound one is taken, other recipes are refused."""

import logging
from dataclasses import dataclass
from pathlib import Path

import pytest

import core.training.run as training
from core.checkpoints import (
    BEST,
    CHECKPOINTS,
    check_same_keys,
    find_step,
    later_steps,
    next_multiple,
    publish_step,
    set_aside,
    step_folders,
)
from core.recipe import ConfigError
from core.run_lock import LOCK, RunTaken


def fill(folder):
    (folder / "weights").write_text("w")


def test_the_newest_are_kept_and_a_damaged_one_is_passed_over(tmp_path, caplog):
    for step in (2, 4, 6):
        publish_step(tmp_path / CHECKPOINTS, step, fill, keep=2)
    names = [path.name for path in sorted((tmp_path / CHECKPOINTS).iterdir())]
    assert names == ["step_0000004", "step_0000006"]
    newest = tmp_path / CHECKPOINTS / "step_0000006"
    assert find_step(tmp_path, "auto", lambda folder: None) == newest
    (newest / "weights").write_text("x")
    with caplog.at_level(logging.WARNING):
        assert find_step(tmp_path, "auto", lambda folder: None).name == "step_0000004"
    assert "passing over a damaged checkpoint" in caplog.text
    with pytest.raises(ConfigError, match="changed, its sha256"):
        find_step(tmp_path, str(newest), lambda folder: None)


def test_a_folder_that_is_only_half_filled_never_appears(tmp_path):
    def broken(folder):
        fill(folder)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        publish_step(tmp_path / CHECKPOINTS, 2, broken, keep=1)
    assert find_step(tmp_path, "auto", lambda folder: None) is None
    publish_step(tmp_path / CHECKPOINTS, 2, fill, keep=1)
    assert find_step(tmp_path, "auto", lambda folder: None).name == "step_0000002"


def test_damage_of_every_checkpoint_is_no_fresh_start(tmp_path):
    for step in (2, 4):
        publish_step(tmp_path / CHECKPOINTS, step, fill, keep=2)
        (tmp_path / CHECKPOINTS / f"step_{step:07d}" / "weights").write_text("x")
    with pytest.raises(ConfigError) as caught:
        find_step(tmp_path, "auto", lambda folder: None)
    summary, newest, oldest = caught.value.problems
    assert "can be used; restore one of them, or move them away" in summary
    assert "step_0000004/weights: changed" in newest and "step_0000002/weights: changed" in oldest


def test_auto_says_that_it_starts_afresh(tmp_path, caplog):
    (tmp_path / CHECKPOINTS).mkdir()
    (tmp_path / CHECKPOINTS / ".DS_Store").write_text("")
    with caplog.at_level(logging.INFO):
        assert find_step(tmp_path, "auto", lambda folder: None) is None
    assert f"no checkpoint in {tmp_path / CHECKPOINTS}: starting at step 0" in caplog.text


def test_checkpoints_sort_by_number(tmp_path):
    folder = tmp_path / CHECKPOINTS
    for step in (9_999_999, 10_000_000, 10_000_001):
        publish_step(folder, step, fill, keep=2)
    assert list(step_folders(folder).values()) == [10_000_000, 10_000_001]
    assert find_step(tmp_path, "auto", lambda folder: None).name == "step_10000001"


def test_pruning_never_takes_what_was_just_written(tmp_path):
    folder = tmp_path / CHECKPOINTS
    for step in (20, 30):
        publish_step(folder, step, fill, keep=2)
    publish_step(folder, 11, fill, keep=1)
    publish_step(folder, 12, fill, keep=1)
    assert list(step_folders(folder).values()) == [12, 20, 30]


def test_later_checkpoints_are_set_aside_each_time(tmp_path):
    folder = tmp_path / CHECKPOINTS
    for _ in range(2):
        for step in (2, 4, 6):
            publish_step(folder, step, fill, keep=3)
        set_aside(tmp_path, later_steps(folder, 2))
    assert list(step_folders(folder).values()) == [2]
    for number in (1, 2):
        assert list(step_folders(tmp_path / "abandoned" / f"{number}" / CHECKPOINTS).values()) == [4, 6]


@dataclass
class Recipe:
    run_dir: Path
    name: str = "x"


class NoRanks(Exception):
    pass


def test_a_supervised_run_sets_aside_what_lies_behind_its_checkpoint(tmp_path, monkeypatch):
    def no_ranks(*arguments):
        raise NoRanks

    for kind in (CHECKPOINTS, BEST):
        for step in (2, 4):
            publish_step(tmp_path / kind, step, fill, keep=2)
    monkeypatch.setattr(training, "start_ranks", no_ranks)
    back = tmp_path / CHECKPOINTS / "step_0000002"
    with pytest.raises(NoRanks):
        training.train_on_ranks(Recipe(tmp_path), None, 1, None, None, checkpoint=back, step=2)
    for kind in (CHECKPOINTS, BEST):
        assert list(step_folders(tmp_path / kind).values()) == [2]
        assert list(step_folders(tmp_path / "abandoned" / "1" / kind).values()) == [4]


class OneRank:
    """Does every step it is asked for."""

    def call(self, method, *arguments):
        return [True]


class Run(training.SupervisedRun):
    recorded = 0

    def record(self, figures, seconds):
        self.recorded += 1

    def due(self):
        return []


def test_a_supervised_run_that_was_taken_over_records_no_further_step(tmp_path):
    run = Run(Recipe(tmp_path), OneRank(), training.RunState(), end=4, log_every=2, fresh=True)
    (tmp_path / LOCK).write_text('{"pid": 4, "host": "node7"}')
    with pytest.raises(RunTaken, match="taken over by process 4 on node7"):
        run.run()
    assert run.recorded == 0


def test_an_earlier_run_is_not_written_over(tmp_path):
    assert find_step(tmp_path, None, lambda folder: None) is None
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="holds an earlier run; add --resume auto"):
        find_step(tmp_path, None, lambda folder: None)


def test_only_keys_that_change_what_is_learned_must_be_equal():
    before, now = {"lr": 1, "save_every": 2, "old": 1}, {"lr": 3, "save_every": 5, "old": 1}
    with pytest.raises(ConfigError) as caught:
        check_same_keys(before, now, free=("save_",), when="step_2")
    assert caught.value.problems == [
        "lr was 1 when step_2 was written and is 3 now; set it back, or start a new run under another name"
    ]
    check_same_keys(before, now, free=("save_", "lr"), when="step_2")


def test_the_next_multiple_lies_behind():
    assert [next_multiple(step, 5) for step in (0, 4, 5)] == [5, 5, 10]
