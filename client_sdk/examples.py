"""The device's own examples, in a SQLite file that never leaves it."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pocketfed.client_sdk.errors import ConfigurationError

MAX_TEXT = 1_000_000  # characters; longer texts are skipped, not cut
_SCHEMA = """
create table if not exists examples (
    id integer primary key autoincrement, -- never given twice: state() relies on it
    text text not null, text_pair text, label text,
    added_at real not null default ((julianday('now') - 2440587.5) * 86400.0) -- seconds since 1970
)"""


@dataclass(frozen=True)
class Stored:
    id: int
    text: str
    text_pair: str | None
    label: str | None


@dataclass(frozen=True)
class Added:
    """How many were kept, and how many were not, by reason."""

    added: int
    skipped: Mapping[str, int]


class ExampleStore:
    """Add, count, read and forget examples. Safe to use from several threads.

    A file that is no database is set aside (as *.damaged) and a new one begun: an app never crashes over it.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            self._db = self._open(path)
        except sqlite3.OperationalError:
            raise  # locked, or a full or forbidden disk: the examples are fine, keep them
        except sqlite3.DatabaseError:
            for suffix in ("", "-wal", "-shm"):  # the log belongs to the damaged file
                part = path.with_name(path.name + suffix)
                if part.exists():
                    part.replace(path.with_suffix(".damaged" + suffix))
            self._db = self._open(path)

    def _open(self, path: Path) -> sqlite3.Connection:
        db = sqlite3.connect(path, check_same_thread=False)
        try:
            db.execute("pragma journal_mode=wal")
            db.execute("pragma secure_delete=on")  # forgotten text is overwritten, not only unlinked
            if db.execute("pragma quick_check(1)").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError(f"{path} is damaged")
            db.execute(_SCHEMA)
            db.commit()
        except sqlite3.DatabaseError:
            db.close()
            raise
        return db

    def add(self, examples: Iterable[tuple[str, str | None] | tuple[str, str | None, str | None]]) -> Added:
        """(text, label) or (text, label, text_pair) each. Hostile text is skipped and counted, never an error."""
        given: object = examples
        if isinstance(given, str):
            raise ConfigurationError(f"add_examples got the text {given[:50]!r}; give a list of (text, label)")
        rows, skipped = [], dict[str, int]()
        for example in examples:
            shaped = isinstance(example, (tuple, list)) and len(example) in (2, 3)
            text, label, pair = (*example, None)[:3] if shaped else (None, None, None)
            reason = _unusable(text, label, pair)
            if reason:
                skipped[reason] = skipped.get(reason, 0) + 1
            else:
                rows.append((_clean(text), label, None if pair is None else _clean(pair)))
        with self._lock, self._db:
            self._db.executemany("insert into examples (text, label, text_pair) values (?, ?, ?)", rows)
        return Added(len(rows), skipped)

    def labelled(self) -> list[Stored]:
        """All examples with a label, oldest first."""
        with self._lock:
            rows = self._db.execute(
                "select id, text, text_pair, label from examples where label is not null order by id"
            ).fetchall()
        return [Stored(*row) for row in rows]

    def count(self, labelled: bool = False) -> int:
        condition = " where label is not null" if labelled else ""
        with self._lock:
            return int(self._db.execute(f"select count(*) from examples{condition}").fetchone()[0])

    def state(self) -> tuple[int, int]:
        """Changes whenever the examples do: their number and the newest id."""
        with self._lock:
            count, newest = self._db.execute("select count(*), coalesce(max(id), 0) from examples").fetchone()
        return int(count), int(newest)

    def forget(self, example_id: int | None = None) -> int:
        """Delete one example, or all. Returns how many were deleted."""
        with self._lock:
            with self._db:
                if example_id is None:
                    count = self._db.execute("delete from examples").rowcount
                else:
                    count = self._db.execute("delete from examples where id = ?", (example_id,)).rowcount
            self._db.execute("pragma wal_checkpoint(truncate)")  # the write-ahead log holds the text too
        return count

    def close(self) -> None:
        with self._lock:
            self._db.close()


def _clean(text: str) -> str:
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def _unusable(text: object, label: object, pair: object) -> str | None:
    if not isinstance(text, str) or not isinstance(pair, (str, type(None))):
        return "not text"
    if not _clean(text).strip():
        return "empty"
    if len(text) > MAX_TEXT or (pair is not None and len(pair) > MAX_TEXT):
        return f"longer than {MAX_TEXT} characters"
    if label is not None and (not isinstance(label, str) or not label or len(label) > 200 or _clean(label) != label):
        return "unusable label"
    return None
