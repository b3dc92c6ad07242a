"""One round: who was asked, how far each came, and why some did not arrive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.store import Assignment, Device, Update

DROPPED = ("failed", "expired", "quarantined")


@dataclass(frozen=True)
class Funnel:
    """How many of a round's assignments came how far."""

    sampled: int
    accepted: int
    uploaded: int
    aggregated: int
    statuses: Mapping[str, int]

    @property
    def dropped(self) -> int:
        return sum(self.statuses.get(status, 0) for status in DROPPED)


@dataclass(frozen=True)
class AssignmentLine:
    """One device's part in a round. `seconds` from offer to end; None while it is under way."""

    device_id: int
    device: str
    kind: str
    attempt: int
    status: str
    phase: str | None
    progress: float
    seconds: float | None
    bytes_down: int
    bytes_up: int | None
    examples: int | None
    norm: float | None
    reason: str | None


@dataclass(frozen=True)
class Bin:
    """A bar of a histogram: `count` values in [low, high)."""

    low: float
    high: float
    count: int


def of_round(run_id: int, number: int, kind: str) -> sa.ColumnElement[bool]:
    return sa.and_(Assignment.run_id == run_id, Assignment.round == number, Assignment.kind == kind)


def kinds(session: Session, run_id: int, number: int) -> list[str]:
    """What the round asked of devices: train, evaluate, both or nothing."""
    query = sa.select(Assignment.kind).where(Assignment.run_id == run_id, Assignment.round == number).distinct()
    return sorted(session.scalars(query), reverse=True)


def funnel(session: Session, run_id: int, number: int, kind: str = "train") -> Funnel:
    """How far the round's assignments came; a device asked twice (another attempt) counts twice."""
    query = (
        sa.select(Assignment.status, sa.func.count(), sa.func.count(Assignment.accepted_at))
        .where(of_round(run_id, number, kind))
        .group_by(Assignment.status)
    )
    rows = [(status, count, accepted) for status, count, accepted in session.execute(query)]
    statuses = {status: count for status, count, _ in rows}
    arrived = ("uploaded", "aggregated", "quarantined")
    return Funnel(
        sampled=sum(statuses.values()),
        # whoever uploaded had accepted, whether or not the time was written down
        accepted=sum(count if status in (*arrived, "accepted") else accepted for status, count, accepted in rows),
        uploaded=sum(statuses.get(status, 0) for status in arrived),
        aggregated=statuses.get("aggregated", 0),
        statuses=statuses,
    )


def reason_given() -> sa.ColumnElement[str | None]:
    return sa.func.coalesce(Update.reason, Assignment.error)


def drop_reasons(
    session: Session, run_id: int, number: int, kind: str = "train", limit: int = 8
) -> list[tuple[str, str, int]]:
    """(status, reason, count) of the assignments that did not count, most frequent first."""
    reason = sa.func.coalesce(Update.reason, Assignment.error, "").label("reason")
    query = (
        sa.select(Assignment.status, reason, sa.func.count().label("n"))
        .outerjoin(Update, Update.assignment_id == Assignment.id)
        .where(of_round(run_id, number, kind), Assignment.status.in_(DROPPED))
        .group_by(Assignment.status, reason)
        .order_by(sa.desc("n"), Assignment.status, reason)
        .limit(limit)
    )
    return [(status, text, count) for status, text, count in session.execute(query)]


def assignments(
    session: Session,
    run_id: int,
    number: int,
    kind: str = "train",
    statuses: Sequence[str] = (),
    limit: int = 50,
    offset: int = 0,
) -> list[AssignmentLine]:
    """The devices of a round by name; all statuses where none is named."""
    query = (
        sa.select(
            Assignment, Device.name, Update.bytes, Update.num_examples, Update.norm, reason_given().label("reason")
        )
        .join(Device, Device.id == Assignment.device_id)
        .outerjoin(Update, Update.assignment_id == Assignment.id)
        .where(of_round(run_id, number, kind))
        .order_by(Device.name, Assignment.attempt)
        .limit(limit)
        .offset(offset)
    )
    if statuses:
        query = query.where(Assignment.status.in_(statuses))
    return [
        AssignmentLine(
            device_id=a.device_id, device=name, kind=a.kind, attempt=a.attempt, status=a.status,
            phase=a.phase, progress=a.progress, seconds=_seconds(a.offered_at, a.finished_at),
            bytes_down=a.bytes_down, bytes_up=up, examples=examples, norm=norm, reason=reason,
        )
        for a, name, up, examples, norm, reason in session.execute(query)
    ]  # fmt: skip


def _seconds(start: datetime, end: datetime | None) -> float | None:
    return None if end is None else (end - start).total_seconds()


def norms(session: Session, run_id: int, number: int, bins: int = 24) -> list[Bin]:
    """A histogram of the round's update norms, counted in SQL. Empty where no norm is known."""
    base = (
        sa.select(Update.norm.label("norm"))
        .join(Assignment, Assignment.id == Update.assignment_id)
        .where(of_round(run_id, number, "train"), Update.norm.is_not(None))
        .subquery()
    )
    low, high = session.execute(sa.select(sa.func.min(base.c.norm), sa.func.max(base.c.norm))).one()
    if low is None:
        return []
    width = (high - low) / bins or max(abs(low), 1.0) / bins
    # a cast to integer rounds on PostgreSQL and truncates on SQLite; floor first, and both agree
    index = sa.cast(sa.func.floor((base.c.norm - low) / width), sa.Integer)
    place = sa.case((index >= bins, bins - 1), else_=index).label("place")
    counted = sa.select(place, sa.func.count().label("n")).group_by(place)
    found = {row.place: row.n for row in session.execute(counted)}
    return [Bin(low + i * width, low + (i + 1) * width, found.get(i, 0)) for i in range(max(found) + 1)]
