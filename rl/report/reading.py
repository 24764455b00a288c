"""Reads what a run has written so far, whole or not: what cannot be read becomes a note for the page, not an error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from core.statistics import Difference, Estimate

Record = dict[str, Any]
Notes = list[str]


def read_lines(path: Path, notes: Notes) -> list[Record]:
    """The whole JSON objects of a JSON-lines file, in order, each with an integer `step`.

    Lines that are not, a torn last one included, are left out with a note; so is a file that is absent.
    """
    if not path.is_file():
        notes.append(f"{path.name} is missing")
        return []
    lines = path.read_bytes().splitlines()
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None and isinstance(record.get("step"), int):
            records.append(record)
        elif number == len(lines):
            notes.append(
                f"{path.name}: the last line is torn (a run that writes, or was killed) and left out"
            )
        else:
            notes.append(f"{path.name}: line {number} is not a record and left out")
    return records


def read_object(path: Path, notes: Notes) -> Record | None:
    """A JSON object, or None with a note where the file holds something else; None alone where it is absent."""
    if not path.is_file():
        return None
    record = _parse(path.read_bytes())
    if record is None:
        notes.append(f"{path.parent.name}/{path.name} is not a JSON object and left out")
    return record


def finite(value: Any) -> float | None:
    """A finite number; everything else is missing."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def number(value: Any) -> float | None:
    """A finite number to seven digits, which is what the page holds; everything else is missing."""
    value = finite(value)
    return float(f"{value:.7g}") if isinstance(value, float) else value


def interval(estimate: Estimate | Difference) -> list[float | None]:
    """`[mean, low, high]`."""
    return [number(estimate.mean), number(estimate.low), number(estimate.high)]


def column(values: Any) -> list[float | None] | None:
    """A list of numbers, None where one is missing; None for anything but a list."""
    return [finite(value) for value in values] if isinstance(values, list) else None


def thinned(items: list[Any], most: int) -> list[Any]:
    """At most `most` >= 2 items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _parse(data: bytes) -> Record | None:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
