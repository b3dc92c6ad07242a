"""The coordinator and its database: who serves, what calls cost, how much lies there."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.store import Assignment, Lease, Vitals

TABLES = ("devices", "runs", "rounds", "assignments", "updates", "metrics", "history", "chunks", "audit", "vitals")
OPEN = ("offered", "accepted", "uploaded")
FIGURES = (
    "calls", "errors", "p50_ms", "p95_ms", "p99_ms", "bytes_in", "bytes_out", "write_ms", "devices", "polls", "queue",
    "spool_files", "spool_bytes", "rss_bytes", "open_files",
)  # fmt: skip


@dataclass(frozen=True)
class VitalLine:
    """How the leading coordinator did in the `seconds` before `at`."""

    at: datetime
    seconds: float
    calls: int
    errors: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    bytes_in: int
    bytes_out: int
    write_ms: float
    devices: int
    polls: int
    queue: int
    spool_files: int
    spool_bytes: int
    rss_bytes: int
    open_files: int


def vitals(session: Session, since: datetime, most: int = 360) -> list[VitalLine]:
    """The figures since then, in order of time: every one, or so many of them that `most` are left."""
    names = ("at", "seconds", *FIGURES)
    place = sa.func.row_number().over(order_by=Vitals.at.desc()).label("place")
    rows = sa.select(*(getattr(Vitals, name) for name in names), place).where(Vitals.at >= since).subquery()
    count = session.scalar(sa.select(sa.func.count()).select_from(Vitals).where(Vitals.at >= since)) or 0
    step = max(1, -(-count // most))
    query = sa.select(*(rows.c[name] for name in names)).where(rows.c.place % step == (1 if step > 1 else 0))
    return [VitalLine(*row) for row in session.execute(query.order_by(rows.c.at))]


def newest_vitals(session: Session) -> VitalLine | None:
    found = session.scalars(sa.select(Vitals).order_by(Vitals.at.desc()).limit(1)).first()
    return None if found is None else VitalLine(found.at, found.seconds, *(getattr(found, n) for n in FIGURES))


def lease(session: Session) -> tuple[str, datetime] | None:
    """Who serves this database and until when it holds it; nobody's name is "". None: no coordinator has ever."""
    row = session.execute(sa.select(Lease.holder, Lease.held_until).where(Lease.name == "coordinator")).first()
    return None if row is None else (row[0], row[1])


def open_work(session: Session) -> dict[str, int]:
    """Assignments that are under way, by status."""
    query = sa.select(Assignment.status, sa.func.count()).where(Assignment.status.in_(OPEN)).group_by(Assignment.status)
    found = {row[0]: row[1] for row in session.execute(query)}
    return {status: found.get(status, 0) for status in OPEN}


def database_bytes(session: Session) -> int:
    """What the database takes on its disk, free pages included."""
    if session.get_bind().dialect.name == "sqlite":
        pages = session.execute(sa.text("SELECT page_count FROM pragma_page_count")).scalar_one()
        size = session.execute(sa.text("SELECT page_size FROM pragma_page_size")).scalar_one()
        return int(pages) * int(size)
    return int(session.execute(sa.text("SELECT pg_database_size(current_database())")).scalar_one())


def table_rows(session: Session) -> dict[str, int]:
    """About how many rows tables hold: SQLite's highest row number, PostgreSQL's last estimate. Neither is a count."""
    if session.get_bind().dialect.name == "sqlite":
        highest = {name: sa.text(f"SELECT max(rowid) FROM {name}") for name in TABLES}
        return {name: int(session.execute(query).scalar() or 0) for name, query in highest.items()}
    query = sa.text(
        "SELECT relname, reltuples FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace "
        "WHERE n.nspname = current_schema() AND relkind = 'r'"
    )
    found = {row[0]: max(0, int(row[1])) for row in session.execute(query)}
    return {name: found.get(name, 0) for name in TABLES}
