"""Parquet files, read by row group. One sample costs a whole group: write small ones (about 100 rows)."""

import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from core.shards.errors import DataError, SampleError
from pretrain.data.arrow import missing_columns, picture_stream, require_pyarrow
from pretrain.data.config import SourceConfig
from pretrain.data.readers import Place, clean_texts, picture_fields, text_fields

_GROUPS_KEPT = 8


class ParquetReader:
    """A place is (row group, row in it). The groups read last are kept, texts and pictures apart."""

    def __init__(self, config: SourceConfig) -> None:
        self._arrow = require_pyarrow(config.kind)
        self._pictures = picture_fields(config)
        self._texts = text_fields(config)
        self._lock = threading.Lock()
        self._group = lru_cache(maxsize=_GROUPS_KEPT)(self._read_group)

    def places(self, path: Path) -> Iterator[tuple[str, Place | SampleError]]:
        file = self._open(path)
        problem = missing_columns([*self._pictures, *self._texts], file.schema_arrow.names)
        if problem:
            raise DataError(f"{path}: {problem}")
        for group in range(file.num_row_groups):
            for row in range(file.metadata.row_group(group).num_rows):
                yield f"row group {group} row {row}", (group, row)

    def texts(self, path: Path, place: Place) -> tuple[str, ...]:
        return clean_texts(self._cells(path, place, self._texts))

    def pictures(self, path: Path, place: Place) -> tuple[IO[bytes], ...]:
        cells = self._cells(path, place, self._pictures)
        return tuple(picture_stream(cells[name], name) for name in self._pictures)

    def _cells(self, path: Path, place: Place, columns: list[str]) -> dict[str, Any]:
        group, row = place
        try:
            with self._lock:  # one thread at a time, so that a group is read once
                table = self._group(path, group, tuple(columns))
            return {name: table.column(name)[row].as_py() for name in columns}
        except (OSError, self._arrow.ArrowException, UnicodeDecodeError) as error:
            raise SampleError(f"row group {group} cannot be read ({error})") from error

    def _read_group(self, path: Path, group: int, columns: tuple[str, ...]) -> Any:
        with self._open(path) as file:
            return file.read_row_group(group, columns=list(columns), use_threads=False)

    def _open(self, path: Path) -> Any:
        try:
            return self._arrow.parquet.ParquetFile(path)
        except (OSError, self._arrow.ArrowException) as error:
            raise DataError(f"{path}: not a whole Parquet file ({error}); copy or make it again") from error
