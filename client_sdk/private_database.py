"""One SQLite file for this user alone: what is deleted is overwritten, and damage costs the content, never the app."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from pocketfed.client_sdk.errors import ConfigurationError, StorageError

log = logging.getLogger("pocketfed")

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]
ZEROS = 1 << 16
PARTS = ("", "-wal", "-shm")  # the log belongs to the file


class Damaged(sqlite3.DatabaseError):
    """It can be opened, but is not what it should be."""


class PrivateDatabase:
    """Safe to use from several threads. It is opened when first needed, so a disk that is full now may do later.

    Args:
        prepare: called with every connection before it is used: creates and upgrades tables.
        busy_s: how long to wait for another program that has locked the file.
    """

    def __init__(self, path: Path, prepare: Work[None], busy_s: float = 5.0) -> None:
        self.path = path
        self._prepare, self._busy_s = prepare, busy_s
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._closed = False

    def read(self, work: Work[T]) -> T:
        """What `work` gives.

        Raises:
            StorageError: the file cannot be read now; ConfigurationError: it was closed, or is a newer version's.
        """
        with self._lock:
            try:
                try:
                    return work(self._open())
                except sqlite3.DatabaseError as error:
                    if not _is_damage(error):
                        raise
                    self._set_aside(error)
                    return work(self._open())
            except (sqlite3.Error, OSError) as error:
                raise StorageError(f"{self.path} cannot be used now: {error}; the next call tries it again") from error

    def write(self, work: Work[T]) -> T:
        """As `read`, in one transaction."""

        def transact(db: sqlite3.Connection) -> T:
            with transaction(db):
                return work(db)

        return self.read(transact)

    def scrub(self) -> None:
        """The write-ahead log holds what was deleted too: empty it."""
        with contextlib.suppress(StorageError):  # a full disk: it is emptied when next opened, or next time
            self.read(scrub)

    def drop_damaged(self, before: float = math.inf) -> None:
        """Delete what was set aside, if it was last written before that time (seconds since 1970)."""
        for part in PARTS:
            old = self.path.with_suffix(".damaged" + part)
            if old.exists() and old.stat().st_mtime < before:
                old.unlink()

    def discard(self) -> None:
        """Overwrite and delete the file itself, which needs no space; it is begun anew with the next call.

        Raises:
            StorageError: it may still be there.
        """
        with self._lock:
            try:
                if self._connection is not None:
                    self._connection.close()
                    self._connection = None
                for part in PARTS:
                    _shred(self.path.with_name(self.path.name + part))
            except (sqlite3.Error, OSError) as error:
                raise StorageError(f"{self.path} cannot be deleted: {error}; close what else uses it") from error

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._connection is not None:
                self._connection.close()

    def _open(self) -> sqlite3.Connection:
        if self._closed:
            raise ConfigurationError(f"{self.path} was closed; open it anew")
        if self._connection is None:
            _make_private(self.path)
            db = sqlite3.connect(self.path, timeout=self._busy_s, check_same_thread=False, isolation_level=None)
            try:
                db.execute("pragma journal_mode=wal")
                db.execute("pragma secure_delete=on")  # overwritten, not only unlinked
                db.execute("pragma temp_store=memory")  # no text in a temporary file
                if db.execute("pragma quick_check(1)").fetchone()[0] != "ok":
                    raise Damaged("its pages do not fit together")
                self._prepare(db)
                scrub(db)  # what a process that was killed has left there
            except BaseException:
                db.close()
                raise
            self._connection = db
        return self._connection

    def _set_aside(self, error: sqlite3.DatabaseError) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        log.warning("%s is damaged (%s); it is set aside as *.damaged and begun anew", self.path, error)
        for part in PARTS:
            old = self.path.with_name(self.path.name + part)
            if old.exists():
                old.replace(self.path.with_suffix(".damaged" + part))


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All of it or nothing."""
    db.execute("begin immediate")
    try:
        yield
        db.execute("commit")
    except BaseException:
        if db.in_transaction:  # on a full disk SQLite may have rolled back already
            db.execute("rollback")
        raise


def scrub(db: sqlite3.Connection) -> None:
    db.execute("pragma wal_checkpoint(truncate)")


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Not a full, locked or forbidden disk: then the content is fine, and is kept."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return isinstance(error, Damaged) or code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _shred(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        with path.open("r+b", buffering=0) as file:
            size = path.stat().st_size
            for start in range(0, size, ZEROS):
                file.write(bytes(min(ZEROS, size - start)))
            os.fsync(file.fileno())
        path.unlink()


def _make_private(path: Path) -> None:
    """SQLite gives its log the mode of the file."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)
