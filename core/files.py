"""Files and folders that are either whole or absent, also after a kill or a power cut.

A file is written under a temporary name in its own folder, flushed to disk and renamed. A folder is filled
under a temporary name, gets a manifest of sha256 sums as its last file, and is renamed when complete.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

log = logging.getLogger(__name__)
COMPLETE = "COMPLETE"
"""Name of the marker file inside a published folder; it holds the manifest as JSON."""
_FOREIGN = (".nfs", ".DS_Store")
_FOUND_BY_PATTERN = (".pt", ".pth", ".bin", ".safetensors")


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old content or the new, never a part.

    The parent folder is made if absent. The mode bits are those of a plain `open` under the caller's umask.
    """
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to be filled piece by piece, which takes the place of `path` where the context ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        with naming(path), open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """An error of the system in the block names `path`: that of a write to a full disk names nothing by itself."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8; see `atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON ending in a newline; see `atomic_write_bytes`.

    Raises ValueError for NaN and infinities, which JSON does not know: write None for a value that is
    missing.
    """
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def file_sha256(path: str | Path) -> str:
    """Hex sha256 of a file's bytes, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_manifest(folder: str | Path) -> dict[str, str]:
    """Relative POSIX path -> sha256 of every file below `folder`, sorted by path, without the marker itself.

    What file systems leave behind (`.nfs*`, `.DS_Store`) is none of it, nor are folders without files. Raises
    NotADirectoryError when `folder` is not a folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder, so it has no manifest")
    return {
        name: file_sha256(folder / name)
        for name in _files(folder)
        if not Path(name).name.startswith(_FOREIGN)
    }


def _files(folder: Path) -> list[str]:
    """Relative POSIX paths of every file below `folder` but the marker, sorted."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != COMPLETE)


@contextmanager
def new_folder(final: str | Path) -> Iterator[Path]:
    """A folder to fill under a temporary name beside `final`; `publish_folder` makes it `final` when the block ends,
    and an error removes it and names it: torch and safetensors do not say what a disk refused."""
    final = Path(final)
    tmp = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        yield tmp
        publish_folder(tmp, final)
    except BaseException as error:
        with suppress(OSError):
            free = shutil.disk_usage(tmp).free
            error.add_note(f"while {final} was written, with {free / 1e6:.1f} MB free there")
        shutil.rmtree(tmp, ignore_errors=True)
        raise


def publish_folder(tmp: str | Path, final: str | Path) -> dict[str, str]:
    """Rename the filled folder `tmp` to `final` and return its manifest; both must be on one file system.

    Every file is flushed to disk, then the marker is written, then the folder is renamed: where `final`
    exists, it was complete at that moment. A `final` already there is replaced; a kill between the two
    renames of a replacement leaves `final` absent, so publish under a new name whatever must survive one.
    """
    tmp, final = Path(tmp), Path(final)
    manifest = folder_manifest(tmp)
    for path in tmp.rglob("*"):
        _sync(path)
    atomic_write_json(tmp / COMPLETE, manifest)
    final.parent.mkdir(parents=True, exist_ok=True)
    replaced = final.with_name(f".{final.name}.{uuid4().hex[:8]}.old")
    if final.exists():
        os.rename(final, replaced)
    os.rename(tmp, final)
    _sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
    return manifest


def verify_folder(path: str | Path) -> list[str]:
    """Whatever differs between a published folder and its manifest, one message each; empty when sound.

    A file beside the manifest is a remark in the log, unless it looks like weights: readers such as DeepSpeed and vLLM
    find those by pattern, so one too many would be read.
    """
    path = Path(path)
    if not path.is_dir():
        return [f"{path}: no such folder"]
    try:
        expected = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [f"{path}: no {COMPLETE} file, so its writing never finished"]
    except ValueError as error:
        return [f"{path / COMPLETE}: not a JSON manifest ({error})"]
    if not isinstance(expected, dict):
        return [f"{path / COMPLETE}: not a JSON manifest (it holds a {type(expected).__name__})"]
    problems = [p for name, sha256 in expected.items() for p in _differs(path / name, sha256)]
    surplus = [name for name in _files(path) if name not in expected]
    problems += [
        f"{path / name}: not in the manifest" for name in surplus if name.endswith(_FOUND_BY_PATTERN)
    ]
    remarks = [name for name in surplus if not name.endswith(_FOUND_BY_PATTERN)]
    if remarks:
        log.warning("%s: left out of account, not being in its manifest: %s", path, ", ".join(remarks))
    return sorted(problems)


def _differs(path: Path, sha256: str) -> list[str]:
    """What is wrong with a file that a manifest names."""
    if not path.is_file():
        return [f"{path}: missing"]
    try:
        found = file_sha256(path)
    except OSError as error:
        return [f"{path}: cannot be read ({error.strerror})"]
    return [] if found == sha256 else [f"{path}: changed, its sha256 is {found} and not {sha256}"]


def _sync(path: Path) -> None:
    """Flush a file's bytes or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
