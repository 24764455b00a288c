"""Scalars of a run: one JSON line per record in `metrics.jsonl`, mirrored to TensorBoard.

Names, units and meanings are declared in `rl/record/metric_table.py`. `python -m rl.record.metrics` prints them as
Markdown.
"""

import logging
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.files import naming
from core.records import append_records, open_records
from rl.record.metric_table import describe_metrics, find_metric

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricsWriter:
    """Writes `folder/metrics.jsonl` and `folder/tensorboard/<stage>/`, for parts of a stage `<stage>.<part>/`.

    With `resume_step`, records after that global step are dropped, since those steps will be done again;
    TensorBoard is told to hide them. With `redo_evaluation`, so are evaluations made at `resume_step` itself: a
    run resumed at a stage border makes them again. Raises FileExistsError when `resume_step` is None and there
    are records already.
    """

    def __init__(
        self, folder: str | Path, *, resume_step: int | None = None, redo_evaluation: bool = False
    ) -> None:
        # Imported here because it loads torch, which readers of records do without.
        from torch.utils.tensorboard import SummaryWriter

        self._folder = Path(folder)
        self._make_board = SummaryWriter
        self._boards: dict[str, Any] = {}
        self._purge_step = None if resume_step is None else resume_step + 1
        open_records(
            self._folder / METRICS_FILE,
            resume_step,
            drop=lambda record: (
                redo_evaluation and record["step"] == resume_step and "time/evaluate" in record
            ),
        )

    def log(
        self, values: Mapping[str, Any], *, step: int, stage: str, stage_step: int, part: str | None = None
    ) -> None:
        """Write one record of scalars; `step` counts from the start of the run, `stage_step` within the
        stage; `part` is the task of a joint stage's step.

        A value may be a number, a NumPy or torch scalar, or None (nothing to measure). NaN and infinities
        become null too, with a warning, and are counted in `log/non_finite`. Raises ValueError for an
        undeclared name, before anything is written.
        """
        numbers: dict[str, int | float | None] = {}
        broken = []
        for name, value in values.items():
            find_metric(name)
            number = value.item() if hasattr(value, "item") else value
            if number is not None and not math.isfinite(number):
                broken.append(f"{name}={number}")
                number = None
            numbers[name] = number
        if broken:
            logger.warning("step %d: not finite, written as null: %s", step, ", ".join(broken))
            numbers["log/non_finite"] = len(broken)
        head = {"step": step, "stage": stage, **({"part": part} if part else {}), "stage_step": stage_step}
        append_records(self._folder / METRICS_FILE, [{**head, "time": time.time(), **numbers}])
        with naming(self._folder / TENSORBOARD_FOLDER):
            board = self._board(f"{stage}.{part}" if part else stage)
            for name, number in numbers.items():
                if number is not None:
                    board.add_scalar(name, number, global_step=step)
            board.flush()

    def log_image(self, tag: str, image: NDArray[np.uint8], *, step: int, stage: str) -> None:
        """Show one uint8 picture [H, W, 3] in TensorBoard."""
        with naming(self._folder / TENSORBOARD_FOLDER):
            board = self._board(stage)
            board.add_image(tag, image, global_step=step, dataformats="HWC")
            board.flush()

    def close(self) -> None:
        """Close the TensorBoard files; records are on disk already."""
        for board in self._boards.values():
            board.close()
        self._boards.clear()

    def _board(self, stage: str) -> Any:
        """One TensorBoard run per stage and part, because the rewards of two tasks do not share a curve."""
        if stage not in self._boards:
            path = self._folder / TENSORBOARD_FOLDER / stage
            self._boards[stage] = self._make_board(log_dir=str(path), purge_step=self._purge_step)
        return self._boards[stage]


if __name__ == "__main__":
    sys.stdout.write(describe_metrics())
