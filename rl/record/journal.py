"""What a run writes for people: metrics, spans, groups, sample grids, evaluations, alarms, the final summary."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.files import atomic_write_json, atomic_write_text
from core.recipe import to_yaml
from core.records import append_records, open_records
from core.spans import SPANS_FILE, Span, SpanName, chrome_trace, read_spans, timed
from core.statistics import Difference, bootstrap_mean
from rl.recipe.schema import RunConfig
from rl.record.evaluation import TaskScores
from rl.record.gallery import GallerySample, save_grid
from rl.record.groups import GROUPS_FILE, GroupRecord, picture_path
from rl.record.metrics import MetricsWriter
from rl.record.state import RunState
from rl.record.summary import RunSummary, duration, print_summary, write_summary

log = logging.getLogger(__name__)


class Journal:
    """All records of one run under `run_dir`; resuming drops what came after the resumed step."""

    def __init__(
        self, run_dir: Path, config: RunConfig, *, resume_step: int | None, redo_evaluation: bool = False
    ):
        self.run_dir, self.config_yaml = run_dir, to_yaml(config)
        self._steps = sum(stage.steps for stage in config.stages)
        self._timing: tuple[int, float] | None = None
        """Steps done before the first one here, and when that began."""
        atomic_write_text(run_dir / "config.yaml", self.config_yaml)
        self.metrics = MetricsWriter(run_dir, resume_step=resume_step, redo_evaluation=redo_evaluation)
        for name in (SPANS_FILE, GROUPS_FILE):
            open_records(run_dir / name, resume_step)

    def log(
        self, values: dict[str, Any], step: int, stage: str, stage_step: int, *, part: str | None = None
    ) -> None:
        """Metrics of one finished step; `part`: the task that the step trained, in a joint stage."""
        self.metrics.log(values, step=step, stage=stage, stage_step=stage_step, part=part)
        seconds = values["time/step"]
        self._timing = self._timing or (step - 1, time.monotonic() - seconds)
        first, began = self._timing
        left = (time.monotonic() - began) / (step - first) * (self._steps - step)
        where = f"{stage} {stage_step}, {part}" if part else f"{stage} {stage_step}"
        log.info("%s", step_line(values, f"step {step}/{self._steps} ({where})", left))

    def groups(self, records: Sequence[GroupRecord]) -> None:
        """What each sample of one step earned."""
        self._append(GROUPS_FILE, records)

    def group_pictures(self, record: GroupRecord, samples: list[GallerySample]) -> None:
        """All samples of one group."""
        path = picture_path(self.run_dir, record.step, record.group)
        save_grid(samples, path, step=record.step, stage=record.stage)

    def spans(self, spans: list[Span]) -> None:
        """Take over the spans gathered since the last call."""
        self._append(SPANS_FILE, spans)
        spans.clear()

    def update_spans(self, spans: Sequence[tuple[float, float]], step: int) -> None:
        """One span per learner rank."""
        found = [
            Span("update", f"learner-{rank}", started, started + seconds, step)
            for rank, (started, seconds) in enumerate(spans)
        ]
        self._append(SPANS_FILE, found)

    def timed(self, name: SpanName, step: int) -> AbstractContextManager[None]:
        """A span of the controller itself."""
        return timed(name, "controller", step, lambda span: self._append(SPANS_FILE, [span]))

    def evaluation(
        self,
        moment: str,
        scores: dict[str, TaskScores],
        change: Callable[[str, TaskScores], Difference | None],
        state: RunState,
        seconds: float,
    ) -> None:
        """Means with intervals of one evaluation, and the paired change since before the first stage."""
        values: dict[str, Any] = {"time/evaluate": seconds}
        for task, result in scores.items():
            estimate = bootstrap_mean(result.rewards)
            values |= {
                f"evaluation/{task}/mean": estimate.mean,
                f"evaluation/{task}/low": estimate.low,
                f"evaluation/{task}/high": estimate.high,
                f"evaluation/{task}/num_prompts": estimate.n,
                f"evaluation/{task}/missing_share": estimate.missing / len(result.rewards),
            }
            difference = change(task, result)
            if difference is not None:
                values[f"evaluation/{task}/difference"] = difference.mean
            for name, column in result.components.items():
                component = name.replace("/", ".")
                values[f"evaluation/{task}/component/{component}"] = bootstrap_mean(column, resamples=1).mean
        stage = state.stages[-1] if state.stages else None
        self.metrics.log(
            values,
            step=state.step,
            stage=stage.name if stage else "before",
            stage_step=stage.steps if stage else 0,
        )

    def grid(self, task: str, stage: str, samples: list[GallerySample], step: int) -> None:
        """The fixed prompts' pictures at this step."""
        if samples:
            path = self.run_dir / "samples" / task / f"step_{step:06d}.png"
            save_grid(samples, path, step=step, stage=stage, log_image=self.metrics.log_image)

    def alarms(self, lines: Sequence[str]) -> None:
        """Alarms go to the log and to `alarms.txt`, where nobody can miss them among progress lines."""
        for line in lines:
            log.warning("ALARM: %s", line)
        if lines:
            path = self.run_dir / "alarms.txt"
            earlier = path.read_text().splitlines() if path.is_file() else []
            merged = [*earlier, *(line for line in lines if line not in earlier)]
            atomic_write_text(path, "\n".join(merged) + "\n")

    def finish(self, summary: RunSummary) -> None:
        """Write the trace and the summary, and print the table where the run is finished."""
        atomic_write_json(self.run_dir / "trace.json", chrome_trace(read_spans(self.run_dir / SPANS_FILE)))
        write_summary(summary, self.run_dir)
        self.metrics.close()
        if summary.finished:
            print_summary(summary, self.run_dir)

    def _append(self, name: str, records: Sequence[Span] | Sequence[GroupRecord]) -> None:
        append_records(self.run_dir / name, (asdict(record) for record in records))


def step_line(values: Mapping[str, Any], where: str, left_s: float) -> str:
    """What a step came to, for people; what was not measured is left out."""
    clipped = [values.get(f"policy/clip_fraction_{side}") for side in ("low", "high")]
    figures = {
        "reward {:.4f}": values.get("reward/mean"),
        "KL {:.2g}": values.get("policy/kl"),
        "clipped {:.0%}": None if None in clipped else sum(c for c in clipped if c is not None),
        "gradient {:.2g}": values.get("optimizer/grad_norm"),
        "not scored {:.0%}": values.get("reward/missing_share") or None,
        "{:.3g} images/s": values.get("throughput/images_per_second"),
        "{:.1f} s": values["time/step"],
    }
    found = [form.format(value) for form, value in figures.items() if value is not None]
    if values.get("reward/mean") is None:
        found.insert(0, "nothing scored")
    return f"{where}: {', '.join(found)}, {duration(left_s)} left"
