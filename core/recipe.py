"""Reads a recipe into dataclasses: keys, types and missing values, every problem at once. Needs neither torch nor ray.

One default per key, in the schema. A recipe may stand on another one beside it (`base: other.yaml`).
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import recipes

R = TypeVar("R")


class ConfigError(ValueError):
    """A recipe cannot be used; `problems` holds one line for each thing to mend."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(f"- {problem}" for problem in problems))
        self.problems = problems


def read_recipe(
    path: str | Path, overrides: Sequence[str], schema: type[R], *, others: Collection[str] = ()
) -> R:
    """The recipe in `path` with its `key.sub=value` overrides, as `schema`; `others`: sections of other readers.

    Raises ConfigError with every unknown key (and the nearest known one), wrong type and missing value.
    """
    file = recipes.resolve(path)
    if not file.is_file():
        raise ConfigError([f"recipe {path} does not exist (looked for {file.absolute()})"])
    try:
        given = read_over_bases(file)
        if isinstance(given, DictConfig):
            apply_overrides(given, overrides)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError([f"{path}: {' '.join(str(error).split())}"]) from error
    if not isinstance(given, DictConfig):
        raise ConfigError([f"{path}: a recipe is a mapping of keys, found a {type(given).__name__}"])
    if "oc.env" in OmegaConf.to_yaml(given):
        raise ConfigError([f"{path}: a recipe must not read the environment (${{oc.env:...}})"])
    for section in others:
        given.pop(section, None)
    problems = node_problems(OmegaConf.to_container(given, resolve=True), schema, "")
    if problems:
        raise ConfigError(problems)
    recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
    assert isinstance(recipe, schema)
    return recipe


def read_over_bases(path: Path, above: tuple[Path, ...] = ()) -> DictConfig | ListConfig:
    """The recipe in `path` merged over its `base`, if it names one; `above`: the recipes that led here."""
    node = OmegaConf.load(path)
    if not isinstance(node, DictConfig) or "base" not in node:
        return node
    base = (path.parent / str(node.pop("base"))).resolve()
    if base in (*above, path.resolve()):
        raise ConfigError([f"{path}: base leads back to {base}; a recipe cannot stand on itself"])
    if not base.is_file():
        raise ConfigError(
            [f"{path}: base {base} does not exist; name a recipe relative to this one's folder"]
        )
    merged = OmegaConf.merge(read_over_bases(base, (*above, path.resolve())), node)
    assert isinstance(merged, DictConfig | ListConfig)
    return merged


def apply_overrides(config: DictConfig, overrides: Sequence[str]) -> None:
    """Change keys of `config` in place. Raises ConfigError for every override that is none."""
    problems = []
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator or not key:
            problems.append(f"override {item!r}: write it as key=value, for example learner.kl_beta=0.01")
            continue
        try:
            # The recipe's own YAML reader: PyYAML's takes 3e-4 for a string.
            OmegaConf.update(config, key, OmegaConf.from_dotlist([f"value={value}"])._get_node("value"))
        except Exception as error:
            problems.append(f"override {item!r}: {str(error).splitlines()[0]}")
    if problems:
        raise ConfigError(problems)


def node_problems(node: Any, schema: type, prefix: str) -> list[str]:
    """Unknown keys with the nearest known one, missing values and wrong types, below one mapping."""
    definitions = {f.name: f for f in dataclasses.fields(schema)}
    if not isinstance(node, dict):
        return [f"key '{prefix.rstrip('.')}' must be a mapping with keys {', '.join(definitions)}"]
    problems = []
    for key in node:
        if key not in definitions:
            near = difflib.get_close_matches(str(key), definitions, n=1, cutoff=0.5)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"known here: {', '.join(definitions)}"
            problems.append(f"unknown key '{prefix}{key}': {hint}")
    hints = typing.get_type_hints(schema)
    for key, definition in definitions.items():
        value, hint = node.get(key, MISSING), hints[key]
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint
        if value == MISSING and definition.default == MISSING:
            problems.append(f"key '{prefix}{key}' has no value; set it in the recipe or as {prefix}{key}=...")
        elif dataclasses.is_dataclass(hint):
            problems += node_problems({} if value == MISSING else value, hint, f"{prefix}{key}.")  # type: ignore[arg-type]
        elif value == MISSING:
            continue
        elif dataclasses.is_dataclass(inner) and isinstance(value, list):
            for i, item in enumerate(value):
                problems += node_problems(item, inner, f"{prefix}{key}[{i}].")  # type: ignore[arg-type]
        else:
            problems += _value_problems(schema, key, value, prefix)
    return problems


def value_of(recipe: Any, key: str) -> Any:
    """The value at `section.key`."""
    for part in key.split("."):
        recipe = getattr(recipe, part)
    return recipe


def range_problems(
    recipe: Any,
    *,
    choices: Mapping[str, Sequence[Any]],
    at_least: Mapping[str, float],
    above_zero: Sequence[str],
) -> list[str]:
    """Every `section.key` whose value is out of its range, one sentence each."""
    problems = [
        f"{key}={value!r} is not one of {', '.join(map(str, known))}"
        for key, known in choices.items()
        if (value := value_of(recipe, key)) not in known
    ]
    problems += [
        f"{key}={value} must be at least {least}"
        for key, least in at_least.items()
        if (value := value_of(recipe, key)) < least
    ]
    return problems + [
        f"{key}={value} must be above 0" for key in above_zero if (value := value_of(recipe, key)) <= 0
    ]


def flat(recipe: Any) -> dict[str, Any]:
    """`section.key` -> value of a dataclass, for comparing two recipes."""

    def walk(node: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(node, dict):
            return {prefix: list(node) if isinstance(node, tuple) else node}
        found: dict[str, Any] = {}
        for key, child in node.items():
            found |= walk(child, f"{prefix}.{key}" if prefix else key)
        return found

    return walk(dataclasses.asdict(recipe), "")


def to_yaml(recipe: Any) -> str:
    """A resolved recipe; it holds no secrets, since recipes read none."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def _value_problems(schema: type, key: str, value: Any, prefix: str) -> list[str]:
    try:
        OmegaConf.update(OmegaConf.structured(schema), key, value, merge=False)
    except OmegaConfBaseException as error:
        return [f"key '{prefix}{key}': {str(error).splitlines()[0]}"]
    return []
