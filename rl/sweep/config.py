"""What a grid file may say, the runs that its rows need, and the recipe that each of them comes to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import MinLen
from omegaconf import MISSING, DictConfig, OmegaConf

import recipes
from core.keys import Count, FolderName, Positive, Seed
from core.recipe import ConfigError, read_recipe, to_yaml, value_problems
from rl.recipe.schema import load_config

_VALUE = "values."


@dataclass
class SweepRow:
    """One row of the table: a changed recipe, the untrained model, or what another row's run was half-way."""

    name: str = MISSING
    """What the row is called; its runs are `NAME-seedK`."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Keys of the recipe with this row's values; lists are replaced whole."""
    untrained: bool = False
    """Nothing but the model before any training."""
    of: str | None = None
    """The row whose run this one is read from, which costs no run of its own."""
    moment: str | None = None
    """Of that run: `after_<stage>`."""

    @property
    def trains(self) -> bool:
        """Whether the row has runs of its own."""
        return not self.untrained and self.of is None


@dataclass
class SweepFile:
    """A grid file."""

    name: FolderName = MISSING
    """What the grid, and its folder in `output_dir`, is called."""
    recipe: str = MISSING
    """The recipe that rows change, relative to the grid's own folder."""
    output_dir: str = "runs"
    """Folder of grids."""
    seeds: Annotated[list[Seed], MinLen(1)] = field(default_factory=lambda: [0, 1, 2])
    """A run of each row for each."""
    timeout_s: Positive = 7 * 86400.0
    """Time limit of one run, in seconds."""
    parallel: Count = 1
    """Runs under way at once."""
    values: dict[str, Any] = field(default_factory=dict)
    """What the rest of the file may name as `${values.NAME}`, to be set on the command line."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Keys of the recipe with their values in every row."""
    rows: list[SweepRow] = field(default_factory=list)


@dataclass(frozen=True)
class SweepConfig:
    """A grid ready to run. `rows` are those of the table, `trained` those whose runs they need; `overrides` are
    key=value strings for the recipe of every row.
    """

    name: str
    recipe: Path
    folder: Path
    seeds: tuple[int, ...]
    timeout_s: float
    parallel: int
    changes: dict[str, Any]
    rows: tuple[SweepRow, ...]
    trained: tuple[SweepRow, ...]
    overrides: tuple[str, ...] = ()

    def run_folder(self, row: SweepRow, seed: int) -> Path:
        """Where the run is from which a row is read."""
        return self.folder / run_name(row.of or row.name, seed)


def run_name(row: str, seed: int) -> str:
    """`GenEval only`, 2 -> `geneval-only-seed2`."""
    return f"{re.sub(r'[^a-z0-9]+', '-', row.lower()).strip('-')}-seed{seed}"


def load_sweep(
    grid: str | Path,
    overrides: list[str],
    *,
    only: list[str] | None = None,
    seeds: list[int] | None = None,
    parallel: int | None = None,
    output_dir: str | None = None,
) -> SweepConfig:
    """Read a grid. `overrides` that begin with `values.` set a value of the grid, all others a key of every recipe.

    only, seeds, parallel, output_dir: in place of the grid's own.

    Raises ConfigError with what is wrong with it.
    """
    path = recipes.resolve(grid)
    values = [item for item in overrides if item.startswith(_VALUE)]
    found = read_recipe(path, values, SweepFile, defer_values=True)
    given = {"seeds": seeds or None, "parallel": parallel, "output_dir": output_dir}
    found = replace(found, **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
    problems = [*_unknown_values(path, values), *value_problems(found), *_row_problems(found, only or [])]
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    rows = tuple(row for row in found.rows if only is None or row.name in only)
    needed = {row.of or row.name for row in rows}
    if only is None or all(row.untrained for row in rows):
        needed |= {row.name for row in found.rows}
    return SweepConfig(
        found.name,
        (path.parent / found.recipe).resolve(),
        Path(found.output_dir).expanduser().absolute() / found.name,
        tuple(found.seeds),
        found.timeout_s,
        found.parallel,
        found.changes,
        rows,
        tuple(row for row in found.rows if row.trains and row.name in needed),
        tuple(item for item in overrides if item not in values),
    )


def _unknown_values(path: Path, given: list[str]) -> Iterator[str]:
    file = OmegaConf.load(path)
    known = sorted(map(str, (file.get("values") or {}) if isinstance(file, DictConfig) else {}))
    for item in given:
        name = item.removeprefix(_VALUE).partition("=")[0]
        if name not in known:
            yield f"override {item!r}: no value is named {name!r}; values are {known}"


def _row_problems(found: SweepFile, only: list[str]) -> Iterator[str]:
    names = [row.name for row in found.rows]
    trained = {row.name: row for row in found.rows if row.trains}
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield f"row {name!r} is there twice"
    runs = [run_name(name, 0) for name in trained]
    for name in trained:
        if runs.count(run_name(name, 0)) > 1 and names.count(name) == 1:
            yield f"row {name!r} shares its folder {run_name(name, 0)} with another; give it a name of its own"
    for name in only:
        if name not in names:
            yield f"no row is named {name!r}; rows are {names}"
    if not trained:
        yield "rows is empty; name at least one that trains"
    for row in found.rows:
        if (row.of is None) != (row.moment is None):
            yield f"row {row.name!r}: of and moment belong together; give both or neither"
        elif row.of is not None and row.of not in trained:
            yield f"row {row.name!r}: of={row.of!r} is no row that trains; those are {sorted(trained)}"
        if row.changes and not row.trains:
            yield f"row {row.name!r} has no run of its own, so its changes change nothing; take them out"
        if row.untrained and row.of is not None:
            yield f"row {row.name!r} is untrained, and so of no run; take out one of the two"


def row_recipe(grid: SweepConfig, row: SweepRow, name: str, seed: int) -> str:
    """The resolved recipe of a row and a seed as YAML.

    Raises ConfigError as `load_config` does, and for rows that are read from a moment which this run does not have.
    """
    overlay = OmegaConf.merge({"base": str(grid.recipe)}, grid.changes, row.changes)
    written = grid.folder / f"{name}.overlay.yaml"
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(OmegaConf.to_yaml(overlay), encoding="utf-8")
    try:
        config = load_config(
            written, [*grid.overrides, f"name={name}", f"output_dir={grid.folder}", f"seed={seed}"]
        )
    finally:
        written.unlink()
    moments = [f"after_{stage.name}" for stage in config.stages]
    problems = [
        f"row {reader.name!r} reads the moment {reader.moment!r}; this run has {', '.join(moments)}"
        for reader in grid.rows
        if reader.of == row.name and reader.moment not in moments
    ]
    if problems:
        raise ConfigError(problems)
    return to_yaml(config)
