"""What a grid on a virtual clock asks the store about its assignments."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.assignments import OPEN, portions
from pocketfed.coordinator.store import Assignment, Store


def open_until(store: Store, assignment_ids: Sequence[str]) -> dict[str, datetime | None]:
    """Those that are open, with their deadlines."""
    found: dict[str, datetime | None] = {}
    with store.read() as session:
        for some in portions(assignment_ids):
            mine = sa.select(Assignment.id, Assignment.deadline).where(Assignment.id.in_(some))
            found |= {row.id: row.deadline for row in session.execute(mine.where(Assignment.status.in_(OPEN)))}
    return found


def newly_expired(session: Session, run_id: int) -> list[Assignment]:
    """Those that were closed and that no round has counted yet."""
    mine = sa.select(Assignment).where(Assignment.run_id == run_id, Assignment.counted_in.is_(None))
    return list(session.scalars(mine.where(Assignment.status == "expired")))


def ended(store: Store, run_id: int, number: int | None) -> list[Any]:
    """(id, status, error, finished_at) of those that a round has counted; None: of those that no round has."""
    counted = Assignment.counted_in.is_(None) if number is None else Assignment.counted_in == number
    mine = sa.select(Assignment.id, Assignment.status, Assignment.error, Assignment.finished_at)
    with store.read() as session:
        return list(session.execute(mine.where(Assignment.run_id == run_id, counted).order_by(Assignment.id)))
