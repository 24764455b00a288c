"""The keys of a recipe as a table: name, type, default, allowed values, meaning. For `--help-config` and the docs."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from core.keys import allowed, split_optional, type_name


@dataclass(frozen=True)
class Key:
    """One key that takes a value. `name` is dotted, `[]` after a list of sections; `default` is None where required."""

    name: str
    type: str
    default: str | None
    allowed: str
    meaning: str
    hint: Any


def keys_of(schema: type, prefix: str = "") -> Iterator[Key]:
    """Every key below a schema, in its order."""
    hints, meanings = typing.get_type_hints(schema, include_extras=True), meanings_of(schema)
    for field in dataclasses.fields(schema):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        inner, _ = split_optional(hint)
        items = typing.get_args(inner)
        if dataclasses.is_dataclass(inner):
            yield from keys_of(inner, f"{name}.")  # type: ignore[arg-type]
        elif typing.get_origin(inner) is list and dataclasses.is_dataclass(items[0]):
            yield from keys_of(items[0], f"{name}[].")  # type: ignore[arg-type]
        else:
            meaning = meanings.get(field.name, "")
            yield Key(name, type_name(hint), _default(field), allowed(hint), meaning, hint)


@functools.cache
def meanings_of(schema: type) -> dict[str, str]:
    """Key -> the text below it in the source of the schema."""
    found: dict[str, str] = {}
    for owner in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        try:
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        except (OSError, TypeError):  # a schema that was put together in code
            continue
        assert isinstance(body, ast.ClassDef)
        for key, text in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(key, ast.AnnAssign)
                and isinstance(text, ast.Expr)
                and isinstance(key.target, ast.Name)
            ):
                found[key.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found


def plain_table(schema: type) -> list[str]:
    """Lines for a terminal: a key with its type, default and allowed values, and below it its meaning."""
    lines = []
    for key in keys_of(schema):
        default = "required" if key.default is None else f"= {key.default}"
        lines.append(
            f"{key.name}  ({'; '.join(part for part in (key.type, key.allowed) if part)})  {default}"
        )
        lines += textwrap.wrap(key.meaning, 112, initial_indent="    ", subsequent_indent="    ")
    return lines


def markdown_table(schema: type) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| key | type | default | allowed | meaning |", "|---|---|---|---|---|"]
    for key in keys_of(schema):
        default = "*required*" if key.default is None else f"`{key.default}`"
        cells = (f"`{key.name}`", key.type, default, key.allowed, key.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def add_help_config(parser: argparse.ArgumentParser, schemas: type | Mapping[str, type]) -> None:
    """`--help-config` prints every key of the recipe and ends. Several schemas: by what chooses among them."""
    parser.add_argument(
        "--help-config",
        action=_HelpConfig,
        schemas=schemas if isinstance(schemas, Mapping) else {"": schemas},
        help="print every key of the recipe with its type, default, allowed values and meaning",
    )


class _HelpConfig(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, *, schemas: Mapping[str, type], help: str):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)
        self._schemas = schemas

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        for title, schema in self._schemas.items():
            lines = [*([f"{title}:", ""] if title else []), *plain_table(schema), ""]
            sys.stdout.write("\n".join(lines) + "\n")
        parser.exit()


def _default(field: dataclasses.Field[Any]) -> str | None:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value == MISSING:
        return None
    if isinstance(value, list | tuple) and len(value) > 8:
        return f"[{_text(value[0])}, {_text(value[1])}, ... {len(value)} in all]"
    return _text(value)


def _text(value: Any) -> str:
    """A value as YAML has it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return "''" if value == "" else f"{value:g}" if isinstance(value, float) else str(value)
