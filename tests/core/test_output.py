"""Places that a run will write: tried before the work, with room for what it keeps, and left as they were."""

import shutil

import pytest

from core.output import disk_line, output_problems


def test_a_place_that_is_not_there_yet_is_tried_where_it_would_be_made(tmp_path):
    assert output_problems("output_dir='x'", tmp_path / "a" / "b", {"checkpoints": 1.0}) == []
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    (problem,) = output_problems("output_dir='x'", tmp_path / "file" / "run")
    assert problem.startswith("output_dir='x' cannot be written: ") and problem.endswith(
        "give another folder"
    )


def test_too_little_room_is_told_in_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9e9, 7e9, 2e9))
    needs = {"3 checkpoints": 1.5e9, "model": 1e9}
    (problem,) = output_problems("output_dir='x'", tmp_path, needs)
    assert "has 2.0 GB free, and the run keeps about 2.5 GB (3 checkpoints 1.5 GB, model 1.0 GB)" in problem
    assert output_problems("output_dir='x'", tmp_path, {"model": 1e9}) == []
    assert (
        disk_line(tmp_path, needs) == "disk: about 2.5 GB (3 checkpoints 1.5 GB, model 1.0 GB), 2.0 GB free"
    )


def test_what_the_run_has_already_written_is_not_needed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9e9, 7e9, 2e9))
    with open(tmp_path / "weights", "wb") as file:
        file.truncate(10**9)
    assert output_problems("output_dir='x'", tmp_path, {"checkpoints": 2.5e9}) == []
    (problem,) = output_problems("output_dir='x'", tmp_path, {"checkpoints": 3.5e9})
    assert "has 2.0 GB free beside 1.0 GB of its own, and the run keeps about 3.5 GB" in problem


@pytest.mark.parametrize("folder", ["a\0b", "\ud800"])
def test_what_no_file_system_takes_is_a_problem_and_no_crash(folder):
    assert len(output_problems("output_dir", folder)) == 1
