"""JSONL files of tasks for the command lines: every bad line is named before anything starts. Needs no torch."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Refused(ValueError):
    """What was asked for cannot be done; `problems` holds one line for each thing to mend."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(f"- {problem}" for problem in problems))
        self.problems = problems


def read_lines(path: Path, parse: Callable[[int, dict[str, Any]], T], problems: list[str]) -> list[T]:
    """What `parse` made of every good line's number (from 1) and object; blank lines are passed over.

    Args:
        parse: raises ValueError, or Refused where several things are wrong.
        problems: gets one `file:line: what` for each thing that is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON strings may hold other line separators
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path}: cannot be read ({error})")
        return []
    found: list[T] = []
    known = len(problems)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(parse(number, json_object(line)))
        except ValueError as error:
            causes = error.problems if isinstance(error, Refused) else [str(error)]
            problems += [f"{path}:{number}: {cause}" for cause in causes]
    if not found and len(problems) == known:
        problems.append(f"{path}: holds no lines")
    return found


def json_object(text: str) -> dict[str, Any]:
    """The JSON object that a text is. Raises ValueError."""
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    return record


def check_record(
    record: Mapping[str, Any], kinds: Mapping[str, type], required: Collection[str]
) -> list[str]:
    """What is wrong with the keys and the types of a record; `kinds` has the type of every known key.

    A whole number passes for a float. Null is taken as absent.
    """
    problems = []
    for key, value in record.items():
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(kinds)}"
            problems.append(f"unknown key {key!r}: {hint}")
        elif value is not None and not _is(value, kinds[key]):
            problems.append(f"key {key!r} must be {_NAMES[kinds[key]]}, found {value!r:.60}")
    problems += [f"key {key!r} is missing" for key in required if record.get(key) is None]
    return problems


_NAMES = {str: "a string", int: "a whole number", float: "a number", dict: "an object", list: "a list"}


def _is(value: object, kind: type) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)
