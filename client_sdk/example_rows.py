"""How examples lie in SQLite: tables, their versions, and cells that are encrypted where there is a key."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

from pocketfed.client_sdk.errors import ConfigurationError
from pocketfed.client_sdk.private_database import Damaged, scrub, transaction
from pocketfed.client_sdk.sealing import Seal, Unreadable

log = logging.getLogger("pocketfed")

PAGE = 100  # examples that are read at once
VERSION = 1  # of the tables; 0, as SDK 0.2 made them, had `examples` alone
_COLUMNS = ("text", "text_pair", "label")
_SCHEMA = """
create table if not exists examples (
    id integer primary key autoincrement, -- never given twice
    text text not null, text_pair text, label text, -- blobs where they are encrypted
    added_at real not null default ((julianday('now') - 2440587.5) * 86400.0) -- seconds since 1970
);
create index by_age on examples (added_at);
-- that there is a label, not which
create index labelled on examples (id) where label is not null;
create table facts (name text primary key, value) without rowid;
-- begun anywhere: no other store has the same state
insert into facts values ('changes', abs(random()) >> 16);
create trigger added after insert on examples when new.label is not null
    begin update facts set value = value + 1 where name = 'changes'; end;
create trigger changed after update on examples when new.label is not null or old.label is not null
    begin update facts set value = value + 1 where name = 'changes'; end;
create trigger deleted after delete on examples when old.label is not null
    begin update facts set value = value + 1 where name = 'changes'; end;
"""

Row = tuple[str, str | None, str | None]  # as _COLUMNS


def prepare(db: sqlite3.Connection, path: Path, seal: Seal | None) -> bool:
    """Bring a file of any version up to date, and see that the key fits. True if it is encrypted only now.

    Raises:
        ConfigurationError: no key, the wrong one, or a newer version's file.
    """
    version = int(db.execute("pragma user_version").fetchone()[0])
    if version <= VERSION and not _is_ours(db, version):
        raise Damaged("it is another program's")
    if version > VERSION:
        raise ConfigurationError(
            f"{path} has version {version}, this SDK knows {VERSION}; update the app, or delete the file"
        )
    if version < VERSION:
        with transaction(db):
            for statement in _SCHEMA.split(";\n"):
                db.execute(statement)
            db.execute(f"pragma user_version={VERSION}")
    check = db.execute("select value from facts where name = 'check'").fetchone()
    if check is not None:
        _unlock(path, check[0], seal)
    elif seal is not None:
        reseal(db, None, seal)
    finish_sealing(db)
    return check is None and seal is not None


def _is_ours(db: sqlite3.Connection, version: int) -> bool:
    tables = {name for (name,) in db.execute("select name from sqlite_master where type = 'table'")}
    columns = {row[1] for row in db.execute("pragma table_info(examples)")}
    if version == 0 and not tables:
        return True  # just made
    known = {"examples"} if version == 0 else {"examples", "facts"}
    return tables & {"examples", "facts"} == known and columns == {"id", *_COLUMNS, "added_at"}


def _unlock(path: Path, check: bytes, seal: Seal | None) -> None:
    if seal is None:
        raise ConfigurationError(f"{path} is encrypted; give the key that it was encrypted with")
    try:
        seal.open(check, "check")
    except Unreadable:
        raise ConfigurationError(
            f"the key is not the one that {path} was encrypted with; give that one, or delete the file"
        ) from None


def insert(db: sqlite3.Connection, seal: Seal | None, rows: list[Row], added_at: float) -> list[int]:
    """Returns their ids. added_at: seconds since 1970."""
    (last,) = db.execute("select coalesce(max(seq), 0) from sqlite_sequence where name = 'examples'").fetchone()
    ids = list(range(last + 1, last + 1 + len(rows)))
    cells = ((i, *_close_row(seal, i, row), added_at) for i, row in zip(ids, rows, strict=True))
    db.executemany("insert into examples values (?, ?, ?, ?, ?)", cells)
    return ids


def relabel(db: sqlite3.Connection, seal: Seal | None, example_id: int, label: str | None) -> bool:
    """Whether there is such an example."""
    cell = _close(seal, f"{example_id}/label", label)
    return db.execute("update examples set label = ? where id = ?", (cell, example_id)).rowcount > 0


def count_labels(db: sqlite3.Connection, seal: Seal | None) -> Counter[str]:
    if seal is None:
        return Counter(dict(db.execute("select label, count(*) from examples where label is not null group by label")))
    counts = Counter[str]()
    for example_id, cell in db.execute("select id, label from examples where label is not null"):
        with contextlib.suppress(Unreadable):
            counts[str(_open(seal, f"{example_id}/label", cell))] += 1
    return counts


def page(db: sqlite3.Connection, after: int, labelled: bool = False) -> list[Any]:
    """The next examples by id, as they lie in the file."""
    condition = "and label is not null" if labelled else ""
    query = f"select id, text, text_pair, label from examples where id > ? {condition} order by id limit {PAGE}"
    return db.execute(query, (after,)).fetchall()


def _close(seal: Seal | None, place: str, value: str | None) -> str | bytes | None:
    return value if seal is None or value is None else seal.seal(value, place)


def _open(seal: Seal | None, place: str, cell: str | bytes | None) -> str | None:
    """
    Raises:
        Unreadable: plain where it should be sealed, sealed where it should be plain, or with another key.
    """
    if cell is None or (seal is None and isinstance(cell, str)):
        return cell
    if seal is None or not isinstance(cell, bytes):
        raise Unreadable(place)
    return seal.open(cell, place)


def _close_row(seal: Seal | None, example_id: int, row: Row) -> list[str | bytes | None]:
    return [_close(seal, f"{example_id}/{column}", value) for column, value in zip(_COLUMNS, row, strict=True)]


def open_row(seal: Seal | None, row: Any) -> Row:
    text, pair, label = (
        _open(seal, f"{row[0]}/{column}", cell) for column, cell in zip(_COLUMNS, row[1:], strict=True)
    )
    return str(text), pair, label


def reseal(db: sqlite3.Connection, old: Seal | None, new: Seal) -> None:
    """All rows from one key to another, in one transaction."""
    with transaction(db):
        last, lost = 0, 0
        while found := page(db, last):
            for row in found:
                try:
                    cells = _close_row(new, row[0], open_row(old, row))
                    db.execute("update examples set text = ?, text_pair = ?, label = ? where id = ?", (*cells, row[0]))
                except Unreadable:
                    lost += db.execute("delete from examples where id = ?", (row[0],)).rowcount
            last = found[-1][0]
        if lost:
            log.warning("%d examples cannot be read with the key; they are deleted", lost)
        db.execute("insert or replace into facts values ('check', ?)", (new.seal("pocketfed", "check"),))
        db.execute("insert or replace into facts values ('old pages', 1)")


def finish_sealing(db: sqlite3.Connection) -> None:
    """Overwrite the pages that held what was there before; where a full disk forbids it, when next opened."""
    if db.execute("select 1 from facts where name = 'old pages'").fetchone():
        try:
            db.execute("vacuum")
            db.execute("delete from facts where name = 'old pages'")
            scrub(db)
        except sqlite3.OperationalError as error:
            log.warning("what was encrypted now is not yet overwritten: %s", error)
