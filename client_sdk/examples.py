"""The device's own examples, in a SQLite file that never leaves it."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pocketfed.client_sdk import example_rows as rows
from pocketfed.client_sdk.clock import Clock
from pocketfed.client_sdk.errors import ConfigurationError, StorageError
from pocketfed.client_sdk.private_database import PrivateDatabase
from pocketfed.client_sdk.sealing import Seal, Unreadable

log = logging.getLogger("pocketfed")

MAX_TEXT = 1_000_000  # characters; longer texts are skipped, not cut
MAX_LABEL = 200
Given = tuple[str, str | None] | tuple[str, str | None, str | None]


@dataclass(frozen=True)
class Stored:
    id: int
    text: str
    text_pair: str | None
    label: str | None


@dataclass(frozen=True)
class Added:
    """How many were kept, and how many were not, by reason; ids: one for each that was given, 0 for one not kept."""

    added: int
    skipped: Mapping[str, int]
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Usable:
    """What a model can learn from: so many examples of so many labels; unknown: have a label that it does not know."""

    examples: int
    labels: int
    unknown: int


class ExampleStore:
    """Add, label, count, read and forget examples. Safe to use from several threads.

    A file that is no database is set aside (as *.damaged) and a new one begun: an app never crashes over it.

    Args:
        key: 32 bytes that the app keeps; examples are encrypted with it, those that are there already too.
        max_examples: so many are kept, the oldest go first; by default all.
        max_age_days: older ones go; by default none do.
        clock: what time it is; for tests.

    Raises:
        ConfigurationError: the key is not the one of this store, a limit below 1, or a newer version's store.
    """

    def __init__(
        self,
        path: Path,
        key: bytes | None = None,
        max_examples: int | None = None,
        max_age_days: float | None = None,
        clock: Clock | None = None,
    ) -> None:
        if max_examples is not None and max_examples < 1:
            raise ConfigurationError(f"max_examples is {max_examples}; give 1 or more, or None for no limit")
        if max_age_days is not None and not max_age_days > 0:
            raise ConfigurationError(f"max_age_days is {max_age_days}; give more than 0, or None for no limit")
        self._max_examples, self._max_age_days = max_examples, max_age_days
        self._clock = clock or Clock()
        self._seal = None if key is None else Seal(key)
        self._counted: tuple[int, Mapping[str, int]] | None = None
        self._file = PrivateDatabase(path, self._prepare)
        try:
            self.expire()
        except StorageError as error:
            log.warning("no examples for now: %s", error)

    def add(self, examples: Iterable[Given]) -> Added:
        """(text, label) or (text, label, text_pair) each; label None where it is not known yet.

        Hostile text, and what a full disk has no room for, is skipped and counted, never an error.
        """
        given: object = examples
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise ConfigurationError(f"add_examples got the text {str(given)[:50]!r}; give a list of (text, label)")
        checked = [_checked(example) for example in examples]
        skipped = Counter(reason for reason in checked if isinstance(reason, str))
        usable = [row for row in checked if not isinstance(row, str)]
        try:
            new = iter(self._file.write(lambda db: rows.insert(db, self._seal, usable, self._now())))
        except StorageError as error:
            log.warning("%d examples are not kept: %s", len(usable), error)
            skipped[f"not stored: {error.__cause__}"] += len(usable)
            return Added(0, dict(+skipped), (0,) * len(checked))
        with contextlib.suppress(StorageError):  # those that are too old go next time
            self.expire()
        return Added(len(usable), dict(skipped), tuple(0 if isinstance(row, str) else next(new) for row in checked))

    def correct(self, example_id: int, label: str | None) -> bool:
        """Say what an example's label is; None: that it is not known. False where nothing was changed.

        That is: it is not there (any more), the label cannot be one, or the disk is full.
        """
        if not _is_id(example_id) or (label is not None and not _is_label(label)):
            return False
        try:
            return self._file.write(lambda db: rows.relabel(db, self._seal, example_id, label))
        except StorageError as error:
            log.warning("example %d keeps its label: %s", example_id, error)
            return False

    def labelled(self) -> Iterator[Stored]:
        """All examples with a label, oldest first, read from the file as they are asked for."""
        last, unreadable = 0, 0
        while found := self._file.read(partial(rows.page, after=last, labelled=True)):
            for row in found:
                try:
                    yield Stored(row[0], *rows.open_row(self._seal, row))
                except Unreadable:
                    unreadable += 1
            last = found[-1][0]
        if unreadable:
            log.warning("%d examples are not as they were encrypted; they are left out", unreadable)

    def count(self, labelled: bool = False) -> int:
        condition = " where label is not null" if labelled else ""
        return int(self._file.read(lambda db: db.execute(f"select count(*) from examples{condition}").fetchone()[0]))

    def label_counts(self) -> Mapping[str, int]:
        """How many examples have each label."""
        state = self.state()
        if self._counted is None or self._counted[0] != state:
            self._counted = (state, self._file.read(lambda db: rows.count_labels(db, self._seal)))
        return self._counted[1]

    def state(self) -> int:
        """Changes whenever a labelled example is added, changed or deleted."""
        query = "select value from facts where name = 'changes'"
        return int(self._file.read(lambda db: db.execute(query).fetchone()[0]))

    def forget(self, example_id: int | None = None) -> int:
        """Delete one example, or all and what was set aside of damaged stores. Returns how many were deleted.

        Where a full disk has no room for the change, all are forgotten by overwriting and deleting the file.

        Raises:
            StorageError: it may still be there; free some space and ask again.
        """
        if example_id is None:
            count = self._forget_all()
            self._file.drop_damaged()
        elif _is_id(example_id):
            count = self._file.write(lambda db: db.execute("delete from examples where id = ?", (example_id,)).rowcount)
        else:
            return 0
        self._file.scrub()
        return count

    def _forget_all(self) -> int:
        count = 0
        try:
            count = self.count()
            return self._file.write(lambda db: db.execute("delete from examples").rowcount)
        except StorageError:
            self._file.discard()
            return count

    def expire(self) -> int:
        """Delete what is over the limits, the oldest first. Returns how many were deleted."""
        now, count = self._now(), self._max_examples

        def over(db: sqlite3.Connection) -> int:
            deleted = 0
            if self._max_age_days is not None:
                before = now - 86400 * self._max_age_days
                deleted += db.execute("delete from examples where added_at < ?", (before,)).rowcount
            if count is not None:
                newest_to_go = "select id from examples order by id desc limit 1 offset ?"
                deleted += db.execute(f"delete from examples where id <= ({newest_to_go})", (count,)).rowcount
            return deleted

        deleted = self._file.write(over)
        if deleted:
            self._file.scrub()
        if self._max_age_days is not None:
            self._file.drop_damaged(now - 86400 * self._max_age_days)
        return deleted

    def rekey(self, key: bytes) -> None:
        """Encrypt everything with another key, in one transaction. Keep both keys until this has returned.

        Raises:
            StorageError: the old key still holds. ConfigurationError: this is no key.
        """
        new = Seal(key)

        def again(db: sqlite3.Connection) -> None:
            rows.reseal(db, self._seal, new)
            self._seal = new
            rows.finish_sealing(db)

        self._file.read(again)
        self._file.drop_damaged()

    def close(self) -> None:
        self._file.close()

    def _now(self) -> float:
        """Seconds since 1970."""
        return self._clock.now().timestamp()

    def _prepare(self, db: sqlite3.Connection) -> None:
        if rows.prepare(db, self._file.path, self._seal):
            self._file.drop_damaged()  # it could be read without the key


def usable(counts: Mapping[str, int], known: Collection[str]) -> Usable:
    """What of these labels a model can learn from that knows those.

    >>> usable({"music": 2, "of an older model": 1}, ("alarm", "music"))
    Usable(examples=2, labels=1, unknown=1)
    """
    mine = [counts[label] for label in set(known) & counts.keys()]
    return Usable(sum(mine), len(mine), sum(counts.values()) - sum(mine))


def _checked(example: object) -> rows.Row | str:
    """What to keep of it, or the reason why nothing."""
    if not isinstance(example, (tuple, list)) or len(example) not in (2, 3):
        return "not text"
    text, label, pair = (*example, None)[:3]
    if not isinstance(text, str) or not isinstance(pair, (str, type(None))):
        return "not text"
    if len(text) > MAX_TEXT or (pair is not None and len(pair) > MAX_TEXT):
        return f"longer than {MAX_TEXT} characters"
    if not _clean(text).strip():
        return "empty"
    if label is not None and not _is_label(label):
        return "unusable label"
    return _clean(text), None if pair is None else _clean(pair), label


def _clean(text: str) -> str:
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def _is_label(label: object) -> bool:
    return isinstance(label, str) and 0 < len(label) <= MAX_LABEL and _clean(label) == label


def _is_id(example_id: object) -> bool:
    """SQLite's integers have 64 bits."""
    return isinstance(example_id, int) and 0 < example_id < 1 << 63
