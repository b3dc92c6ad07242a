"""What the commands print: tables and progress for people, JSON for programs."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datetime import datetime

    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

ROUND_COLUMNS = ("round", "accuracy", "loss", "devices", "failed", "up", "down", "seconds")


class CommandError(ValueError):
    """What is asked cannot be done."""


class UsageError(CommandError):
    """It was not asked rightly: an option, or what stands for one, is wrong."""


def console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False, default=str) + "\n")
    sys.stdout.flush()


def check_json(path: Path | None) -> None:
    """Better now than after an hour of training.

    Raises:
        CommandError: a file that cannot be written there.
    """
    check_file("--json", path)


def check_file(option: str, path: Path | None) -> None:
    """Can it be written, in a folder that is there? What an option names, before the work begins.

    Raises:
        CommandError: no.
    """
    if path is None:
        return
    folder = path.absolute().parent
    if path.is_dir():
        raise CommandError(f"{option} {path} is a folder; name a file")
    if not folder.is_dir():
        raise CommandError(f"{option} {path} cannot be written, there is no folder {folder}; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CommandError(f"{option} {path} cannot be written, you may not write into {folder}; name another place")


def check_folder(option: str, path: Path | None) -> None:
    """Is it a folder that can be written into, or can it be made, its parents with it?

    Raises:
        CommandError: no.
    """
    if path is None:
        return
    whole = path.absolute()
    there = next(place for place in (whole, *whole.parents) if place.exists())
    if not there.is_dir():
        told = "is a file" if there == whole else f"cannot be made, {there} is a file"
        raise CommandError(f"{option} {path} {told}; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise CommandError(f"{option} {path} cannot be written, you may not write into {there}; name another place")


def check_database(database: str | None) -> None:
    """Is it one that can be written to? One that is not there yet is not made: the command may yet fail otherwise.

    Raises:
        StoreError: no; the message says why.
    """
    from pocketfed.coordinator.store import Store, database_url

    if database is None:
        return
    url = database_url(database)
    if url.get_backend_name() == "sqlite" and not (url.database and Path(url.database).exists()):
        return
    Store(database).close()


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def format_bytes(count: float) -> str:
    """
    >>> format_bytes(1_500_000)
    '1.5 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table: Table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # Text: names are shown, never read as markup
    console().print(table)


def print_rows(title: str, rows: Sequence[Mapping[str, Any]], json: bool) -> None:
    """As a JSON list, or as a table whose columns are the first row's names."""
    if json:
        print_json(rows)
    else:
        columns = list(rows[0]) if rows else []
        print_table(title, columns, [["" if v is None else v for v in row.values()] for row in rows])


def format_moment(value: datetime | None) -> str | None:
    return None if value is None else f"{value:%Y-%m-%d %H:%M}"


def round_cells(result: Any) -> list[str]:
    """A RoundResult as a row of ROUND_COLUMNS."""
    accuracy = "" if result.accuracy is None else f"{result.accuracy:.4f}"
    loss = "" if result.loss is None else f"{result.loss:.4f}"
    return [
        str(result.number),
        accuracy,
        loss,
        str(result.devices),
        str(result.failed),
        format_bytes(result.bytes_up),
        format_bytes(result.bytes_down),
        f"{result.seconds:.1f}",
    ]


def print_round_header() -> None:
    print("".join(name.rjust(10) for name in ROUND_COLUMNS), flush=True)


def print_round(result: Any) -> None:
    reason = f"  {result.reason}" if result.reason else ""
    print("".join(cell.rjust(10) for cell in round_cells(result)) + reason, flush=True)


def format_skipped(skipped: Mapping[str, int]) -> str:
    """
    >>> format_skipped({"empty text": 2, "missing label": 1})
    'skipped 3 rows: 2 × empty text, 1 × missing label'
    """
    total = sum(skipped.values())
    reasons = ", ".join(f"{count} × {reason}" for reason, count in skipped.items())
    return f"skipped {total} row{'s' * (total != 1)}: {reasons}"


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Bars on stderr; nothing where that is not a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console(stderr=True),
        disable=not sys.stderr.isatty(),
    ) as bar:
        yield bar


TOLD_EVERY_S = 30.0


def stage_teller(bar: Progress) -> Callable[[Any], None]:
    """What `distilling.distill` calls with a `Tick`: one bar a stage; where there is no terminal, a line now and then."""
    tasks: dict[str, Any] = {}
    told = time.monotonic()

    def tell(tick: Any) -> None:
        nonlocal told
        note = (
            f"loss {tick.loss:.3f}, {tick.tokens_per_s:,.0f} tokens/s, {format_seconds(tick.seconds_left)} left in all"
        )
        if not bar.disable:
            if tick.stage not in tasks:
                tasks[tick.stage] = bar.add_task(tick.stage, total=tick.steps, note="")
            bar.update(tasks[tick.stage], completed=tick.step, note=note)
        elif time.monotonic() - told >= TOLD_EVERY_S:
            told = time.monotonic()
            print(f"{tick.stage}: step {tick.step} of {tick.steps}, {note}", file=sys.stderr, flush=True)

    return tell


def fraction_teller(bar: Progress) -> Callable[[str, float], None]:
    """What is called with a name of what is done and how much of it is: a bar, in place of the one before."""
    tasks: dict[str, Any] = {}

    def tell(what: str, fraction: float) -> None:
        if what not in tasks:
            for earlier in tasks.values():
                bar.update(earlier, visible=False)
            tasks[what] = bar.add_task(what, total=100, note="")
        bar.update(tasks[what], completed=round(100 * fraction))

    return tell


def format_seconds(seconds: float) -> str:
    """
    >>> format_seconds(59.4), format_seconds(3600), format_seconds(200_000)
    ('59 s', '60 min', '55.6 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def sizes_rows(sizes: Mapping[str, int]) -> list[list[str]]:
    return [[name, format_bytes(count), f"{sizes['fp32'] / count:.2f} x smaller"] for name, count in sizes.items()]
