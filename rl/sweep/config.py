"""What a grid file may say, the runs that its rows need, and the recipe that each of them comes to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import recipes
from core.recipe import ConfigError, read_recipe, to_yaml
from rl.recipe.schema import load_config

_VALUE = "values."


@dataclass
class SweepRow:
    """One row of the table: `changes` to the recipe, nothing but the `untrained` model, or what another row's run was
    at a `moment` (`after_<stage>`), which costs no run of its own.
    """

    name: str = "???"
    changes: dict[str, Any] = field(default_factory=dict)
    untrained: bool = False
    of: str | None = None
    moment: str | None = None

    @property
    def trains(self) -> bool:
        """Whether the row has runs of its own."""
        return not self.untrained and self.of is None


@dataclass
class SweepFile:
    """A grid file. `timeout_s` limits one run, `parallel` says how many are under way at once, `changes` hold for
    every row, and `values` are what the rest of the file may name as `${values.NAME}`, to be set on the command line.
    """

    name: str = "???"
    recipe: str = "???"
    output_dir: str = "runs"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    timeout_s: float = 7 * 86400.0
    parallel: int = 1
    values: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
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
    found = read_recipe(path, values, SweepFile)
    given = {"seeds": seeds or None, "parallel": parallel, "output_dir": output_dir}
    found = replace(found, **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
    problems = [*_unknown_values(path, values), *_row_problems(found, only or [])]
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
    if not found.seeds:
        yield "seeds is empty; give at least one"
    if found.parallel < 1:
        yield f"parallel={found.parallel} must be at least 1"
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
