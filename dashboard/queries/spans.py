"""Time between two columns, on both kinds of database, and histograms counted in SQL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session

LARGEST = 1e300


@dataclass(frozen=True)
class Bin:
    """A bar of a histogram: `count` values in [low, high)."""

    low: float
    high: float
    count: int


class seconds_between(sa.sql.functions.FunctionElement[float]):  # noqa: N801 - used like a function
    """Seconds from the first column to the second; None where either is."""

    type = sa.Float()
    inherit_cache = True


@compiles(seconds_between, "sqlite")
def _sqlite(element: Any, compiler: Any, **options: Any) -> str:
    start, end = (compiler.process(clause, **options) for clause in element.clauses)
    return f"((julianday({end}) - julianday({start})) * 86400.0)"


@compiles(seconds_between, "postgresql")
def _postgresql(element: Any, compiler: Any, **options: Any) -> str:
    start, end = (compiler.process(clause, **options) for clause in element.clauses)
    return f"CAST(EXTRACT(EPOCH FROM {end} - {start}) AS DOUBLE PRECISION)"


def histogram(session: Session, values: sa.Select[Any], bins: int = 24) -> list[Bin]:
    """Bars over the one column `value` of a query, from its least to its greatest. Empty where it has no row."""
    told = values.subquery()
    # an infinity has no place among bars, and to PostgreSQL not-a-number is larger than all numbers
    base = sa.select(told.c.value).where(told.c.value.between(-LARGEST, LARGEST)).subquery()
    low, high = session.execute(sa.select(sa.func.min(base.c.value), sa.func.max(base.c.value))).one()
    if low is None:
        return []
    width = (high - low) / bins or max(abs(low), 1.0) / bins
    # a cast to integer rounds on PostgreSQL and truncates on SQLite; floor first, and both agree
    index = sa.cast(sa.func.floor((base.c.value - low) / width), sa.Integer)
    place = sa.case((index >= bins, bins - 1), else_=index).label("place")
    counted = sa.select(place, sa.func.count().label("n")).group_by(place)
    found = {row.place: row.n for row in session.execute(counted)}
    return [Bin(low + i * width, low + (i + 1) * width, found.get(i, 0)) for i in range(max(found) + 1)]
