"""Records of a supervised training run: lines of `metrics.jsonl`, and the same scalars in TensorBoard. No torch."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.files import naming
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
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.file = run_dir / "metrics.jsonl"
        open_records(self.file, resume_step)
        self._board = EventFileWriter(str(run_dir / "tensorboard"))
        if resume_step is not None:  # TensorBoard then drops what an earlier run wrote of later steps
            self._event(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Each record has a `step`; None stands for what could not be measured."""
        append_records(self.file, records)
        with naming(self._board.get_logdir()):
            for record in records:
                values = {k: v for k, v in record.items() if k != "step" and v is not None}
                self._summary(
                    record["step"], *({"tag": k, "simple_value": float(v)} for k, v in values.items())
                )
            self._board.flush()

    def image(self, name: str, picture: Any, *, step: int) -> None:
        """Show one uint8 picture [H, W, 3] in TensorBoard."""
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        height, width, channels = picture.shape
        shown = {"height": height, "width": width, "colorspace": channels}
        self._summary(step, {"tag": name, "image": shown | {"encoded_image_string": buffer.getvalue()}})
        self._board.flush()

    def close(self) -> None:
        self._board.close()

    def _summary(self, step: int, *values: dict[str, Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._event(step=step, summary=Summary(value=values))

    def _event(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._board.add_event(Event(wall_time=time.time(), **content))
