"""pyarrow, where it is installed, and the values that tables hold. Only the two kinds of table need it."""

import io
from types import ModuleType
from typing import IO, Any

from core.shards.errors import DataError, SampleError


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


def picture_stream(value: Any, name: str) -> IO[bytes]:
    """A cell that holds an encoded picture: bytes, or Hugging Face's `Image` as {bytes, path}.

    Raises:
        SampleError: nothing there, or a path only: files outside the table are not followed.
    """
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        outside = isinstance(value, dict) and value.get("path")
        raise SampleError(
            f"{name} holds no bytes"
            + (f", only the path {value['path']!r}: embed the files" if outside else "")
        )
    return io.BytesIO(content)


def missing_columns(wanted: list[str], there: list[str]) -> str:
    """Words for columns that a table lacks, or nothing."""
    absent = [name for name in wanted if name not in there]
    return f"no column {', '.join(absent)}; it has {', '.join(there)}" if absent else ""
