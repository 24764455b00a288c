"""GEdit-Bench from the hub's parquet files to plain files: `python -m rewards.benchmarks.gedit_export PARQUET OUT`.

OUT gets `metadata.jsonl` with the columns of the data set but for the pictures, and each source picture at
`fullset/<task_type>/<language>/<key>_SRCIMG.png`, where the public scripts look for it. Needs `pip install pyarrow`.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from core.files import atomic_write_bytes, atomic_write_text
from core.keys import folder_name
from core.pictures import decode_picture
from rewards.benchmarks.gedit import GET_DATA, METADATA, source_path
from rewards.benchmarks.items import DataError

COLUMNS = ("key", "task_type", "instruction", "instruction_language", "Intersection_exist")
PICTURE = "input_image"


def export(rows: Iterable[Mapping[str, Any]], folder: Path) -> int:
    """Write all rows; how many. A row has `COLUMNS` and `input_image: {"bytes": ...}`, an encoded picture.

    Raises DataError for a row that lacks a column or a readable picture, or whose columns make no path below `folder`.
    The list is written last: where it is, everything is.
    """
    lines = []
    for number, row in enumerate(rows):
        missing = [name for name in (*COLUMNS, PICTURE) if row.get(name) is None]
        if missing:
            raise DataError([f"row {number}: has no {', '.join(missing)}; {GET_DATA}"])
        try:
            for name in ("task_type", "instruction_language", "key"):
                folder_name(str(row[name]))
        except ValueError as error:
            raise DataError([f"row {number}: {name} {row[name]!r}: {error}"]) from error
        path = source_path(folder, row["task_type"], row["instruction_language"], row["key"])
        buffer = io.BytesIO()
        try:
            picture = decode_picture(row[PICTURE]["bytes"], f"row {number}: {PICTURE}")
        except ValueError as error:
            raise DataError([str(error)]) from error
        picture.save(buffer, "PNG")
        atomic_write_bytes(path, buffer.getvalue())
        lines.append(json.dumps({name: row[name] for name in COLUMNS}, ensure_ascii=False))
    atomic_write_text(folder / METADATA, "".join(f"{line}\n" for line in lines))
    return len(lines)


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file or of all in a folder, a few at a time. Raises DataError."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(["reading parquet files needs pyarrow: pip install pyarrow"]) from error
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise DataError([f"{path}: holds no parquet file; {GET_DATA}"])
    for file in files:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(16, columns=[*COLUMNS, PICTURE]):
            yield from batch.to_pylist()


def main(argv: list[str] | None = None) -> int:
    """0, or 2 when the files cannot be used."""
    words = sys.argv[1:] if argv is None else argv
    if len(words) != 2:
        sys.stderr.write("usage: python -m rewards.benchmarks.gedit_export PARQUET_FOLDER OUT_FOLDER\n")
        return 2
    try:
        count = export(parquet_rows(Path(words[0])), Path(words[1]))
    except DataError as error:
        sys.stderr.write(f"Nothing can be scored with this yet:\n{error}\n")
        return 2
    sys.stdout.write(f"{words[1]}: {count} edits\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
