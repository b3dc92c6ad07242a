"""db upgrade, db check: what concerns a database by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketfed.cli.output import CommandError

Database = Annotated[str, typer.Option(help="A file for SQLite, or any SQLAlchemy URL.")]

app = typer.Typer(help="Look after a database: upgrade its schema, check what it holds.", no_args_is_help=True)


@app.command()
def upgrade(database: Database) -> None:
    """Bring the schema to what this version needs: all of it or, if that fails, nothing."""
    from pocketfed.coordinator.store import Store

    store = Store(database, must_exist=True)
    store.close()
    print(f"{store.name} has the newest schema")


@app.command()
def check(
    database: Database,
    spool: Annotated[Path | None, typer.Option(help="Where uploads lie; by default beside the database.")] = None,
) -> None:
    """Read every byte and compare it with its digest; fails if anything is missing or damaged. Changes nothing."""
    from pocketfed.coordinator.assignments import Assignments
    from pocketfed.coordinator.integrity import find_problems
    from pocketfed.coordinator.server import default_spool
    from pocketfed.coordinator.store import Store

    store = Store(database, create=False)
    try:
        problems = list(find_problems(store, Assignments(store, spool or default_spool(store))))
    finally:
        store.close()
    for problem in problems:
        print(problem)
    if problems:
        raise CommandError(f"{store.name} has {len(problems)} problem{'s' * (len(problems) != 1)}")
    print(f"{store.name} is sound")
