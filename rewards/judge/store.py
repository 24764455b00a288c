"""An SQLite file that several worker processes share: opened with its kind and version checked.

The journal is a rollback journal, since WAL needs memory that all processes share and breaks on network file
systems; it is emptied rather than deleted, and synchronous is NORMAL, which halves the time of a write (5 to 20 ms
where a flush to disk takes 5). What was committed outlives a killed process. Locks are POSIX file locks, so a
file that workers of several nodes share must lie on a file system that has them.
Calls block for up to BUSY_S; make them away from the event loop.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BUSY_S = 30.0


class StoreError(Exception):
    """The file cannot be used: missing, damaged, of another kind or version, or not writable."""


class StoreBusyError(StoreError):
    """Another process held the file's lock for longer than BUSY_S."""


class Store:
    """One file, opened at the first use and safe to use from several threads. A subclass is a kind of file.

    name, kind: what the file is, in words for errors and as a number that marks it (SQLite's application_id).
    version: of its table, which `schema` makes.
    """

    name: str
    kind: int
    version: int
    schema: str

    def __init__(self, path: str, *, read_only: bool = False) -> None:
        """read_only: never make or change the file."""
        self.path = path
        self._read_only = read_only
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.Lock()

    @contextmanager
    def transaction(self, *, write: bool) -> Iterator[sqlite3.Connection]:
        """All inside happens at once or not at all; with `write`, alone among writers. Raises StoreError."""
        try:
            with self._lock:
                if self._connection is None:
                    self._connection = self._open()
                with _transaction(self._connection, write=write):
                    yield self._connection
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
                raise StoreBusyError(f"{self.path} was locked for {BUSY_S:g} s by another process") from error
            raise StoreError(
                f"{self.path} cannot be used ({error}); put a copy in its place or give another path"
            ) from error
        except OSError as error:
            raise StoreError(f"{self.path} cannot be made: {error.strerror}; give another path") from error

    def check(self) -> None:
        """Open the file, if it is not open yet. Raises StoreError."""
        with self.transaction(write=False):
            pass

    def close(self) -> None:
        """It opens again at the next use."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    def _open(self) -> sqlite3.Connection:
        path = Path(self.path).absolute()
        if self._read_only and not path.is_file():
            raise StoreError(f"{self.path}: no such file; make it with mode record, or give the right path")
        if not self._read_only:
            path.parent.mkdir(parents=True, exist_ok=True)
        # Also for reading alone the file is opened for writing if it can be: a crash may have left a journal to
        # roll back.
        uri = f"{path.as_uri()}?mode={'rw' if self._read_only else 'rwc'}"
        connection = sqlite3.connect(
            uri, uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False
        )
        try:
            with _transaction(connection, write=not self._read_only):
                self._prepare(connection)
            with _transaction(connection, write=False):  # a second for some 100 MB, in which others may write
                # Lost or garbled pages are refused now, not at the first row that lies on one.
                found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise StoreError(
                    f"{self.path} is damaged ({found}); put a copy in its place or give another path"
                )
            if self._read_only:
                connection.execute("PRAGMA query_only = 1")
            else:
                connection.execute("PRAGMA journal_mode = TRUNCATE")
                connection.execute("PRAGMA synchronous = NORMAL")
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Make the table of an empty file; refuse a foreign one."""
        kind, version = (
            connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
        tables = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
        if not (kind or version or tables or self._read_only):
            connection.execute(self.schema)
            connection.execute(f"PRAGMA application_id = {self.kind}")
            connection.execute(f"PRAGMA user_version = {self.version}")
        elif kind != self.kind:
            raise StoreError(f"{self.path} is not {self.name}; give another path")
        elif version != self.version:
            raise StoreError(
                f"{self.path} is {self.name} of version {version}, and this code reads version {self.version}; "
                "give another path, or use the release that wrote it"
            )


@contextmanager
def _transaction(connection: sqlite3.Connection, *, write: bool) -> Iterator[None]:
    with connection:  # commits, or rolls back what raised
        connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
        yield
