"""What is in a source: every sample's place and size, from headers alone; kept per file, made anew when that changes.

`<index_dir>/<hash of path and fields>-<name>.npz` holds keys, places and sizes of the usable samples of one file, and
the keys of broken ones with the reasons.
"""

import concurrent.futures
import dataclasses
import glob
import hashlib
import io
import json
import logging
import multiprocessing
import zipfile
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

import recipes
from pretrain.data.config import SourceConfig
from pretrain.data.errors import DataError, SampleError
from pretrain.data.headers import upright_size
from pretrain.data.huggingface import dataset_files
from pretrain.data.readers import Place, Reader, picture_fields, reader_of, text_fields
from rl.atomic import atomic_write_bytes
from rl.progress import Progress

log = logging.getLogger(__name__)

FORMAT = 1
NAMED = 10
"""Broken samples that a message names."""
MAX_ASPECT_MISMATCH = 1.05
"""Proportions of an edit's pictures may differ by this factor: what rounding sides to a multiple does."""
_FILES_KEPT = 64


@dataclasses.dataclass(frozen=True)
class Located:
    """One sample: the file, the key by which messages name it, and its place there."""

    path: Path
    key: str
    place: Place


class SourceIndex:
    """The usable samples of a source, numbered 0 to N-1 in the order of its files.

    Attributes:
        widths, heights: N int32, upright pixels; of an edit's target.
        corrupt: (file, key, reason) of those left out.
        digest: names these files, as they are, read by these fields.
    """

    def __init__(self, config: SourceConfig, index_dir: Path) -> None:
        self.files = source_files(config)
        self._records = [_record_path(path, config, index_dir) for path in self.files]
        sizes, corrupt, counts = [], [], []
        for path, record in zip(self.files, self._records, strict=True):
            with np.load(record) as arrays:
                sizes.append(arrays["sizes"])
                counts.append(len(arrays["sizes"]))
                pairs = json.loads(str(arrays["corrupt"]))
            corrupt += [(str(path), key, reason) for key, reason in pairs]
        self.widths, self.heights = np.concatenate(sizes).T
        self.corrupt: tuple[tuple[str, str, str], ...] = tuple(corrupt)
        stamps = json.dumps([[path.name, _stamp(path, config)] for path in self.files])
        self.digest = hashlib.sha256(stamps.encode()).hexdigest()[:16]
        self._ends = list(accumulate(counts))
        self._places = lru_cache(maxsize=_FILES_KEPT)(self._load_places)

    def __len__(self) -> int:
        return self._ends[-1]

    def locate(self, ordinal: int) -> Located:
        """Where sample `ordinal` lies."""
        file = bisect_right(self._ends, ordinal)
        row = ordinal - (self._ends[file - 1] if file else 0)
        keys, places = self._places(file)
        return Located(self.files[file], str(keys[row]), tuple(int(number) for number in places[row]))

    def _load_places(self, file: int) -> tuple[np.ndarray, np.ndarray]:
        with np.load(self._records[file]) as arrays:
            return arrays["keys"], arrays["places"]


def open_index(config: SourceConfig, index_dir: Path, *, workers: int, wait_s: float) -> SourceIndex:
    """The index of a source, made first where it is missing or its files have changed.

    One process makes it while others wait; `workers` processes share the files.

    Raises:
        DataError: no file, a file that cannot be read at all, no usable sample, or another process that holds the
            index longer than `wait_s`.
    """
    files = source_files(config)
    if any(not _current(path, config, index_dir) for path in files):
        index_dir.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(index_dir / "index.lock", timeout=wait_s):
                pending = [path for path in files if not _current(path, config, index_dir)]
                _index_all(pending, config, index_dir, workers)
        except Timeout as error:
            raise DataError(
                f"{index_dir}: another process has been indexing for {wait_s:.0f} s; raise data.wait_s, or make the "
                "index first with `python -m pretrain.data.cache RECIPE`"
            ) from error
    index = SourceIndex(config, index_dir)
    if not len(index):
        raise DataError(f"{config.paths}: no usable sample; {named(index.corrupt) or 'the files are empty'}")
    return index


def named(corrupt: tuple[tuple[str, str, str], ...]) -> str:
    """The first broken samples, one a line."""
    lines = [f"{path}: {key}: {reason}" for path, key, reason in corrupt[:NAMED]]
    return "\n".join(lines + (["..."] if len(corrupt) > NAMED else []))


def source_files(config: SourceConfig) -> list[Path]:
    """Files that the paths and globs of a source name, sorted. Raises DataError for one that names none."""
    found: dict[Path, None] = {}
    for pattern in config.paths:
        matches = sorted(glob.glob(str(recipes.resolve(pattern)), recursive=True))
        if not matches:
            raise DataError(f"data.sources paths: no file matches {pattern!r}")
        for match in matches:
            parts = dataset_files(Path(match)) if config.kind == "hf" else [Path(match)]
            found |= dict.fromkeys(parts)
    return list(found)


def index_one(path: Path, config: SourceConfig, index_dir: Path) -> None:
    """Read the headers of one file's samples and write what was found."""
    stamp = _stamp(path, config)
    reader = reader_of(config)
    keys, places, sizes = [], [], []
    corrupt: list[tuple[str, str]] = []
    for key, place in reader.places(path):
        try:
            if isinstance(place, SampleError):
                raise place
            reader.texts(path, place)
            sizes.append(_size(reader, path, place, picture_fields(config)))
        except SampleError as error:
            corrupt.append((key, str(error)))
            continue
        keys.append(key)
        places.append(place)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        keys=np.array(keys, dtype=str),
        places=np.array(places, dtype=np.int64),
        sizes=np.array(sizes, dtype=np.int32).reshape(-1, 2),
        corrupt=np.array(json.dumps(corrupt)),
        stamp=np.array(json.dumps(stamp)),
    )
    atomic_write_bytes(_record_path(path, config, index_dir), buffer.getvalue())


def _size(reader: Reader, path: Path, place: Place, fields: list[str]) -> tuple[int, int]:
    sizes = []
    for name, file in zip(fields, reader.pictures(path, place), strict=True):
        with file:
            sizes.append(upright_size(file, name))
    ratios = [width / height for width, height in sizes]
    if max(ratios) > MAX_ASPECT_MISMATCH * min(ratios):
        pair = " and ".join(
            f"{name} {width} x {height}" for name, (width, height) in zip(fields, sizes, strict=True)
        )
        raise SampleError(f"pictures of unlike proportions: {pair}")
    return sizes[-1]


def _index_all(pending: list[Path], config: SourceConfig, index_dir: Path, workers: int) -> None:
    with Progress().phase("index", total=len(pending), unit="file") as bar:
        if workers == 1 or len(pending) <= 1:
            for path in pending:
                index_one(path, config, index_dir)
                bar.advance()
            return
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(min(workers, len(pending)), context) as pool:
            tasks = [pool.submit(index_one, path, config, index_dir) for path in pending]
            for done in concurrent.futures.as_completed(tasks):
                done.result()
                bar.advance()


def _fields(config: SourceConfig) -> list[Any]:
    return [config.kind, config.task, picture_fields(config), text_fields(config)]


def _record_path(path: Path, config: SourceConfig, index_dir: Path) -> Path:
    name = json.dumps([str(path.absolute()), _fields(config)])
    return index_dir / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}-{path.stem[:60]}.npz"


def _stamp(path: Path, config: SourceConfig) -> list[Any]:
    status = path.stat()
    return [FORMAT, status.st_size, status.st_mtime_ns, *_fields(config)]


def _current(path: Path, config: SourceConfig, index_dir: Path) -> bool:
    try:
        with np.load(_record_path(path, config, index_dir)) as arrays:
            return json.loads(str(arrays["stamp"])) == _stamp(path, config)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return False
