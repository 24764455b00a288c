"""Scalars of a run: lines and TensorBoard say the same, a resumed run drops what it repeats, torch is not needed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core.scalars import ScalarLog

ROOT = Path(__file__).resolve().parents[2]


def test_lines_and_tensorboard_say_the_same_and_a_resumed_run_drops_its_later_records(tmp_path):
    log = ScalarLog(tmp_path, resume_step=None)
    log.write([{"step": 1, "a/b": 0.5, "c": None}, {"step": 2, "a/b": 1}])
    log.image("picture", np.zeros((4, 6, 3), np.uint8), step=1)
    log.close()
    log = ScalarLog(tmp_path, resume_step=1)
    log.write([{"step": 2, "a/b": 0.75}])
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "a/b": 0.5, "c": None}, {"step": 2, "a/b": 0.75}]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("a/b")] == [(1, 0.5), (2, 0.75)]
    assert board.Tags()["scalars"] == ["a/b"]
    (picture,) = board.Images("picture")
    assert (picture.step, picture.width, picture.height) == (1, 6, 4)


def test_writing_needs_no_torch(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom core.scalars import ScalarLog\n"
        "log = ScalarLog(Path(sys.argv[1]), resume_step=None)\nlog.write([{'step': 1, 'a': 1.0}])\nlog.close()\n"
        "print([m for m in ('torch', 'ray', 'tensorflow') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
