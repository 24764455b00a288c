"""Tar shards in the WebDataset layout as random access files: where the members of each sample lie.

A sample's members share a KEY: the path up to the first dot of its last part; the rest of the name is the suffix.
"""

import io
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

from core.failures import DataError, SampleError


@dataclass(frozen=True)
class Member:
    """Where a file lies inside a shard, in bytes."""

    offset: int
    size: int


@dataclass(frozen=True)
class Listing:
    """Samples in the order of a shard: (key, members by suffix). `cut`: how the shard ends too early, or None."""

    samples: list[tuple[str, dict[str, Member]]]
    cut: str | None


def list_shard(path: str | Path) -> Listing:
    """The members of a shard by its headers alone. One that was cut off is listed up to there.

    Raises:
        DataError: not an uncompressed tar file at all.
    """
    found: dict[str, dict[str, Member]] = {}
    cut = None
    try:
        with tarfile.open(path, mode="r:") as tar:
            try:
                for info in tar:
                    if info.isfile():
                        key, suffix = _split(info.name)
                        found.setdefault(key, {})[suffix] = Member(info.offset_data, info.size)
            except tarfile.TarError as error:
                cut = f"cut off or damaged ({error})"
        if cut is None and not _closed(path, found):  # a file cut between two members looks whole to tarfile
            cut = "cut off, no end-of-archive block"
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path}: not an uncompressed tar file ({error}); copy or make it again") from error
    return Listing(list(found.items()), cut)


def read_member(file: io.BufferedIOBase, member: Member, name: str) -> bytes:
    """A member's bytes from an open shard. Raises SampleError, with the member's `name`, where it was cut off."""
    file.seek(member.offset)
    content = file.read(member.size)
    if len(content) != member.size:
        raise SampleError(f"{name} ends after {len(content)} of {member.size} bytes")
    return content


class MemberStream(io.RawIOBase):
    """A member as a file of its own, so that a picture's header is read without the rest of it."""

    def __init__(self, path: str | Path, member: Member) -> None:
        super().__init__()
        self._descriptor = os.open(path, os.O_RDONLY)
        self._member = member
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._member.size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        count = min(len(buffer), max(0, self._member.size - self._place))
        content = os.pread(self._descriptor, count, self._member.offset + self._place)
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def _split(name: str) -> tuple[str, str]:
    folder, _, base = name.removeprefix("./").rpartition("/")
    key, _, suffix = base.partition(".")
    return f"{folder}/{key}" if folder else key, suffix


def _closed(path: str | Path, found: dict[str, dict[str, Member]]) -> bool:
    end = max((m.offset + m.size for files in found.values() for m in files.values()), default=0)
    with open(path, "rb") as file:
        file.seek(-(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
