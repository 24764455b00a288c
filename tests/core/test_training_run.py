"""The driver's loop of a supervised run, with ranks that only count: what a stop leaves behind."""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from core.run_status import watch_run
from core.training.run import RunState, SupervisedRun, read_state


@dataclass
class Recipe:
    run_dir: Path
    name: str = "run"


class Counting:
    """Ranks that were asked to stop while they train from step 4 on."""

    def call(self, method, *args):
        if method == "advance" and args[0] == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return [True]


class Run(SupervisedRun):
    def record(self, figures, seconds):
        self.scalars.write([{"step": self.state.step, "loss": 0.0}])

    def due(self):
        return [(100, self.checkpoint)]

    def checkpoint(self):
        self.save(keep=2)


def test_a_run_that_is_asked_to_stop_saves_the_steps_that_are_on_record(tmp_path):
    recipe = Recipe(tmp_path)
    with pytest.raises(SystemExit) as left, watch_run(tmp_path, resume=True) as watch:
        Run(recipe, Counting(), RunState(), end=100, log_every=2, fresh=True).run(watch)
    assert left.value.code == 128 + signal.SIGTERM
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert read_state(checkpoint, RunState).step == 6
    written = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == [2, 4, 6]
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"]) == ("stopped", 6)
