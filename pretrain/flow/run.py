"""A training run as seen from the driver: advance, log, draw, save, export. The ranks do the work.

run_dir/recipe.yaml            the resolved recipe
run_dir/data.txt               what the sources hold, and what was left out
run_dir/metrics.jsonl, tensorboard/
run_dir/samples/step_*.png     grids by the averaged weights
run_dir/checkpoints/step_*     exact state, newest `keep_checkpoints`
run_dir/model/                 the averaged weights at the end, in the released layout
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path

import numpy as np
from PIL import Image

from core.checkpoints import CHECKPOINTS, check_same_keys, find_step, next_multiple, publish_step
from core.cluster.ranks import RankLost, Ranks
from core.files import atomic_write_json, atomic_write_text, publish_folder
from core.progress import Progress
from core.recipe import flat, to_yaml
from core.scalars import ScalarLog
from pretrain.flow.config import FlowRecipe
from pretrain.flow.metrics import window_record
from pretrain.flow.rank import StepFigures
from pretrain.flow.validate import load_recipe

log = logging.getLogger(__name__)
RECIPE, STATE, MODEL, SAMPLES = "recipe.yaml", "state.json", "model", "samples"

# Keys that may differ between a run and its continuation: they leave what is learned alone. The number of ranks is
# not among them, since DeepSpeed's files are cut by it.
_FREE = (
    "output_dir", "stop_step", "log_every", "save_every", "keep_checkpoints", "samples.", "export_dtype",
    "data.workers", "data.prefetch", "data.wait_s", "data.index_workers", "data.cache.device", "data.cache.batch_size",
    "resources.device", "resources.card", "resources.rank_cpus", "resources.threads", "resources.placement_timeout_s",
    "resources.start_timeout_s", "resources.collective_timeout_s", "resources.call_timeout_s",
)  # fmt: skip


class FlowRun:
    """Runs ranks that are set up, from `step` on; a run that is not `fresh` drops its records after that step."""

    def __init__(self, recipe: FlowRecipe, ranks: Ranks, step: int, *, fresh: bool):
        self.recipe, self.ranks, self.step = recipe, ranks, step
        self.folder = recipe.run_dir
        seen = ranks.call("sees", str(self.folder))
        blind = [rank for rank, sees in enumerate(seen) if not sees]
        if blind:
            raise RankLost(
                f"ranks {blind} do not see {self.folder}: output_dir must lie on a file system that all nodes share"
            )
        self.scalars = ScalarLog(self.folder, resume_step=None if fresh else step)
        self._window: list[list[StepFigures]] = [[] for _ in seen]
        self._seconds = 0.0

    def run(self) -> int:
        """Train to the end of this run, which is saved, drawn and exported whatever the intervals. Returns its step."""
        recipe, every = self.recipe, self.recipe.samples.every
        atomic_write_text(self.folder / "data.txt", "\n".join(self.ranks.call("data_lines")[0]) + "\n")
        with Progress().phase("train", total=max(0, recipe.end - self.step), unit="step") as bar:
            while self.step < recipe.end:
                beats = [recipe.log_every, recipe.save_every, *([every] if every else [])]
                stop = min(recipe.end, *(next_multiple(self.step, n) for n in beats))
                done = stop - self.step
                self._advance(stop)
                bar.advance(done)
                last = stop == recipe.end
                if every and (stop % every == 0 or last):
                    self._draw()
                if stop % recipe.save_every == 0 or last:
                    self._save()
        self._export()
        self.scalars.close()
        return self.step

    def _advance(self, stop: int) -> None:
        """Train to `stop`; a record is written when a window of `log_every` steps is full, and at the end."""
        started = time.perf_counter()
        for window, figures in zip(self._window, self.ranks.call("advance", stop), strict=True):
            window += figures
        self._seconds += time.perf_counter() - started
        self.step = stop
        if stop % self.recipe.log_every == 0 or stop == self.recipe.end:
            record = window_record(self._window, self._seconds, card=self.recipe.resources.card)
            self.scalars.write([record])
            log.info(
                "step %d: loss %.4f, %.1f images/s",
                stop, record["loss"], record["throughput/images_per_second"],
            )  # fmt: skip
            self._seconds = 0.0
            for window in self._window:
                window.clear()

    def _draw(self) -> None:
        folder = self.folder / SAMPLES
        for name in self.ranks.call("previews", str(folder))[0]:
            picture = np.asarray(Image.open(folder / name).convert("RGB"))
            self.scalars.image(f"samples/{Path(name).stem.split('_')[-1]}", picture, step=self.step)

    def _save(self) -> None:
        def fill(folder: Path) -> None:
            self.ranks.call("save", str(folder))
            atomic_write_text(folder / RECIPE, to_yaml(self.recipe))
            atomic_write_json(folder / STATE, {"step": self.step})

        publish_step(self.folder / CHECKPOINTS, self.step, fill, keep=self.recipe.keep_checkpoints)

    def _export(self) -> None:
        temporary = self.folder / f".{MODEL}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        self.ranks.call("export", str(temporary))
        publish_folder(temporary, self.folder / MODEL)
        log.info("exported step %d to %s", self.step, self.folder / MODEL)


def find_checkpoint(recipe: FlowRecipe, resume: str | None) -> Path | None:
    """The folder to continue from; see `find_step`. Raises ConfigError where another recipe wrote it."""

    def check(folder: Path) -> None:
        saved = load_recipe(folder / RECIPE)
        check_same_keys(flat(saved), flat(recipe), free=_FREE, when=folder.name)

    return find_step(recipe.run_dir, resume, check)


def read_step(checkpoint: Path) -> int:
    """The step at which a checkpoint stands."""
    return int(json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["step"])
