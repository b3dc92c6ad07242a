"""The open database: for all pages one that cannot write, and one that can, for log-ins and the gated acts alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
import streamlit as st

from pocketfed.coordinator.store import Store, StoreError, database_url
from pocketfed.dashboard.launch import DATABASE_VARIABLE


class NothingToShowError(Exception):
    """The page has nothing to show, for a reason that is no fault of the reader; `sentence` says what to do."""

    def __init__(self, title: str, sentence: str) -> None:
        super().__init__(f"{title}: {sentence}")
        self.title = title
        self.sentence = sentence


def store() -> Store:
    """The store named by the environment, to read from.

    Raises:
        NothingToShowError: no database is named, or it cannot be used.
    """
    database = _named()
    try:
        return _open(database, _file_identity(database))
    except StoreError as error:
        raise NothingToShowError("The database cannot be shown", str(error)) from None


@contextmanager
def writing() -> Iterator[Store]:
    """The same store to write to, for one act.

    Raises:
        NothingToShowError: as `store`. sqlalchemy's DBAPIError: this account may only read.
    """
    try:
        opened = Store(_named(), create=False)
    except StoreError as error:
        raise NothingToShowError("The database cannot be used", str(error)) from None
    try:
        yield opened
    finally:
        opened.close()


def _named() -> str:
    database = os.environ.get(DATABASE_VARIABLE, "")
    if not database:
        raise NothingToShowError(
            "No database is named", f"set {DATABASE_VARIABLE}, or start `pocketfed dashboard --database fleet.db`"
        )
    return database


@st.cache_resource(show_spinner=False, max_entries=4, on_release=Store.close)  # else its connections end when collected
def _open(database: str, identity: int | None) -> Store:
    """One engine for all readers. `identity` changes with the file, so that a database made anew is opened anew."""
    del identity
    opened = Store(database, create=False)
    sa.event.listen(opened.engine, "connect", _forbid_writes)
    opened.engine.dispose()  # connections from before the rule
    return opened


def _forbid_writes(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    is_sqlite = type(connection).__module__.startswith("sqlite3")
    cursor.execute("PRAGMA query_only=ON" if is_sqlite else "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")
    cursor.close()
    connection.commit()


def _file_identity(database: str) -> int | None:
    url = database_url(database)
    if url.get_backend_name() != "sqlite" or url.database is None:
        return 0
    try:
        return os.stat(url.database).st_ino
    except OSError:
        return None
