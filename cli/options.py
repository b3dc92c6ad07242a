"""Options that several commands have, and groups of commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Database = Annotated[str, typer.Option(help="A file for SQLite, or any SQLAlchemy URL.")]
KeysFolder = Annotated[
    Path | None, typer.Option("--keys", help="The publisher's private keys; by default beside the database.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Seed = Annotated[int, typer.Option(min=0, help="Same seed, same result.")]


def group(help_: str) -> typer.Typer:
    """Commands of two words: `pocketfed GROUP COMMAND`."""
    return typer.Typer(help=help_, rich_markup_mode=None, add_completion=False)
