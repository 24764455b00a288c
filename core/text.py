"""Text that people and services give, looked over where it enters: UTF-8 files, and JSON that the rest can carry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEEPEST = 64
"""Levels of lists and objects. Python's own limit falls later, where a record is copied or sent to a worker."""


def read_text(path: str | Path) -> str:
    """A file's text; a byte-order mark is no part of it. Raises OSError, UnicodeDecodeError."""
    return Path(path).read_text(encoding="utf-8-sig")


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds. Raises ValueError: no JSON, nested too deeply, or half of a surrogate pair in it."""
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(text.removeprefix("\ufeff"))
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if text.count("[") + text.count("{") > DEEPEST and _depth(value) > DEEPEST:
        raise ValueError(_TOO_DEEP)
    if "\\u" in text or not text.isascii():
        for key, problem in broken_texts(value):
            raise ValueError(f"key {key!r} {problem}" if key else problem)
    return value


def broken_texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Key (`a.b[0]`) and problem of every text in a tree that holds half of a surrogate pair."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start]
            yield (
                key,
                f"holds {half!r} as character {error.start + 1}: half of a surrogate pair, which is no text and cannot "
                "be encoded; write the whole character, or take it out",
            )
    elif isinstance(value, dict):
        for name, child in value.items():
            yield from broken_texts(str(name), f"{key}.{name}".removeprefix("."))
            yield from broken_texts(child, f"{key}.{name}".removeprefix("."))
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            yield from broken_texts(child, f"{key}[{index}]")


_TOO_DEEP = (
    f"not readable JSON (lists and objects are nested more than {DEEPEST} levels deep); make it flatter"
)


def _depth(value: Any) -> int:
    """Levels of lists and objects, by breadth: Python's stack is what has to be spared."""
    level, depth = [value], 0
    while level := [node for node in level if isinstance(node, dict | list)]:
        depth += 1
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
    return depth
