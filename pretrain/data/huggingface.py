"""Folders that Hugging Face's `Dataset.save_to_disk` wrote, by pyarrow alone: Arrow streams, mapped into memory."""

import json
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from core.shards.errors import DataError, SampleError
from pretrain.data.arrow import missing_columns, picture_stream, require_pyarrow
from pretrain.data.config import SourceConfig
from pretrain.data.readers import Place, clean_texts, picture_fields, text_fields

_FILES_KEPT = 64


class HuggingFaceReader:
    """A place is (row,) of one of the folder's Arrow files."""

    def __init__(self, config: SourceConfig) -> None:
        self._arrow = require_pyarrow(config.kind)
        self._pictures = picture_fields(config)
        self._texts = text_fields(config)
        self._lock = threading.Lock()
        self._table = lru_cache(maxsize=_FILES_KEPT)(self._map)

    def places(self, path: Path) -> Iterator[tuple[str, Place | SampleError]]:
        table = self._map(path)
        problem = missing_columns([*self._pictures, *self._texts], table.schema.names)
        if problem:
            raise DataError(f"{path}: {problem}")
        for row in range(table.num_rows):
            yield f"row {row}", (row,)

    def texts(self, path: Path, place: Place) -> tuple[str, ...]:
        return clean_texts(self._cells(path, place, self._texts))

    def pictures(self, path: Path, place: Place) -> tuple[IO[bytes], ...]:
        cells = self._cells(path, place, self._pictures)
        return tuple(picture_stream(cells[name], name) for name in self._pictures)

    def _cells(self, path: Path, place: Place, columns: list[str]) -> dict[str, Any]:
        (row,) = place
        try:
            with self._lock:
                table = self._table(path)
            return {name: table.column(name)[row].as_py() for name in columns}
        except (OSError, self._arrow.ArrowException, UnicodeDecodeError) as error:
            raise SampleError(f"row {row} cannot be read ({error})") from error

    def _map(self, path: Path) -> Any:
        try:
            return self._arrow.ipc.open_stream(self._arrow.memory_map(str(path))).read_all()
        except (OSError, self._arrow.ArrowException) as error:
            raise DataError(f"{path}: not a whole Arrow stream ({error}); copy or make it again") from error


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
