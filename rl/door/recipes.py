"""`unipic-rl recipes list | show RECIPE [key=value ...] | diff RECIPE [OTHER]`: what a recipe says, and since where."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import recipes
from core.command_line import refuse
from core.recipe import ConfigError, recipe_chain
from rl.recipe.schema import load_config

PAPER = "recipes/pdtr_sd35m_kontext.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 for a recipe that cannot be read."""
    parser = argparse.ArgumentParser(prog="unipic-rl recipes", description="What a recipe of rl.train says.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the packaged ones")
    show = commands.add_parser("show", help="every key with its value, and where that comes from")
    show.add_argument("recipe")
    show.add_argument("overrides", nargs="*", metavar="key=value")
    diff = commands.add_parser("diff", help="keys in which two recipes differ")
    diff.add_argument("recipe")
    diff.add_argument("other", nargs="?", default=PAPER, help="default: the paper's, %(default)s")
    options = parser.parse_args(argv)
    try:
        if options.command == "list":
            lines = list_recipes()
        elif options.command == "show":
            lines = show_recipe(options.recipe, options.overrides)
        else:
            lines = compare(options.recipe, options.other)
    except ConfigError as error:
        return refuse("This recipe cannot be read", error)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def list_recipes() -> list[str]:
    """Each packaged recipe with the first line of its header and its evidence."""
    lines = []
    root = recipes.resolve("recipes")
    for path in sorted(root.rglob("*.yaml")):
        head = [line.lstrip("# ").rstrip() for line in _header(path)]
        evidence = next((line.split(None, 1)[1] for line in head if line.startswith("evidence ")), "")
        lines.append(f"recipes/{path.relative_to(root)}")
        lines += [
            f"    {line}"
            for line in (head[0] if head else "", f"evidence: {evidence}" * bool(evidence))
            if line
        ]
    return lines


def show_recipe(recipe: str, overrides: Sequence[str] = ()) -> list[str]:
    """`key  value  source` of everything that the recipe comes to. Raises ConfigError."""
    values = leaves(asdict(load_config(recipe, overrides, defer_values=True)))
    sources = _sources(recipe, overrides)
    widths = max(map(len, values)), min(60, max(len(str(value)) for value in values.values()))
    return [
        f"{key:{widths[0]}}  {value!s:{widths[1]}}  {_source(key, sources)}".rstrip()
        for key, value in values.items()
    ]


def compare(recipe: str, other: str) -> list[str]:
    """`key  value here  value there` of the keys that differ; none where they come to the same. Raises ConfigError."""
    here, there = (leaves(asdict(load_config(path, defer_values=True))) for path in (recipe, other))
    keys = [key for key in dict.fromkeys([*there, *here]) if here.get(key, "-") != there.get(key, "-")]
    rows = [("", recipe, other), *((key, str(here.get(key, "-")), str(there.get(key, "-"))) for key in keys)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [f"{key:{widths[0]}}  {own:{widths[1]}}  {others}".rstrip() for key, own, others in rows]


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of everything that is no section; places in lists in brackets, as overrides name them."""
    if isinstance(node, Mapping) and node:
        pairs = [(f"{prefix}.{key}" if prefix else str(key), child) for key, child in node.items()]
    elif isinstance(node, list | tuple) and any(isinstance(item, Mapping) for item in node):
        pairs = [(f"{prefix}[{place}]", child) for place, child in enumerate(node)]
    else:
        return {prefix: node}
    found: dict[str, Any] = {}
    for key, child in pairs:
        found |= leaves(child, key)
    return found


def _sources(recipe: str, overrides: Sequence[str]) -> dict[str, str]:
    """Key of a value, or of a list that is replaced whole -> the last that set it."""
    found: dict[str, str] = {}
    root = recipes.resolve("recipes").parent
    for path, tree in recipe_chain(recipe):
        name = path.resolve().relative_to(root) if path.resolve().is_relative_to(root) else path
        found |= {key.partition("[")[0]: str(name) for key in leaves(tree)}
    return found | {item.partition("=")[0]: "override" for item in overrides}


def _source(key: str, sources: Mapping[str, str]) -> str:
    """The nearest of the key and what it lies in; a schema's default where none of them is set."""
    while key:
        if key in sources:
            return sources[key]
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return "default"


def _header(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            return
        yield line
