"""What a grid file may say, and the recipe that each of its rows comes to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import recipes
from rl.config import ConfigError, load_config, to_yaml


@dataclass
class SweepRow:
    """One row of the table: `changes` to the recipe, or nothing but the `untrained` model."""

    name: str = "???"
    changes: dict[str, Any] = field(default_factory=dict)
    untrained: bool = False


@dataclass
class SweepFile:
    """A grid file. `timeout_s` limits one run."""

    name: str = "???"
    recipe: str = "???"
    output_dir: str = "runs"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    timeout_s: float = 7 * 86400.0
    rows: list[SweepRow] = field(default_factory=list)


@dataclass(frozen=True)
class SweepConfig:
    """A grid ready to run. `overrides` are key=value strings for the recipe of every row."""

    name: str
    recipe: Path
    folder: Path
    seeds: tuple[int, ...]
    timeout_s: float
    rows: tuple[SweepRow, ...]
    overrides: tuple[str, ...] = ()


def load_sweep(
    grid: str | Path,
    overrides: list[str],
    *,
    only: list[str] | None = None,
    seeds: list[int] | None = None,
) -> SweepConfig:
    """Read a grid. Raises ConfigError with what is wrong with it."""
    path = recipes.resolve(grid)
    if not path.is_file():
        raise ConfigError([f"grid {grid} does not exist (looked for {path.absolute()})"])
    try:
        node = OmegaConf.merge(OmegaConf.structured(SweepFile), OmegaConf.load(path))
        found = OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise ConfigError([f"{path}: {str(error).splitlines()[0]}"]) from error
    assert isinstance(found, SweepFile)
    given = tuple(seeds if seeds else found.seeds)
    names = [row.name for row in found.rows]
    problems = [
        f"{path}: row {name!r} is there twice" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    problems += [
        f"{path}: no row is named {name!r}; rows are {names}" for name in only or [] if name not in names
    ]
    problems += [f"{path}: rows is empty; name at least one that trains"] * all(
        r.untrained for r in found.rows
    )
    problems += [f"{path}: seeds is empty; give at least one"] * (not given)
    if problems:
        raise ConfigError(problems)
    return SweepConfig(
        found.name,
        (path.parent / found.recipe).resolve(),
        Path(found.output_dir).expanduser().absolute() / found.name,
        given,
        found.timeout_s,
        tuple(row for row in found.rows if only is None or row.name in only),
        tuple(overrides),
    )


def row_recipe(grid: SweepConfig, row: SweepRow, name: str, seed: int) -> str:
    """The resolved recipe of a row and a seed as YAML. Raises ConfigError as `load_config` does."""
    overlay = OmegaConf.create({"base": str(grid.recipe), **row.changes})
    assert isinstance(overlay, DictConfig)
    written = grid.folder / f"{name}.overlay.yaml"
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(OmegaConf.to_yaml(overlay), encoding="utf-8")
    try:
        config = load_config(
            written, [*grid.overrides, f"name={name}", f"output_dir={grid.folder}", f"seed={seed}"]
        )
    finally:
        written.unlink()
    return to_yaml(config)
