"""Records of a supervised training run: lines of `metrics.jsonl`, and the same scalars in TensorBoard."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.records import append_records, open_records


@dataclass(frozen=True)
class Metric:
    """One scalar, or one family of scalars when `name` holds placeholders in braces."""

    name: str
    unit: str
    meaning: str

    def matches(self, name: str) -> bool:
        """Whether `name` is this metric, or one of this family."""
        parts = re.split(r"\{\w+\}", self.name)
        return re.fullmatch("[^/]+".join(map(re.escape, parts)), name) is not None


class ScalarLog:
    """Writes `run_dir/metrics.jsonl` and `run_dir/tensorboard/`; a run resumed at a step drops its later records."""

    def __init__(self, run_dir: Path, *, resume_step: int | None):
        from torch.utils.tensorboard import SummaryWriter

        self.file = run_dir / "metrics.jsonl"
        open_records(self.file, resume_step)
        purge = None if resume_step is None else resume_step + 1
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Each record has a `step`; None stands for what could not be measured."""
        append_records(self.file, records)
        for record in records:
            for name, value in record.items():
                if name != "step" and value is not None:
                    self.board.add_scalar(name, value, record["step"])
        self.board.flush()

    def image(self, name: str, picture: Any, *, step: int) -> None:
        """Show one uint8 picture [H, W, 3] in TensorBoard."""
        self.board.add_image(name, picture, global_step=step, dataformats="HWC")
        self.board.flush()

    def close(self) -> None:
        self.board.close()
