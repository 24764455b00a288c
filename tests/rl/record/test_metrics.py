"""Scalars reach metrics.jsonl and TensorBoard alike, and a resumed run continues them without a seam."""

import json
import logging
import math
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core.records import read_records
from rl.record.journal import step_line
from rl.record.metrics import MetricsWriter


def board(folder: Path, stage: str) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard" / stage))
    events.Reload()
    return events


def log_steps(writer: MetricsWriter, steps: range, offset: float = 0.0) -> None:
    for step in steps:
        stage, stage_step = ("edit", step) if step <= 3 else ("t2i", step - 3)
        writer.log({"reward/mean": step / 10 + offset}, step=step, stage=stage, stage_step=stage_step)


def test_records_hold_what_was_logged(tmp_path: Path) -> None:
    values = {
        "reward/mean": np.float32(0.25),
        "loss/total": torch.tensor(-1.5, requires_grad=True),
        "policy/version": 3,
        "reward/judge/mean": None,
    }
    with closing(MetricsWriter(tmp_path)) as writer:
        writer.log(values, step=4, stage="t2i", stage_step=1)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert isinstance(record.pop("time"), float)
    assert record == {
        "step": 4,
        "stage": "t2i",
        "stage_step": 1,
        "reward/mean": 0.25,
        "loss/total": -1.5,
        "policy/version": 3,
        "reward/judge/mean": None,
    }


def test_tensorboard_shows_the_same_numbers_as_one_run_per_stage(tmp_path: Path) -> None:
    with closing(MetricsWriter(tmp_path)) as writer:
        log_steps(writer, range(1, 6))
    shown = [(event.step, event.value) for event in board(tmp_path, "edit").Scalars("reward/mean")]
    shown += [(event.step, event.value) for event in board(tmp_path, "t2i").Scalars("reward/mean")]
    records = read_records(tmp_path / "metrics.jsonl")
    assert [step for step, _ in shown] == [record["step"] for record in records] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose([value for _, value in shown], [record["reward/mean"] for record in records])


def test_values_that_are_not_finite_become_null_and_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = {"loss/total": math.nan, "optimizer/grad_norm": torch.tensor(math.inf), "reward/mean": 1.0}
    with closing(MetricsWriter(tmp_path)) as writer, caplog.at_level(logging.WARNING):
        writer.log(values, step=1, stage="edit", stage_step=1)
    (record,) = read_records(tmp_path / "metrics.jsonl")
    assert record["loss/total"] is None and record["optimizer/grad_norm"] is None
    assert record["log/non_finite"] == 2 and record["reward/mean"] == 1.0
    assert "step 1: not finite, written as null: loss/total=nan, optimizer/grad_norm=inf" in caplog.text
    assert sorted(board(tmp_path, "edit").Tags()["scalars"]) == ["log/non_finite", "reward/mean"]


def test_an_undeclared_name_writes_nothing(tmp_path: Path) -> None:
    with (
        closing(MetricsWriter(tmp_path)) as writer,
        pytest.raises(ValueError, match="did you mean reward/mean"),
    ):
        writer.log({"loss/total": 1.0, "reward/meen": 1.0}, step=1, stage="edit", stage_step=1)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_resume_after_a_kill_equals_a_run_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(MetricsWriter(tmp_path / "straight")) as writer:
        log_steps(writer, range(1, 7))
    folder = tmp_path / "killed"
    with closing(MetricsWriter(folder)) as writer:
        log_steps(writer, range(1, 3))
        log_steps(writer, range(3, 6), offset=100.0)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "stage": "t')
    # TensorBoard orders its files by the second they were opened in, so the resumed run starts in another.
    later = time.time() + 60
    monkeypatch.setattr(time, "time", lambda: later)
    with closing(MetricsWriter(folder, resume_step=2)) as writer:
        log_steps(writer, range(3, 7))

    def timeless(path: Path) -> list[dict[str, object]]:
        return [{k: v for k, v in record.items() if k != "time"} for record in read_records(path)]

    assert timeless(folder / "metrics.jsonl") == timeless(tmp_path / "straight" / "metrics.jsonl")
    for stage in ("edit", "t2i"):
        killed, straight = board(folder, stage), board(tmp_path / "straight", stage)
        assert [(e.step, e.value) for e in killed.Scalars("reward/mean")] == [
            (e.step, e.value) for e in straight.Scalars("reward/mean")
        ]


def test_a_fresh_writer_refuses_a_used_folder(tmp_path: Path) -> None:
    with closing(MetricsWriter(tmp_path)) as writer:
        log_steps(writer, range(1, 2))
    with pytest.raises(FileExistsError, match="resume that run"):
        MetricsWriter(tmp_path)


def test_a_step_is_one_line_without_what_was_not_measured() -> None:
    values = {
        "reward/mean": 0.61234, "reward/missing_share": 0.0, "policy/kl": 0.00123, "policy/clip_fraction_low": 0.05,
        "policy/clip_fraction_high": 0.07, "optimizer/grad_norm": 0.345, "throughput/images_per_second": 5.31,
        "time/step": 12.14,
    }  # fmt: skip
    assert step_line(values, "step 12/400 (edit 12)", 4800.0) == (
        "step 12/400 (edit 12): reward 0.6123, KL 0.0012, clipped 12%, gradient 0.34, 5.31 images/s, 12.1 s, "
        "1h 20m left"
    )
    bare = {"reward/mean": None, "reward/missing_share": 1.0, "time/step": 2.0}
    assert step_line(bare, "step 1/2 (edit 1)", 2.0) == (
        "step 1/2 (edit 1): nothing scored, not scored 100%, 2.0 s, 2 s left"
    )
