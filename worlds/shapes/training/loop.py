"""What a stage of training offers, and the loop that all stages share: step, average, log, save, resume."""

import copy
import dataclasses
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from core.checkpoints import CHECKPOINTS, find_step, later_steps, set_aside
from core.files import atomic_file, atomic_write_json
from core.recipe import ConfigError
from core.records import append_records, keep_up_to
from core.run_status import RunWatch, watch_run
from core.training.ema import MovingAverage
from core.training.optimization import build_optimizers, trained_parameters
from core.training.schedule import lr_factor
from worlds.shapes.training.checkpoint import load_checkpoint, save_checkpoint
from worlds.shapes.training.config import Recipe

log = logging.getLogger(__name__)
T = TypeVar("T")

# Keys that may differ between a run and its resumption: they leave the numbers alone.
_FREE_KEYS = set(
    ["output_dir", "stop_step", "threads", "log_every", "sample_every", "save_every", "keep_checkpoints"]
)


@dataclass(frozen=True)
class StageLoss:
    """Loss of one batch, and named figures of it for the log."""

    loss: Tensor
    figures: dict[str, float] = field(default_factory=dict)


class Stage:
    """One kind of training. Data must be a function of (seed, step) alone.

    `modules`: what is trained, in a fixed order, which average and optimizers follow.
    """

    modules: list[nn.Module]

    def loss(self, step: int) -> StageLoss:
        """Of the batch of a step."""
        raise NotImplementedError

    def sample_grid(self) -> Image.Image | None:
        """A picture that shows how far the modules are; None where there is nothing to see."""
        return None

    def export(self, folder: Path) -> dict[str, float]:
        """Write the parts this stage owns in the released layout; returns figures measured on the way."""
        raise NotImplementedError


def save_rounded(model: Any, folder: Path, dtype: str) -> float:
    """Write a copy of a model in a dtype; returns its number of parameters."""
    rounded = copy.deepcopy(model).to(getattr(torch, dtype))
    rounded.save_pretrained(folder)
    return float(sum(p.numel() for p in rounded.parameters()))


@dataclass(frozen=True)
class Look:
    """What an end rule saw, by name for the metrics, and whether the run ends with it."""

    figures: dict[str, float]
    reached: bool


class EndRule(Protocol):
    """Looks at the averaged weights every so many steps, and may end a run before its last one.

    What it sets of its stage must follow from the weights alone: a resumed run looks again.
    """

    every: int

    def look(self) -> Look: ...


class TrainingLoop:
    """Runs `stage` to `recipe.stop_step` or `recipe.steps`, or to where `end_rule` ends it, under `recipe.output_dir`.

    Writes metrics.jsonl, samples/step-*.png, checkpoints/step-*, and model/ (averaged weights, released layout).
    """

    def __init__(self, stage: Stage, recipe: Recipe, end_rule: EndRule | None = None) -> None:
        self.stage = stage
        self.recipe = recipe
        self.end_rule = end_rule
        self.folder = Path(recipe.output_dir)
        self.step = 0
        self.optimizers = build_optimizers(stage.modules, recipe.optimization)
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.average = MovingAverage(self._trained(), decay=recipe.optimization.ema_decay, ramp=True)
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])

    def resume(self, path: str | None) -> None:
        """Continue from a checkpoint folder, or with `auto` from the newest one if there is any.

        Raises:
            ConfigError: the checkpoint was made by a recipe that would give other numbers, none can be used, or (None)
                `output_dir` holds a run that is not to be continued.
        """
        found = find_step(self.folder, path, self._check_recipe)
        if found is None:
            return
        state, _ = load_checkpoint(found)
        set_aside(self.folder, later_steps(self.folder / CHECKPOINTS, state["step"]))
        for module, weights in zip(self.stage.modules, state["modules"], strict=True):
            module.load_state_dict(weights)
        for optimizer, moments in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(moments)
        stored = dict(zip(self.average.average, state["average"], strict=True))
        self.average.load(stored, state["average_updates"])
        self.step = state["step"]
        keep_up_to(self.folder / "metrics.jsonl", self.step)
        log.info("resumed %s at step %d", found, self.step)

    def _check_recipe(self, folder: Path) -> None:
        made_by = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
        now = json.loads(json.dumps(dataclasses.asdict(self.recipe)))
        changed = sorted(k for k in {*made_by, *now} - _FREE_KEYS if made_by.get(k) != now.get(k))
        if changed:
            raise ConfigError(
                [f"{folder} was made with other values of {', '.join(changed)}: restore them to resume"]
            )

    def run(self) -> None:
        """Train to the last step of this run, then export the averaged weights to `output_dir/model`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with watch_run(self.folder, resume=True) as watch:
            with watch.stop.protected():
                self._train(watch)
            self.export(self.folder / "model")

    def _train(self, watch: RunWatch) -> None:
        """The steps that are left. A run that is asked to stop ends with a checkpoint where its log has a line."""
        recipe, started = self.recipe, time.perf_counter()
        end = recipe.stop_step or recipe.steps
        bar = tqdm(total=end, initial=self.step, desc=recipe.stage, mininterval=2)
        reached = self.step > 0 and self._good_enough()
        last = reached or self.step >= end
        self._sums.clear()  # a resumed run looked again at a step whose line is written
        while not last:
            figures = self._train_step()
            for name, value in figures.items():
                entry = self._sums[name]
                entry[0] += value
                entry[1] += 1
            self.step += 1
            bar.update()
            reached = self._good_enough()
            last = reached or self.step == end
            if self.step % recipe.log_every == 0 or last:
                self._write_metrics(time.perf_counter() - started)
                started = time.perf_counter()
            if recipe.sample_every and (self.step % recipe.sample_every == 0 or last):
                self._write_samples()
            stops = watch.stopping and self.step % recipe.log_every == 0 and not last
            if self.step % recipe.save_every == 0 or last or stops:
                self.save()
                watch.at(self.step, recipe.stage)
            if stops:
                return
        bar.close()
        if self.end_rule is not None and not reached:
            log.warning("step %d is the last of this run, and its targets were not reached", self.step)

    def export(self, folder: Path) -> None:
        """Write the averaged weights in the released layout, and what was measured of them."""
        figures = self._with_average(lambda: self.stage.export(folder))
        log.info("exported step %d to %s: %s", self.step, folder, figures)
        atomic_write_json(self.folder / "export.json", {"step": self.step, **figures})

    def save(self) -> None:
        state = {
            "step": self.step,
            "modules": [module.state_dict() for module in self.stage.modules],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": list(self.average.average.values()),
            "average_updates": self.average.updates,
        }
        made_by = dataclasses.asdict(self.recipe)
        save_checkpoint(
            self.folder / CHECKPOINTS, self.step, state, made_by, keep=self.recipe.keep_checkpoints
        )

    def _train_step(self) -> dict[str, float]:
        settings = self.recipe.optimization
        factor = lr_factor(self.step, self.recipe.steps, settings)
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            optimizer.zero_grad(set_to_none=True)
        result = self.stage.loss(self.step)
        if not torch.isfinite(result.loss):
            raise FloatingPointError(
                f"loss is {result.loss.item()} at step {self.step}: lower optimization.lr or muon_lr"
            )
        result.loss.backward()
        norm = nn.utils.clip_grad_norm_(list(self._trained().values()), settings.gradient_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.average.step(self._trained())
        return {"loss": result.loss.item(), "gradient_norm": norm.item(), **result.figures}

    def _good_enough(self) -> bool:
        """Whether the end rule's mark is reached, at the steps at which it looks; what it saw goes to the metrics."""
        rule = self.end_rule
        if rule is None or self.step % rule.every:
            return False
        look = self._with_average(rule.look)
        seen = ", ".join(f"{name} {value:.3f}" for name, value in look.figures.items())
        log.info("step %d: %s%s", self.step, seen, "; the run ends here" if look.reached else "")
        self._sums.update({name: [value, 1] for name, value in look.figures.items()})
        return look.reached

    def _write_metrics(self, seconds: float) -> None:
        count = self._sums["loss"][1]
        line: dict[str, Any] = {name: total / n for name, (total, n) in sorted(self._sums.items())}
        line["lr_factor"] = lr_factor(self.step - 1, self.recipe.steps, self.recipe.optimization)
        line["samples_per_second"] = count * self.recipe.batch_size / seconds
        self._sums.clear()
        rounded = {name: round(value, 6) for name, value in line.items()}
        append_records(self.folder / "metrics.jsonl", [{"step": self.step, **rounded}])

    def _write_samples(self) -> None:
        grid = self._with_average(self.stage.sample_grid)
        if grid is None:
            return
        path = self.folder / "samples" / f"step-{self.step:06d}.png"
        with atomic_file(path) as file:
            grid.save(file, "PNG")

    def _with_average(self, action: Callable[[], T]) -> T:
        """Run `action` on the averaged weights in eval mode."""
        with self.average.in_place_of(self._trained()), torch.no_grad():
            for module in self.stage.modules:
                module.eval()
            try:
                return action()
            finally:
                for module in self.stage.modules:
                    module.train()

    def _trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by module number and name."""
        return {f"{i}.{n}": p for i, m in enumerate(self.stage.modules) for n, p in trained_parameters(m)}
