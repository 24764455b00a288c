"""A supervised training run as seen from the driver: advance, log, then whatever is due. The ranks do the work.

run_dir/recipe.yaml                   the resolved recipe
run_dir/inputs.json                   what it reads beside it, by content, and what of that changed at a resume
run_dir/metrics.jsonl, tensorboard/   see `core/scalars.py`
run_dir/checkpoints/step_*            exact state, the newest few
run_dir/status.json                   see `core/run_status.py`
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from core.checkpoints import (
    BEST,
    CHECKPOINTS,
    check_same_keys,
    find_step,
    later_steps,
    next_multiple,
    publish_step,
    set_aside,
)
from core.cluster.ranks import MakeRank, RankResources, Ranks, RanksBlind, start_ranks
from core.files import atomic_write_json, atomic_write_text
from core.inputs import Inputs, compare_inputs, software
from core.progress import Progress
from core.recipe import flat, to_yaml
from core.run_lock import check_held
from core.run_status import RunWatch, watch_run
from core.scalars import ScalarLog

log = logging.getLogger(__name__)
RECIPE, STATE, INPUTS = "recipe.yaml", "state.json", "inputs.json"


class RunRecipe(Protocol):
    """What every training recipe has: its name, and the folder that the run writes."""

    name: str

    @property
    def run_dir(self) -> Path: ...


@dataclass(frozen=True)
class RunState:
    """Where a run stands: optimizer steps done. What a training adds to it is saved with every checkpoint."""

    step: int = 0


@dataclass(frozen=True)
class Reading:
    """What a run reads beside its recipe, and a line for each of that which was another at a resume."""

    inputs: Inputs = field(default_factory=Inputs)
    changes: tuple[str, ...] = ()


R = TypeVar("R", bound=RunRecipe)
S = TypeVar("S", bound=RunState)
Due = tuple[int, Callable[[], None]]
"""Steps between two calls (0: never), and what is called; at the last step of a run it is called in any case."""


class SupervisedRun(ABC):
    """Runs ranks that are set up, from `state` on; a run that is not `fresh` drops its records after that step."""

    def __init__(self, recipe: Any, ranks: Ranks, state: Any, *, end: int, log_every: int, fresh: bool):
        """`end`: the step at which this run stops. Raises RanksBlind for ranks that do not see the run's folder."""
        self.recipe, self.ranks, self.state = recipe, ranks, state
        self.end, self.log_every = end, log_every
        self._saved_step = state.step
        self.folder: Path = recipe.run_dir
        seen = ranks.call("sees", str(self.folder))
        blind = [rank for rank, sees in enumerate(seen) if not sees]
        if blind:
            raise RanksBlind(
                f"ranks {blind} do not see {self.folder}: output_dir must lie on a file system that all nodes share"
            )
        self.scalars = ScalarLog(self.folder, resume_step=None if fresh else state.step)

    @abstractmethod
    def record(self, figures: list[list[Any]], seconds: float) -> None:
        """Take in the steps just done: the figures of each rank, and how long they took."""

    @abstractmethod
    def due(self) -> Sequence[Due]:
        """What is done between steps, in this order."""

    @abstractmethod
    def checkpoint(self) -> None:
        """Save the exact state of this step."""

    def run(self, watch: RunWatch) -> Any:
        """Train to the end of this run, where everything is due once more. Returns its state.

        Asked to stop, it ends with a checkpoint at the next step at which anything is due: records stay whole.
        """
        watch.at(self.state.step)
        actions = self.due()
        beats = [self.log_every, *(every for every, _ in actions if every)]
        with Progress().phase("train", total=max(0, self.end - self.state.step), unit="step") as bar:
            while (start := self.state.step) < self.end:
                stop = min(self.end, *(next_multiple(start, beat) for beat in beats))
                with watch.stop.protected():
                    started = time.perf_counter()
                    figures = self.ranks.call("advance", stop)
                    check_held(self.folder)
                    self.state = replace(self.state, step=stop)
                    self.record(figures, time.perf_counter() - started)
                    for every, action in actions:
                        if every and (stop % every == 0 or stop == self.end):
                            action()
                    watch.at(stop)
                    if watch.stopping and self._saved_step < stop:
                        self.checkpoint()
                bar.advance(stop - start)
        self.finish()
        self.scalars.close()
        return self.state

    def finish(self) -> None:  # noqa: B027 - most runs have nothing to add
        """What is done once, behind the last step."""

    def publish(
        self, kind: str, method: str, *, keep: int, more: Callable[[Path], None] | None = None
    ) -> None:
        """A folder `kind/step_*` with what `method` of the ranks writes, recipe, state, and what `more` writes."""

        def fill(folder: Path) -> None:
            self.ranks.call(method, str(folder))
            atomic_write_text(folder / RECIPE, to_yaml(self.recipe))
            atomic_write_json(folder / STATE, asdict(self.state))
            if (self.folder / INPUTS).is_file():
                shutil.copyfile(self.folder / INPUTS, folder / INPUTS)
            if more is not None:
                more(folder)

        publish_step(self.folder / kind, self.state.step, fill, keep=keep)

    def save(self, *, keep: int, more: Callable[[Path], None] | None = None) -> None:
        """The exact state of this step; see `find_checkpoint`."""
        self.publish(CHECKPOINTS, "save", keep=keep, more=more)
        self._saved_step = self.state.step


def find_checkpoint(
    recipe: R, resume: str | None, load: Callable[[Path], R], *, free: tuple[str, ...]
) -> Path | None:
    """The folder to continue from; see `find_step`. Keys that begin with `free` leave what is learned alone.

    Raises ConfigError where another recipe wrote it.
    """

    def check(folder: Path) -> None:
        check_same_keys(flat(load(folder / RECIPE)), flat(recipe), free=free, when=folder.name)

    return find_step(recipe.run_dir, resume, check)


def read_state(checkpoint: Path, kind: type[S]) -> S:
    """Where a checkpoint stands."""
    return kind(**json.loads((checkpoint / STATE).read_text(encoding="utf-8")))


def check_reading(checkpoint: Path | None, step: int, held: Mapping[str, str], *, accept: bool) -> Reading:
    """What a run reads now, held against what its checkpoint of `step` read. Raises ConfigError as `compare_inputs`."""
    inputs = Inputs(dict(held), software())
    if checkpoint is None:
        return Reading(inputs)
    known = checkpoint / INPUTS
    document = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
    lines = compare_inputs(Inputs.read(document), inputs, step=step, accept=accept)
    return Reading(inputs, (*document.get("changes", ()), *lines))


def train_on_ranks(
    recipe: RunRecipe,
    make_rank: MakeRank,
    count: int,
    resources: RankResources,
    make_run: Callable[[Ranks], SupervisedRun],
    *,
    checkpoint: Path | None,
    step: int,
    reading: Reading | None = None,
    roots: Mapping[str, str] | None = None,
) -> Any:
    """Write the recipe, start the ranks, bring them to the checkpoint, train to the end; returns the run's state.

    reading: kept in the run's folder and with every checkpoint. roots: folders of the recipe, by what names of
    `reading.inputs` begin with; ranks on other nodes must have the same bytes there.

    What an earlier course of the run saved behind the checkpoint is set aside first.
    """
    if checkpoint is not None:
        folders = [recipe.run_dir / CHECKPOINTS, recipe.run_dir / BEST]
        set_aside(recipe.run_dir, [path for folder in folders for path in later_steps(folder, step)])
    atomic_write_text(recipe.run_dir / RECIPE, to_yaml(recipe))
    if reading is not None:
        atomic_write_json(recipe.run_dir / INPUTS, asdict(reading))
    with watch_run(recipe.run_dir, resume=True, stop_timeout_s=resources.stop_timeout_s) as watch:
        ranks = start_ranks(make_rank, count, resources)
        try:
            if count > 1 and reading is not None:
                ranks.call("check_files", reading.inputs.held, dict(roots or {}))
            if checkpoint is not None:
                ranks.call("load", str(checkpoint), step)
                log.info("continuing from %s", checkpoint)
            return make_run(ranks).run(watch)
        finally:
            ranks.close()
