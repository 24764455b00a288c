"""Tables by pyarrow: Parquet files, and folders that Hugging Face's `Dataset.save_to_disk` wrote.

Parquet is read by row group, so one sample costs a whole group: write small ones (about 100 rows). The folders are
Arrow streams, mapped into memory.
"""

import io
import json
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from core.failures import DataError, SampleError
from pretrain.data.config import SourceConfig
from pretrain.data.readers import Place, Reader, clean_texts

_GROUPS_KEPT = 8
_FILES_KEPT = 64

Rows = tuple[list[str], Iterator[tuple[str, Place]]]
"""Names of a file's columns, then key and place of its rows."""


class _TableReader(Reader):
    """Texts and pictures are columns; the first number of a place counts in `unit`, the last is a row of its table."""

    unit: str
    format: str

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(config)
        self._arrow = require_pyarrow(config.kind)
        self._lock = threading.Lock()

    def places(self, path: Path) -> Iterator[tuple[str, Place | SampleError]]:
        columns, rows = self._rows(path)
        absent = [name for name in [*self._pictures, *self._texts] if name not in columns]
        if absent:
            raise DataError(f"{path}: no column {', '.join(absent)}; it has {', '.join(columns)}")
        yield from rows

    def texts(self, path: Path, place: Place) -> tuple[str, ...]:
        return clean_texts(self._cells(path, place, self._texts))

    def pictures(self, path: Path, place: Place) -> tuple[IO[bytes], ...]:
        cells = self._cells(path, place, self._pictures)
        return tuple(_picture_stream(cells[name], name) for name in self._pictures)

    def _cells(self, path: Path, place: Place, columns: Sequence[str]) -> dict[str, Any]:
        try:
            with self._lock:  # one thread at a time, so that a table is read once
                table = self._table(path, place, columns)
            return {name: table.column(name)[place[-1]].as_py() for name in columns}
        except (OSError, self._arrow.ArrowException, UnicodeDecodeError) as error:
            raise SampleError(f"{self.unit} {place[0]} cannot be read ({error})") from error

    def _open(self, path: Path) -> Any:
        try:
            return self._open_file(path)
        except (OSError, self._arrow.ArrowException) as error:
            raise DataError(f"{path}: not a whole {self.format} ({error}); copy or make it again") from error

    def _open_file(self, path: Path) -> Any:
        raise NotImplementedError

    def _rows(self, path: Path) -> Rows:
        raise NotImplementedError

    def _table(self, path: Path, place: Place, columns: Sequence[str]) -> Any:
        """The table that holds the row, with these columns at least."""
        raise NotImplementedError


class ParquetReader(_TableReader):
    """A place is (row group, row in it). The groups read last are kept, texts and pictures apart."""

    unit, format = "row group", "Parquet file"

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(config)
        self._group = lru_cache(maxsize=_GROUPS_KEPT)(self._read_group)

    def _open_file(self, path: Path) -> Any:
        return self._arrow.parquet.ParquetFile(path)

    def _rows(self, path: Path) -> Rows:
        file = self._open(path)
        groups = ((group, file.metadata.row_group(group).num_rows) for group in range(file.num_row_groups))
        rows = (
            (f"row group {group} row {row}", (group, row)) for group, count in groups for row in range(count)
        )
        return file.schema_arrow.names, rows

    def _table(self, path: Path, place: Place, columns: Sequence[str]) -> Any:
        return self._group(path, place[0], tuple(columns))

    def _read_group(self, path: Path, group: int, columns: tuple[str, ...]) -> Any:
        with self._open(path) as file:
            return file.read_row_group(group, columns=list(columns), use_threads=False)


class HuggingFaceReader(_TableReader):
    """A place is (row,) of one of the folder's Arrow files."""

    unit, format = "row", "Arrow stream"

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(config)
        self._mapped = lru_cache(maxsize=_FILES_KEPT)(self._open)

    def _open_file(self, path: Path) -> Any:
        return self._arrow.ipc.open_stream(self._arrow.memory_map(str(path))).read_all()

    def _rows(self, path: Path) -> Rows:
        table = self._open(path)
        return table.schema.names, ((f"row {row}", (row,)) for row in range(table.num_rows))

    def _table(self, path: Path, place: Place, columns: Sequence[str]) -> Any:
        return self._mapped(path)


def dataset_files(folder: Path) -> list[Path]:
    """The Arrow files of a `save_to_disk` folder, in its order.

    Raises:
        DataError: another kind of folder, a folder of several splits, or one with an index of rows beside its data.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8")).get("splits", [])
        raise DataError(
            f"{folder}: holds several splits; name one of {', '.join(str(folder / s) for s in splits)}"
        )
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: not a folder of Dataset.save_to_disk ({error!r})") from error
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(
            f"{folder}: its rows are chosen by an index; call flatten_indices() and save it again"
        )
    absent = [str(file) for file in files if not file.is_file()]
    if absent:
        raise DataError(f"{folder}: state.json names files that are missing: {', '.join(absent)}")
    return files


def require_pyarrow(kind: str) -> ModuleType:
    """The pyarrow module with `pyarrow.parquet`. Raises DataError that says what to install."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"a source of kind {kind} needs pyarrow: pip install 'unipic-rl[tables]', or write webdataset shards"
        ) from error
    return pyarrow


def _picture_stream(value: Any, name: str) -> IO[bytes]:
    """A cell that holds an encoded picture: bytes, or Hugging Face's `Image` as {bytes, path}.

    Raises:
        SampleError: nothing there, or a path only: files outside the table are not followed.
    """
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        path = value.get("path") if isinstance(value, dict) else None
        raise SampleError(
            f"{name} holds no bytes" + (f", only the path {path!r}: embed the files" if path else "")
        )
    return io.BytesIO(content)
