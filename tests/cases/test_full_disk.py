"""What a disk that is full does to whatever a run writes: the path is told, nothing half-written bears a final name,
what was there before is whole, and with room again the run goes on."""

import json
import logging
import os
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from core.checkpoints import CHECKPOINTS
from core.files import atomic_write_json, verify_folder
from core.records import append_records, read_records
from core.run_lock import hold_run
from core.run_status import STATUS_FILE, one_line, watch_run
from core.scalars import ScalarLog
from models.components import load_transformer, save_component
from rl.loop.checkpoint import find_checkpoint, save_checkpoint
from rl.record.gallery import GallerySample, save_grid
from rl.record.metrics import MetricsWriter
from rl.record.state import RunState, StageProgress
from tests.fakes.full_disk import full_disk
from tests.fakes.tiny_models import make_tiny_transformer

THREAD = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
"""TensorBoard's thread, which gives its error to the caller too."""


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def save(run_dir: Path, step: int) -> Path:
    """A checkpoint whose learner writes 80 kB as DeepSpeed does, with torch.save."""
    learner = SimpleNamespace(save=lambda folder: torch.save(torch.zeros(20_000), folder / "engine.pt"))
    state = RunState(step=step, stages=[StageProgress("edit", steps=step)])
    return save_checkpoint(run_dir, state, "name: x\n", learner, lambda folder: folder.mkdir(), border=False)


def test_a_checkpoint(tmp_path):
    before = save(tmp_path, 1)
    with full_disk(10_000), pytest.raises(Exception) as caught:  # torch says "file write failed", and no more
        save(tmp_path, 2)
    assert f"{tmp_path / CHECKPOINTS / 'step_000002'} was written, with " in one_line(caught.value)
    assert os.listdir(tmp_path / CHECKPOINTS) == ["step_000001"] and verify_folder(before) == []
    assert find_checkpoint(tmp_path, "auto") == before
    assert verify_folder(save(tmp_path, 2)) == []


def test_a_file_keeps_what_it_held(tmp_path):
    path = tmp_path / "summary.json"
    atomic_write_json(path, {"steps": 1})
    with full_disk(10), pytest.raises(OSError, match=f"'{path}'"):
        atomic_write_json(path, {"steps": [2] * 100})
    assert json.loads(path.read_text()) == {"steps": 1} and names(tmp_path) == ["summary.json"]


def test_records_are_not_torn_where_a_later_one_would_follow(tmp_path):
    path = tmp_path / "spans.jsonl"
    append_records(path, [{"step": 1}])
    with full_disk(20), pytest.raises(OSError, match=f"'{path}'"):
        append_records(path, [{"step": 2}, {"step": 3}])
    append_records(path, [{"step": 4}])
    append_records(path, [{"step": 5}])
    assert [record["step"] for record in read_records(path)] == [1, 4, 5]


@THREAD
def test_the_metrics_of_a_run_and_its_tensorboard(tmp_path):
    def log(writer, step):
        writer.log({"reward/mean": 0.5}, step=step, stage="edit", stage_step=step)

    writer = MetricsWriter(tmp_path)
    log(writer, 1)
    with full_disk(120), pytest.raises(OSError, match=str(tmp_path / "metrics.jsonl")):
        log(writer, 2)
    room = (tmp_path / "metrics.jsonl").stat().st_size + 200
    (board,) = (tmp_path / "tensorboard" / "edit").iterdir()
    board.write_bytes(
        board.read_bytes() + b" " * room
    )  # the larger of the two files is the one that has no room
    with full_disk(room), pytest.raises(OSError, match=str(tmp_path / "tensorboard")):
        log(writer, 2)
    with closing(MetricsWriter(tmp_path, resume_step=1)) as resumed:
        log(resumed, 2)
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2]


@THREAD
def test_the_scalars_of_a_supervised_training(tmp_path):
    scalars = ScalarLog(tmp_path, resume_step=None)
    with full_disk(60), pytest.raises(OSError, match=str(tmp_path / "tensorboard")):
        for step in range(1, 9):
            (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
            scalars.write([{"step": step, "loss": 1.0}])


def test_pictures(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    shown = [GallerySample(prompt="a", seed=1, image=noise, reward=0.5, reference=None)]
    path = tmp_path / "edit" / "step_000001.png"
    with full_disk(500), pytest.raises(OSError, match=f"'{path}'"):
        save_grid(shown, path, step=1, stage="edit")
    assert names(tmp_path) == []
    save_grid(shown, path, step=1, stage="edit")
    assert names(tmp_path) == ["edit/step_000001.json", "edit/step_000001.png"]


def test_the_exported_transformer(tmp_path):
    folder = tmp_path / "model"
    make_tiny_transformer().save_pretrained(folder / "transformer")
    before = {path.name: path.read_bytes() for path in (folder / "transformer").iterdir()}
    transformer = load_transformer(folder, dtype=torch.float32)
    with full_disk(20_000), pytest.raises(Exception) as caught:
        save_component(transformer, folder / "transformer")
    assert f"{folder / 'transformer'} was written" in one_line(caught.value)
    assert os.listdir(folder) == ["transformer"]
    assert {path.name: path.read_bytes() for path in (folder / "transformer").iterdir()} == before


def test_the_lock_of_a_run_that_could_not_start(tmp_path):
    folder = tmp_path / "run"
    with full_disk(), pytest.raises(OSError, match="run.lock'"), hold_run(folder):
        pass
    assert os.listdir(folder) == []
    with hold_run(folder):
        pass


def test_the_last_word_of_a_run_is_what_ended_it(tmp_path, caplog):
    """Also where neither `status.json` nor what stderr goes to can be written."""
    with pytest.raises(OSError, match="'metrics.jsonl'"), watch_run(tmp_path, resume=True), full_disk():
        raise OSError(28, "No space left on device", "metrics.jsonl")
    assert "'metrics.jsonl'" in json.loads((tmp_path / STATUS_FILE).read_text())["cause"]
    with caplog.at_level(logging.ERROR), pytest.raises(OSError, match="'metrics.jsonl'"), full_disk():
        with full_disk(10_000):
            watching = watch_run(tmp_path, resume=True)
            watching.__enter__()
        error = OSError(28, "No space left on device", "metrics.jsonl")
        watching.__exit__(OSError, error, None)
        raise error
    assert f"{tmp_path / STATUS_FILE} cannot be written" in caplog.text
