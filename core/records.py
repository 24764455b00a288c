"""Append-only record files: one JSON object per line, each with the global `step` it belongs to.

A process killed in the middle of an append leaves a torn last line; a run resumed from an earlier checkpoint
leaves records of steps that will be done again. `keep_up_to` clears both. Files of lines that people write are read by
`parse_lines`, which names every bad one.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from core.files import atomic_write_text, naming
from core.text import parse_json, read_text

logger = logging.getLogger(__name__)

Record = dict[str, Any]
T = TypeVar("T")


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Append records and flush them to disk, so that a later checkpoint is never ahead of them: all or, on a full
    disk, none."""
    lines = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    before = path.stat().st_size if path.exists() else 0
    try:
        with naming(path), open(path, "a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):  # another append would make a torn last line one that nobody can read past
            os.truncate(path, before)
        raise


def read_records(path: Path) -> list[Record]:
    """All whole records of the file, oldest first; a torn last line is left out with a warning.

    Raises ValueError naming file and line when any other line is not a JSON object.
    """
    lines = path.read_bytes().splitlines()
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json_object(line))
        except ValueError as error:
            if number == len(lines):
                logger.warning("%s:%d: left out the torn last line (%d bytes)", path, number, len(line))
                break
            raise ValueError(
                f"{path}:{number}: not a JSON record ({error}); repair or remove the line"
            ) from error
    return records


def keep_up_to(path: Path, step: int, *, drop: Callable[[Record], bool] = lambda record: False) -> int:
    """Rewrite the file with the records of global steps <= `step` only, less those that `drop` names; returns how
    many were dropped.

    A file that does not exist has nothing to drop.
    """
    if not path.exists():
        return 0
    records = read_records(path)
    kept = [record for record in records if record["step"] <= step and not drop(record)]
    atomic_write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
    dropped = len(records) - len(kept)
    if dropped:
        logger.info("%s: dropped %d records after step %d, which will be done again", path, dropped, step)
    return dropped


def open_records(
    path: Path, resume_step: int | None, *, drop: Callable[[Record], bool] = lambda record: False
) -> None:
    """Prepare a record file for appending: fresh when `resume_step` is None, else cut after that step.

    Raises FileExistsError when a fresh run would append to the records of another one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if resume_step is not None:
        keep_up_to(path, resume_step, drop=drop)
    elif path.exists() and path.stat().st_size:
        raise FileExistsError(
            f"{path} holds the records of an earlier run; resume that run, or choose another output folder"
        )


def parse_lines(
    path: Path, parse: Callable[[int, Record], T], problems: list[str], *, what: str = "lines"
) -> list[T]:
    """What `parse` made of every good line's number (from 1) and object, in a file that people write.

    Blank lines are passed over. `problems` gets one `file:line: problem` for each thing that is wrong: for each of
    the `problems` of the ValueError that `parse` raises, or for it. A file without any line holds no `what`.
    """
    try:
        lines = read_text(path).split("\n")  # JSON strings may hold other line separators
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
            problems += [f"{path}:{number}: {cause}" for cause in getattr(error, "problems", [str(error)])]
    if not found and len(problems) == known:
        problems.append(f"{path}: holds no {what}")
    return found


def json_object(text: str | bytes) -> Record:
    """The JSON object that a text is. Raises ValueError."""
    record = parse_json(text)
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    return record
