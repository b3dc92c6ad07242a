"""One round: who was asked, how far each came, and why some did not arrive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.store import Assignment, Device, History, Metric, Round, Run, Update
from pocketfed.dashboard.queries.spans import Bin, histogram, seconds_between

DROPPED = ("failed", "expired", "quarantined", "discarded")
ARRIVED = ("uploaded", "aggregated", "quarantined", "discarded")
MOST_SPANS = 60  # devices in the chart of phases: more are lines too thin to see
MEDIAN_OVER = 256  # accepted updates; as screening's running median (coordinator/validation.py)
WARM_UP = 32  # as there


@dataclass(frozen=True)
class Funnel:
    """How many of a round's assignments came how far. downloaded, trained: as their devices said last."""

    sampled: int
    accepted: int
    downloaded: int
    trained: int
    uploaded: int
    aggregated: int
    statuses: Mapping[str, int]

    @property
    def dropped(self) -> int:
        return sum(self.statuses.get(status, 0) for status in DROPPED)

    @property
    def steps(self) -> dict[str, int]:
        names = ("sampled", "accepted", "downloaded", "trained", "uploaded", "aggregated")
        return {name: getattr(self, name) for name in names}


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
class Span:
    """When one assignment was where: seconds since the round's first offer. None: it never was."""

    assignment: str
    device: str
    status: str
    offered: float
    accepted: float | None
    ended: float | None
    deadline: float | None


@dataclass(frozen=True)
class AttemptLine:
    """What an attempt at a round came to be, and why."""

    at: datetime
    attempt: int | None
    status: str
    reason: str | None


def of_round(run_id: int, number: int, kind: str) -> sa.ColumnElement[bool]:
    return sa.and_(Assignment.run_id == run_id, Assignment.round == number, Assignment.kind == kind)


def reason_given() -> sa.ColumnElement[str | None]:
    return sa.func.coalesce(Update.reason, Assignment.error)


def kinds(session: Session, run_id: int, number: int) -> list[str]:
    """What the round asked of devices: train, evaluate, both or nothing."""
    query = sa.select(Assignment.kind).where(Assignment.run_id == run_id, Assignment.round == number).distinct()
    return sorted(session.scalars(query), reverse=True)


def attempts(session: Session, run_id: int, number: int, limit: int = 50) -> list[AttemptLine]:
    """What the round's attempts came to be, the first first."""
    query = (
        sa.select(History.at, History.attempt, History.status, History.reason)
        .where(History.run_id == run_id, History.round == number, History.assignment_id.is_(None))
        .order_by(History.id)
        .limit(limit)
    )
    return [AttemptLine(*row) for row in session.execute(query)]


def funnel(session: Session, run_id: int, number: int, kind: str = "train") -> Funnel:
    """How far the round's assignments came; a device asked twice (another attempt) counts twice."""
    phase = sa.func.coalesce(Assignment.phase, "")
    query = (
        sa.select(
            Assignment.status,
            sa.func.count(),
            sa.func.count(Assignment.accepted_at),
            sa.func.sum(sa.case((phase.in_(("training", "uploading")), 1), else_=0)),
            sa.func.sum(sa.case((phase == "uploading", 1), else_=0)),
        )
        .where(of_round(run_id, number, kind))
        .group_by(Assignment.status)
    )
    rows = [tuple(row) for row in session.execute(query)]
    statuses = {row[0]: row[1] for row in rows}

    def came(column: int, *also: str) -> int:
        """Whoever uploaded had done all before, whether or not it was written down; `also` statuses likewise."""
        return sum(row[1] if row[0] in (*ARRIVED, *also) else int(row[column] or 0) for row in rows)

    return Funnel(
        sampled=sum(statuses.values()), accepted=came(2, "accepted"), downloaded=came(3), trained=came(4),
        uploaded=sum(statuses.get(status, 0) for status in ARRIVED),
        aggregated=statuses.get("aggregated", 0), statuses=statuses,
    )  # fmt: skip


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
        sa.select(Assignment, Device.name, Update.bytes, Update.num_examples, Update.norm, reason_given())
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


def spans(session: Session, run_id: int, number: int, kind: str = "train", limit: int = MOST_SPANS) -> list[Span]:
    """When the round's slowest devices were where, the slowest first; those that have not ended count as slowest."""
    first = session.scalar(sa.select(sa.func.min(Assignment.offered_at)).where(of_round(run_id, number, kind)))
    if first is None:
        return []
    ended = sa.func.coalesce(Update.received_at, Assignment.finished_at)
    took = seconds_between(Assignment.offered_at, ended)
    query = (
        sa.select(
            Assignment.id, Device.name, Assignment.status, Assignment.offered_at, Assignment.accepted_at,
            Update.received_at, Assignment.finished_at, Assignment.deadline,
        )
        .join(Device, Device.id == Assignment.device_id)
        .outerjoin(Update, Update.assignment_id == Assignment.id)
        .where(of_round(run_id, number, kind))
        .order_by(sa.case((took.is_(None), 0), else_=1), took.desc(), Assignment.id)
        .limit(limit)
    )  # fmt: skip
    return [
        Span(
            row.id, row.name, row.status, _seconds(first, row.offered_at) or 0.0, _seconds(first, row.accepted_at),
            _seconds(first, row.received_at or row.finished_at), _seconds(first, row.deadline),
        )
        for row in session.execute(query)
    ]  # fmt: skip


def deadline(session: Session, run_id: int, number: int) -> datetime | None:
    """When the round's last assignment has to be in."""
    mine = sa.and_(Assignment.run_id == run_id, Assignment.round == number)
    return session.scalar(sa.select(sa.func.max(Assignment.deadline)).where(mine))


def norms(session: Session, run_id: int, number: int, bins: int = 24) -> list[Bin]:
    """A histogram of the round's update norms. Empty where no norm is known."""
    values = (
        sa.select(Update.norm.label("value"))
        .join(Assignment, Assignment.id == Update.assignment_id)
        .where(of_round(run_id, number, "train"), Update.norm.is_not(None))
    )
    return histogram(session, values, bins)


def times(session: Session, run_id: int, number: int, kind: str = "train", bins: int = 24) -> list[Bin]:
    """A histogram of the seconds from a device's yes to the arrival of its update."""
    took = seconds_between(Assignment.accepted_at, Update.received_at)
    values = (
        sa.select(took.label("value"))
        .join(Update, Update.assignment_id == Assignment.id)
        .where(of_round(run_id, number, kind), Assignment.accepted_at.is_not(None))
    )
    return histogram(session, values, bins)


def staleness(session: Session, run_id: int, number: int) -> dict[int, int]:
    """How many rounds late the updates were that this round's buffer took in: rounds -> updates."""
    late = (Assignment.counted_in - Assignment.round).label("late")
    query = (
        sa.select(late, sa.func.count())
        .where(Assignment.run_id == run_id, Assignment.counted_in == number)
        .where(Assignment.kind == "train", Assignment.status == "aggregated")
        .group_by(late)
        .order_by(late)
    )
    return {int(row[0] or 0): row[1] for row in session.execute(query)}


def clip_line(session: Session, run_id: int, number: int) -> float | None:
    """The norm above which the round's updates were scaled down: clip_factor medians of those accepted before it.

    None where the run clips by no median, or fewer than WARM_UP were accepted before (then the round's own fill up).
    """
    config = session.scalar(sa.select(Run.config).where(Run.id == run_id)) or {}
    factor = config.get("clip_factor", 0.0)
    if not isinstance(factor, int | float) or not factor:
        return None
    counted = sa.select(Round.number, Round.devices).where(Round.run_id == run_id, Round.number < number)
    first, missing = number, MEDIAN_OVER
    for row in session.execute(
        counted.where(Round.status == "finished").order_by(Round.number.desc()).limit(MEDIAN_OVER)
    ):
        if missing > 0:
            first, missing = row.number, missing - row.devices
    last = (
        sa.select(Update.norm)
        .join(Assignment, Assignment.id == Update.assignment_id)
        .where(Assignment.run_id == run_id, Assignment.counted_in >= first, Assignment.counted_in < number)
        .where(Assignment.kind == "train", Assignment.status == "aggregated", Update.norm.is_not(None))
        .order_by(Assignment.counted_in.desc(), Update.norm, Update.digest)
        .limit(MEDIAN_OVER)
    )
    norms = sorted(float(norm) for norm in session.scalars(last) if norm is not None)
    return float(factor) * norms[(len(norms) - 1) // 2] if len(norms) >= WARM_UP else None


def metrics(session: Session, run_id: int, number: int) -> dict[str, float]:
    """Whatever else the round has measured, by name."""
    query = sa.select(Metric.name, Metric.value).where(Metric.run_id == run_id, Metric.round == number)
    return {row.name: row.value for row in session.execute(query.order_by(Metric.name).limit(100))}
