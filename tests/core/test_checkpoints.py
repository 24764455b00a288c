"""Checkpoints of supervised runs: complete or absent, the newest sound one is taken, other recipes are refused."""

import logging

import pytest

from core.checkpoints import CHECKPOINTS, check_same_keys, find_step, next_multiple, publish_step
from core.recipe import ConfigError


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
