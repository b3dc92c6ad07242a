"""db upgrade, db check: what concerns a database by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketfed.cli.options import Database, group
from pocketfed.cli.output import CommandError

if TYPE_CHECKING:
    from pocketfed.coordinator.store import Store

app = group("Look after a database: upgrade its schema, copy it, check what it holds.")


@contextmanager
def opened(database: str, **how: bool) -> Iterator[Store]:
    """A database for as long as a command looks at it. how: Store's create and must_exist."""
    from pocketfed.coordinator.store import Store

    store = Store(database, **how)
    try:
        yield store
    finally:
        store.close()


@app.command()
def upgrade(database: Database) -> None:
    """Bring the schema to what this version needs: all of it or, if that fails, nothing."""
    with opened(database, must_exist=True) as store:
        print(f"{store.name} has the newest schema")


@app.command()
def backup(
    database: Database,
    out: Annotated[Path, typer.Option(help="The copy: a file that does not exist.")],
) -> None:
    """Copy a SQLite database as it is at one moment, while it is in use. For PostgreSQL there is pg_dump."""
    import contextlib
    import os
    import sqlite3

    with opened(database, create=False) as store:
        pass  # it is one, and has the newest schema
    if store.file is None:
        raise CommandError(f"{store.name} is no SQLite file; copy it with `pg_dump --format=custom --file={out}`")
    if out.exists() or not out.absolute().parent.is_dir():
        raise CommandError(f"{out} is there already, or its folder is not; give a new file in a folder that exists")
    partial = out.with_name(f".{out.name}.partial")
    partial.unlink(missing_ok=True)
    with (
        contextlib.closing(sqlite3.connect(store.file)) as source,
        contextlib.closing(sqlite3.connect(partial)) as copy,
    ):
        source.backup(copy)  # in one step: what is written meanwhile is not in it, and does not wait for it
        copy.execute("PRAGMA journal_mode=DELETE")  # the copy is one file
    os.replace(partial, out)
    print(f"{out} is a copy of {store.name} ({out.stat().st_size:,} bytes)")


@app.command()
def check(
    database: Database,
    spool: Annotated[Path | None, typer.Option(help="Where uploads lie; by default beside the database.")] = None,
) -> None:
    """Read every byte and compare it with its digest; fails if anything is missing or damaged. Changes nothing."""
    from pocketfed.coordinator.assignments import Assignments
    from pocketfed.coordinator.integrity import find_problems
    from pocketfed.coordinator.server import default_spool

    with opened(database, create=False) as store:
        problems = list(find_problems(store, Assignments(store, spool or default_spool(store))))
    for problem in problems:
        print(problem)
    if problems:
        raise CommandError(f"{store.name} has {len(problems)} problem{'s' * (len(problems) != 1)}")
    print(f"{store.name} is sound")
