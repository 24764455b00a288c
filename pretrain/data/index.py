"""What is in a source: every sample's place and size, from headers alone; made file by file, anew for one that changed.

<index_dir>/files/<hash of path and fields>-<name>.npz    keys, places and sizes of one file's usable samples;
                                                          keys of the broken ones, with the reasons
<index_dir>/<digest>/{sizes,places,counts}.npy            all files of a source together; places are mapped into
<index_dir>/<digest>/corrupt.json                         memory, so that opening reads 8 bytes a sample
"""

import functools
import glob
import hashlib
import io
import json
import zipfile
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image, UnidentifiedImageError

import recipes
from core.failures import DataError, SampleError
from core.files import COMPLETE, atomic_write_bytes, publish_folder
from core.pictures import MAX_PIXELS
from core.shards.indexing import index_files
from pretrain.data.config import SourceConfig
from pretrain.data.readers import Place, Reader, picture_fields, text_fields
from pretrain.data.tables import HuggingFaceReader, ParquetReader, dataset_files
from pretrain.data.webdataset import WebDatasetReader

FORMAT = 1
NAMED = 10
"""Broken samples that a message names."""
MAX_ASPECT_MISMATCH = 1.05
"""Proportions of an edit's pictures may differ by this factor: what rounding sides to a multiple does."""

READERS: dict[str, type[Reader]] = {
    "webdataset": WebDatasetReader,
    "parquet": ParquetReader,
    "hf": HuggingFaceReader,
}

FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION = 0x0112
_TRANSPOSED = range(5, 9)
# Where an orientation can lie; asking PIL for one that is not there would decode a whole PNG to look behind it.
_METADATA = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")


class SourceIndex:
    """The usable samples of a source, numbered 0 to N-1 in the order of its files.

    Attributes:
        widths, heights: N int32, upright pixels; of an edit's target.
        corrupt: (file, key, reason) of those left out.
        digest: names these files, as they are, read by these fields.
    """

    def __init__(self, config: SourceConfig, files: Sequence[Path], index_dir: Path) -> None:
        """Raises OSError unless the index has been made."""
        self.digest = _digest(config, files)
        folder = index_dir / self.digest
        self._files, self._config, self._index_dir = files, config, index_dir
        self._ends = np.load(folder / "counts.npy").cumsum().tolist()
        self.widths, self.heights = np.load(folder / "sizes.npy").T.copy()
        self._places = np.load(folder / "places.npy", mmap_mode="r")
        corrupt = json.loads((folder / "corrupt.json").read_text(encoding="utf-8"))
        self.corrupt = tuple((str(files[number]), key, reason) for number, key, reason in corrupt)

    def __len__(self) -> int:
        return len(self.widths)

    def locate(self, ordinal: int) -> tuple[Path, Place]:
        """The file that sample `ordinal` is in, and its place there."""
        return self._files[bisect_right(self._ends, ordinal)], tuple(self._places[ordinal].tolist())

    def key(self, ordinal: int) -> str:
        """How messages name a sample. Reads the record of its file."""
        file = bisect_right(self._ends, ordinal)
        with np.load(_record_path(self._files[file], self._config, self._index_dir)) as arrays:
            return str(arrays["keys"][ordinal - (self._ends[file - 1] if file else 0)])


def open_index(config: SourceConfig, index_dir: Path, *, workers: int, wait_s: float) -> SourceIndex:
    """The index of a source, made first where it is missing or its files have changed.

    One process makes it while others wait; `workers` processes share the files.

    Raises:
        DataError: no file, a file that cannot be read at all, no usable sample, or another process that holds the
            index longer than `wait_s`.
    """
    files = source_files(config)
    folder = index_dir / _digest(config, files)
    if not (folder / COMPLETE).is_file():
        index_dir.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(index_dir / "index.lock", timeout=wait_s):
                if not (folder / COMPLETE).is_file():
                    _make(config, files, index_dir, workers)
        except Timeout as error:
            raise DataError(
                f"{index_dir}: another process has been indexing for {wait_s:.0f} s; raise data.wait_s, or make the "
                "index first with `python -m pretrain.data.cache RECIPE`"
            ) from error
    index = SourceIndex(config, files, index_dir)
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
    reader = READERS[config.kind](config)
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


def upright_size(file: IO[bytes], name: str) -> tuple[int, int]:
    """(width, height) of a picture once EXIF rotation is applied.

    Raises:
        SampleError: beginning with `name`, for what is no picture of `FORMATS`, or one that could not be used:
            above `core.pictures.MAX_PIXELS`.
    """
    try:
        with Image.open(file, formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise SampleError(
                    f"{name} has {width} x {height} px, more than {MAX_PIXELS / 1e6:.0f} megapixels"
                )
            tagged = any(key in picture.info for key in _METADATA)
            turned = tagged and picture.getexif().get(_ORIENTATION) in _TRANSPOSED
    except SampleError:
        raise
    except UnidentifiedImageError as error:
        raise SampleError(f"{name} is no {', '.join(FORMATS)} picture") from error
    except Exception as error:  # on damaged files PIL raises more than it documents
        raise SampleError(f"{name} has a header that cannot be read ({error})") from error
    return (height, width) if turned else (width, height)


def _make(config: SourceConfig, files: Sequence[Path], index_dir: Path, workers: int) -> None:
    """Index the files that are not yet, and put all of them together."""
    pending = [path for path in files if not _current(path, config, index_dir)]
    index_files(functools.partial(index_one, config=config, index_dir=index_dir), pending, workers)
    sizes, places, counts, corrupt = [], [], [], []
    for number, path in enumerate(files):
        with np.load(_record_path(path, config, index_dir)) as arrays:
            counts.append(len(arrays["sizes"]))
            if counts[-1]:
                sizes.append(arrays["sizes"])
                places.append(arrays["places"])
            corrupt += [(number, key, reason) for key, reason in json.loads(str(arrays["corrupt"]))]
    digest = _digest(config, files)
    partial = index_dir / f".{digest}.{uuid4().hex[:8]}"
    partial.mkdir()
    np.save(partial / "counts.npy", np.array(counts, dtype=np.int64))
    np.save(partial / "sizes.npy", np.concatenate([np.empty((0, 2), np.int32), *sizes]))
    np.save(partial / "places.npy", np.concatenate(places) if places else np.empty((0, 0), np.int64))
    (partial / "corrupt.json").write_text(json.dumps(corrupt), encoding="utf-8")
    publish_folder(partial, index_dir / digest)


def _digest(config: SourceConfig, files: Sequence[Path]) -> str:
    stamps = json.dumps([[str(path.absolute()), _stamp(path, config)] for path in files])
    return hashlib.sha256(stamps.encode()).hexdigest()[:16]


def _fields(config: SourceConfig) -> list[Any]:
    return [config.kind, config.task, picture_fields(config), text_fields(config)]


def _record_path(path: Path, config: SourceConfig, index_dir: Path) -> Path:
    name = json.dumps([str(path.absolute()), _fields(config)])
    return index_dir / "files" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}-{path.stem[:60]}.npz"


def _stamp(path: Path, config: SourceConfig) -> list[Any]:
    status = path.stat()
    return [FORMAT, status.st_size, status.st_mtime_ns, *_fields(config)]


def _current(path: Path, config: SourceConfig, index_dir: Path) -> bool:
    try:
        with np.load(_record_path(path, config, index_dir)) as arrays:
            return json.loads(str(arrays["stamp"])) == _stamp(path, config)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return False
