"""A training run as seen from the driver: advance, log, draw, save, export. The ranks do the work.

run_dir/recipe.yaml            the resolved recipe
run_dir/data.txt               what the sources hold, and what was left out
run_dir/metrics.jsonl, tensorboard/
run_dir/samples/step_*.png     grids by the averaged weights
run_dir/checkpoints/step_*     exact state, newest `keep_checkpoints`
run_dir/model/                 the averaged weights at the end, in the released layout
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from core.cluster.ranks import Ranks
from core.files import atomic_write_text, publish_folder
from core.training.run import Due, RunState, SupervisedRun
from pretrain.flow.config import FlowRecipe
from pretrain.flow.metrics import StepFigures, window_record

log = logging.getLogger(__name__)
MODEL, SAMPLES = "model", "samples"

# Keys that may differ between a run and its continuation: they leave what is learned alone. The number of ranks is
# not among them, since DeepSpeed's files are cut by it.
FREE = (
    "output_dir", "stop_step", "log_every", "save_every", "keep_checkpoints", "samples.", "export_dtype",
    "data.workers", "data.prefetch", "data.wait_s", "data.index_workers", "data.cache.device", "data.cache.batch_size",
    "resources.device", "resources.card", "resources.rank_cpus", "resources.threads", "resources.placement_timeout_s",
    "resources.start_timeout_s", "resources.collective_timeout_s", "resources.call_timeout_s",
    "resources.stop_timeout_s",
)  # fmt: skip


class FlowRun(SupervisedRun):
    """A record of metrics.jsonl holds the means of a window of `log_every` steps."""

    recipe: FlowRecipe

    def __init__(self, recipe: FlowRecipe, ranks: Ranks, state: RunState, *, fresh: bool):
        super().__init__(recipe, ranks, state, end=recipe.end, log_every=recipe.log_every, fresh=fresh)
        lines = ranks.call("data_lines")
        atomic_write_text(self.folder / "data.txt", "\n".join(lines[0]) + "\n")
        self._window: list[list[StepFigures]] = [[] for _ in lines]
        self._seconds = 0.0

    def due(self) -> list[Due]:
        recipe = self.recipe
        return [
            (recipe.samples.every, self._draw),
            (recipe.save_every, self.checkpoint),
        ]

    def checkpoint(self) -> None:
        self.save(keep=self.recipe.keep_checkpoints)

    def record(self, figures: list[list[StepFigures]], seconds: float) -> None:
        for window, steps in zip(self._window, figures, strict=True):
            window += steps
        self._seconds += seconds
        step = self.state.step
        if step % self.log_every == 0 or step == self.end:
            record = window_record(self._window, self._seconds, card=self.recipe.resources.card)
            self.scalars.write([record])
            rate = record["throughput/images_per_second"]
            log.info("step %d: loss %.4f, %.1f images/s", step, record["loss"], rate)
            self._seconds = 0.0
            for window in self._window:
                window.clear()

    def _draw(self) -> None:
        folder = self.folder / SAMPLES
        for name in self.ranks.call("previews", str(folder))[0]:
            picture = np.asarray(Image.open(folder / name).convert("RGB"))
            self.scalars.image(f"samples/{Path(name).stem.split('_')[-1]}", picture, step=self.state.step)

    def finish(self) -> None:
        """Export, also where the checkpoint was that of the last step."""
        temporary = self.folder / f".{MODEL}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        self.ranks.call("export", str(temporary))
        publish_folder(temporary, self.folder / MODEL)
        log.info("exported step %d to %s", self.state.step, self.folder / MODEL)
