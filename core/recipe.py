"""Reads a recipe into dataclasses and names every problem at once. Needs neither torch nor ray.

    YAML over its bases, then overrides ──► defaults filled in, interpolations resolved (OmegaConf)
        ──► unknown keys, missing values, types, bounds (pydantic, `core/keys.py`) ──► rules that join keys

A schema is a dataclass whose annotations say what each value may be, with its one default and, below it, its meaning;
`MISSING` as a default means that a recipe must give the value. A recipe may stand on another one (`base: other.yaml`,
relative to its own folder); lists are replaced whole.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import typing
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from pydantic import ConfigDict, TypeAdapter, ValidationError

import recipes
from core.keys import allowed, expectation, split_annotated, split_optional

R = TypeVar("R")

_OF_RANGE = {
    "greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number", "literal_error",
    "value_error",
}  # fmt: skip
"""What pydantic calls a value of the right type that may not be."""

_ENVIRONMENT = re.compile(r"oc\.env|\$\{[\w.\s]*\$\{[^}]*\}[\w.\s]*:")
"""The resolver that reads it, also where its name is put together."""


class ConfigError(ValueError):
    """A recipe cannot be used; `problems` holds one line for each thing to mend."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(f"- {problem}" for problem in problems))
        self.problems = problems


def read_recipe(
    path: str | Path,
    overrides: Sequence[str],
    schema: type[R],
    *,
    others: Collection[str] | None = (),
    rules: Callable[[R], list[str]] | None = None,
    defer_values: bool = False,
) -> R:
    """The recipe in `path` with its `key.sub=value` overrides, as `schema`.

    others: sections that other readers read; None: whatever else the file holds. (A section whose schema says
        `open_ended = True` leaves all other keys alone.)
    rules: names what keys break together. Runs on values out of range too, which it must bear.
    defer_values: return a recipe that is readable but for values out of range and broken rules; whoever asks names
        them (`value_problems`) beside what else is wrong.

    Raises ConfigError with every unknown key (and the nearest known one), missing value, wrong type, value out of
    range and broken rule.
    """
    given = _read_file(path)
    others = [str(key) for key in given] if others is None else others
    _apply_overrides(given, overrides)
    _refuse_environment(path, given)
    recipe, reading = _read(given, schema, "", others)
    readable = not reading.problems
    problems = reading.problems + reading.out_of_range
    if recipe is not None and rules is not None:
        problems += rules(recipe)
    if problems and not (readable and defer_values):
        raise ConfigError(problems)
    assert isinstance(recipe, schema)
    return recipe


def read_overrides(overrides: Sequence[str], schema: type[R], where: str = "") -> R:
    """`key=value` over a schema's defaults. `where`: what stands before keys in messages. Raises ConfigError."""
    given = OmegaConf.create({})
    _apply_overrides(given, overrides)
    found, reading = _read(given, schema, where)
    if found is None or reading.problems + reading.out_of_range:
        raise ConfigError(reading.problems + reading.out_of_range)
    return found


def value_problems(recipe: Any, where: str = "") -> list[str]:
    """What is wrong with each value of a recipe by itself, also of one that was made in Python.

    where: what its keys are named by, for example `generate.`.
    """
    reading = _Reading()
    reading.section(recipe, type(recipe), where)
    return reading.problems + reading.out_of_range


def read_over_bases(path: Path) -> DictConfig | ListConfig:
    """The recipe in `path` merged over its `base`, if it names one, and that one's."""
    merged = OmegaConf.merge(*(node for _, node in _over_bases(path)))
    assert isinstance(merged, DictConfig | ListConfig)
    return merged


def recipe_chain(path: str | Path) -> list[tuple[Path, Any]]:
    """Each file that a recipe is made of with what it says itself, the lowest base first. Raises ConfigError."""
    _read_file(path)
    return [(file, OmegaConf.to_container(node)) for file, node in _over_bases(recipes.resolve(path))]


def _over_bases(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[Path, DictConfig | ListConfig]]:
    """The recipe in `path` behind its bases; `above`: the recipes that led here."""
    node = OmegaConf.load(path)
    if not isinstance(node, DictConfig) or "base" not in node:
        return [(path, node)]
    base = (path.parent / str(node.pop("base"))).resolve()
    if base in (*above, path.resolve()):
        raise ConfigError([f"{path}: base leads back to {base}; a recipe cannot stand on itself"])
    if not base.is_file():
        raise ConfigError(
            [f"{path}: base {base} does not exist; name a recipe relative to this one's folder"]
        )
    return [*_over_bases(base, (*above, path.resolve())), (path, node)]


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
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(dataclasses.asdict(recipe))))


def _read(
    given: DictConfig, schema: type[R], prefix: str, others: Collection[str] = ()
) -> tuple[R | None, _Reading]:
    reading = _Reading()
    tree = OmegaConf.create(_filled(OmegaConf.to_container(given), schema))
    return reading.section(tree, schema, prefix, others), reading


def _read_file(path: str | Path) -> DictConfig:
    file = recipes.resolve(path)
    if not file.is_file():
        raise ConfigError([f"recipe {path} does not exist (looked for {file.absolute()})"])
    try:
        given = read_over_bases(file)
    except ConfigError:
        raise
    except Exception as error:  # the YAML parser's and OmegaConf's own classes
        raise ConfigError([f"{path}: {' '.join(str(error).split())}"]) from error
    if not isinstance(given, DictConfig):
        raise ConfigError([f"{path}: a recipe is a mapping of keys, found a {type(given).__name__}"])
    return given


def _refuse_environment(path: str | Path, given: DictConfig) -> None:
    if _ENVIRONMENT.search(OmegaConf.to_yaml(given)):
        raise ConfigError(
            [
                f"{path}: a recipe must not read the environment (${{oc.env:...}}): its values are written beside the "
                "run; a reward reads its secrets from the environment itself, where it uses them"
            ]
        )


def _apply_overrides(config: DictConfig, overrides: Sequence[str]) -> None:
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
            problems.append(f"override {item!r}: {' '.join(str(error).split())}")
    if problems:
        raise ConfigError(problems)


def _filled(node: Any, hint: Any) -> Any:
    """A tree with the defaults of its schema put in where it says nothing, so that interpolations find them."""
    base, _ = split_annotated(split_optional(hint)[0])
    if dataclasses.is_dataclass(base) and isinstance(node, dict):
        hints = _hints(base)  # type: ignore[arg-type]
        given = {key: value for key, value in node.items() if value != MISSING or key not in hints}
        return {key: _filled(value, hints.get(key)) for key, value in (_defaults(base) | given).items()}
    if typing.get_origin(base) is list and isinstance(node, list):
        return [_filled(item, typing.get_args(base)[0]) for item in node]
    return node


def _defaults(schema: Any) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(schema):
        hint = _hints(schema)[field.name]
        if field.default_factory is not dataclasses.MISSING:
            # A section is filled in key by key: it may hold keys without a default.
            made = {} if dataclasses.is_dataclass(hint) else field.default_factory()
            found[field.name] = _plain(made)
        else:
            found[field.name] = field.default
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return (
        dataclasses.asdict(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
        else value
    )


def _escaped(node: Any) -> Any:
    """A tree whose texts are read back as they are, though one should hold `${`."""
    if isinstance(node, dict):
        return {key: _escaped(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_escaped(item) for item in node]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", node) if isinstance(node, str) else node


@functools.cache
def _hints(schema: type) -> dict[str, Any]:
    return {
        field.name: hint
        for field in dataclasses.fields(schema)  # type: ignore[arg-type]
        for hint in [typing.get_type_hints(schema, include_extras=True)[field.name]]
    }


@functools.cache
def _adapter(schema: type, key: str) -> TypeAdapter[Any]:
    return TypeAdapter(_hints(schema)[key], config=ConfigDict(coerce_numbers_to_str=True))


class _Reading:
    """Turns a tree into a recipe. `problems` keep it from being one, `out_of_range` are values that may not be."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.out_of_range: list[str] = []

    def section(self, node: Any, schema: type[R], prefix: str, others: Collection[str] = ()) -> R | None:
        """A mapping, or a dataclass that is looked over again. None where it cannot be made."""
        hints = _hints(schema)  # type: ignore[arg-type]
        if isinstance(node, DictConfig) and not getattr(schema, "open_ended", False):
            unknown = [str(key) for key in node if key not in hints and key not in others]
            self.problems += [_unknown(key, [*hints, *others], prefix) for key in unknown]
        elif not isinstance(node, DictConfig | schema):
            self.problems.append(f"key '{prefix.rstrip('.')}' must be a mapping with keys {', '.join(hints)}")
            return None
        values = {key: self._value(node, schema, key, f"{prefix}{key}") for key in hints}
        return None if any(value is _Unreadable for value in values.values()) else schema(**values)

    def _value(self, node: Any, schema: type, name: str, key: str) -> Any:
        value = self._get(node, name, key) if isinstance(node, DictConfig) else getattr(node, name)
        hint = _hints(schema)[name]
        inner, optional = split_optional(hint)
        item = typing.get_args(inner)[0] if typing.get_origin(inner) is list else None
        if value is _Unreadable or (value is None and optional):
            return value
        if isinstance(value, str) and value == MISSING:
            self.problems.append(f"key '{key}' has no value; set it in the recipe or as {key}=...")
            return _Unreadable
        if dataclasses.is_dataclass(inner):
            return self._section(value, inner, key)
        if dataclasses.is_dataclass(item):
            if not isinstance(value, list | ListConfig):
                self.problems.append(f"key '{key}' must be a list of mappings")
                return _Unreadable
            places = [(i, f"{key}[{i}]") for i in range(len(value))]
            parts = [self._section(self._get(value, i, place), item, place) for i, place in places]
            return _Unreadable if _Unreadable in parts else parts
        try:
            if isinstance(value, DictConfig | ListConfig):
                value = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
            return _adapter(schema, name).validate_python(value)
        except ValidationError as error:
            return value if self._note(error, key, hint) else _Unreadable
        except Exception as error:  # a resolver raises whatever it likes
            self.problems.append(f"key '{key}': {_first_line(error)}")
            return _Unreadable

    def _section(self, value: Any, schema: Any, key: str) -> Any:
        made = None if value is _Unreadable else self.section(value, schema, f"{key}.")
        return _Unreadable if made is None else made

    def _get(self, node: Any, name: str | int, key: str) -> Any:
        """A value without interpolations; sections, and lists of them, are resolved as they are gone through."""
        try:
            if isinstance(node, DictConfig | ListConfig) and OmegaConf.is_missing(node, name):
                return MISSING
            return node[name]  # type: ignore[index]
        except Exception as error:  # a resolver raises whatever it likes
            self.problems.append(f"key '{key}': {_first_line(error)}")
            return _Unreadable

    def _note(self, error: ValidationError, key: str, hint: Any) -> bool:
        """Write down what pydantic found; whether the value is at least of its type."""
        readable = True
        for found in error.errors(include_url=False, include_context=False):
            name, inner, value = key, hint, found["input"]
            for step in found["loc"]:
                if step == "[key]":
                    continue
                name += f"[{step}]" if isinstance(step, int) else f".{step}"
                inner = _inner(inner, step)
            if found["type"] == "too_short":
                self.out_of_range.append(f"{name} is empty; give one or more")
                continue
            if found["type"] in _OF_RANGE and value is not None and not isinstance(value, dict | list):
                self.out_of_range.append(f"{name}={value!r} {_range(found, inner)}")
                continue
            readable = False
            said = (
                "null is not allowed;"
                if value is None
                else f"Value '{value}' of type '{type(value).__name__}'"
            )
            self.problems.append(f"key '{name}': {said} must be {expectation(inner)}")
        return readable


class _Unreadable:
    """Stands for a value that has been named as a problem."""


def _inner(hint: Any, step: int | str) -> Any:
    base, _ = split_annotated(split_optional(hint)[0])
    arguments = typing.get_args(base)
    if typing.get_origin(base) is tuple and isinstance(step, int):
        return arguments[step]
    return arguments[-1] if arguments else Any


def _range(found: Any, hint: Any) -> str:
    if found["type"] == "literal_error":
        choices = allowed(hint) + (", or null" if split_optional(hint)[1] else "")
        return f"is not one of {choices}"
    if found["type"] == "value_error":
        return found["msg"].removeprefix("Value error, ")
    if found["type"] == "finite_number":
        return "must be finite" + (f" and {allowed(hint)}" if allowed(hint) != "finite" else "")
    return f"must be {allowed(hint)}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _unknown(key: str, known: Sequence[str], prefix: str) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean '{prefix}{near[0]}'?" if near else f"known here: {', '.join(known)}"
    return f"unknown key '{prefix}{key}': {hint}"
