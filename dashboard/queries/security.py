"""What was refused: updates, log-ins, acts. And the audit, which only grows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.store import Assignment, Audit, Device, Update

# the codes of coordinator/validation.py and screening.py; a sentence of another form counts as "other"
CODES = ("names", "shape", "dtype", "not_finite", "num_examples", "norm", "zero", "duplicate", "repeated", "unreadable")
OUTCOMES = ("done", "refused", "failed", "noticed")
NEWEST = 2_000  # updates in the scatter


@dataclass(frozen=True)
class QuarantineLine:
    at: datetime | None
    round: int
    device_id: int
    device: str
    norm: float | None
    examples: int | None
    reason: str | None


@dataclass(frozen=True)
class OffenderLine:
    """A device whose updates a run has quarantined."""

    device_id: int
    device: str
    count: int
    last_round: int


@dataclass(frozen=True)
class Point:
    """An update as screening sees it."""

    round: int
    norm: float
    examples: int
    status: str
    cosine: float | None = None  # to how the round before moved the model; of rounds before there was one, unknown


@dataclass(frozen=True)
class AuditLine:
    id: int
    at: datetime
    who: str
    act: str
    target: str
    outcome: str
    detail: str


def _quarantined(run_id: int) -> sa.ColumnElement[bool]:
    return sa.and_(Assignment.status == "quarantined", Assignment.run_id == run_id)


def quarantined(session: Session, run_id: int, limit: int = 50, offset: int = 0) -> list[QuarantineLine]:
    """The updates that the run did not use, the newest first."""
    query = (
        sa.select(
            Assignment.finished_at, Assignment.round, Assignment.device_id, Device.name, Update.norm,
            Update.num_examples, sa.func.coalesce(Update.reason, Assignment.error),
        )
        .join(Device, Device.id == Assignment.device_id)
        .outerjoin(Update, Update.assignment_id == Assignment.id)
        .where(_quarantined(run_id))
        .order_by(Assignment.round.desc(), Device.name)
        .limit(limit)
        .offset(offset)
    )  # fmt: skip
    return [QuarantineLine(*row) for row in session.execute(query)]


def refusals(session: Session, run_id: int) -> dict[str, int]:
    """How many updates were quarantined for what, most first."""
    reason = sa.func.coalesce(Update.reason, Assignment.error, "")
    code = sa.case(*((reason.like(f"{name.replace('_', '!_')}:%", escape="!"), name) for name in CODES), else_="other")
    count = sa.func.count().label("n")
    query = (
        sa.select(code, count)
        .select_from(Assignment)
        .outerjoin(Update, Update.assignment_id == Assignment.id)
        .where(_quarantined(run_id))
        .group_by(code)
        .order_by(count.desc(), code)
    )
    return {row[0]: row[1] for row in session.execute(query)}


def offenders(session: Session, run_id: int, limit: int = 20) -> list[OffenderLine]:
    """Devices with the most quarantined updates first."""
    # the sum keeps SQLite from walking through all assignments in order of their devices, only to group them
    device = Assignment.device_id + sa.literal_column("0")
    counted = (
        sa.select(device.label("id"), sa.func.count().label("n"), sa.func.max(Assignment.round).label("last"))
        .where(_quarantined(run_id), Assignment.kind == "train")
        .group_by(device)
        .order_by(sa.desc("n"), device)
        .limit(limit)
        .subquery()
    )
    query = sa.select(counted.c.id, Device.name, counted.c.n, counted.c.last).join(Device, Device.id == counted.c.id)
    return [OffenderLine(*row) for row in session.execute(query.order_by(counted.c.n.desc(), counted.c.id))]


def points(session: Session, run_id: int, newest_round: int, limit: int = NEWEST) -> list[Point]:
    """The newest rounds' updates: norm, weight, whether they counted, and where they pointed. As screening found them."""
    query = (
        sa.select(Assignment.round, Update.norm, Update.num_examples, Assignment.status, Update.cosine)
        .select_from(Assignment)
        .join(Update, Update.assignment_id == Assignment.id)
        .where(Assignment.run_id == run_id, Assignment.round > newest_round - 20, Assignment.kind == "train")
        .where(Update.norm.is_not(None))
        .order_by(Assignment.round.desc(), Assignment.id)
        .limit(limit)
    )
    rows = session.execute(query)
    return [
        Point(number, norm, told, fate, cosine)
        for number, norm, told, fate, cosine in rows
        if norm is not None and math.isfinite(norm)
    ]


def failed_log_ins(
    session: Session, at: datetime, days: int = 7, limit: int = 20
) -> tuple[list[tuple[str, int, datetime]], int]:
    """(name that was tried, how often, last when), the most often tried first, and how often any name was."""
    failed = (Audit.act == "log-in", Audit.outcome == "refused", Audit.at >= at - timedelta(days=days))
    total = session.scalar(sa.select(sa.func.count(Audit.id)).where(*failed)) or 0
    count, last = sa.func.count().label("n"), sa.func.max(Audit.at)
    query = (
        sa.select(Audit.who, count, last)
        .where(*failed)
        .group_by(Audit.who)
        .order_by(count.desc(), Audit.who)
        .limit(limit)
    )
    return [(row[0], row[1], row[2]) for row in session.execute(query)], total


def credentials(session: Session) -> tuple[int, int]:
    """Devices whose credential was seen at two places at once, and devices that were revoked."""
    row = session.execute(sa.select(sa.func.count(Device.shared_at), sa.func.count(Device.revoked_at))).one()
    return row[0], row[1]


def audit_acts(session: Session, limit: int = 100) -> list[str]:
    return list(session.scalars(sa.select(Audit.act).distinct().order_by(Audit.act).limit(limit)))


def audit(
    session: Session,
    search: str = "",
    acts: tuple[str, ...] = (),
    outcomes: tuple[str, ...] = (),
    limit: int = 50,
    offset: int = 0,
) -> tuple[list[AuditLine], int]:
    """A page of the audit, the newest first, and how many lines match in all. `search`: part of who or target."""
    conditions: list[sa.ColumnElement[bool]] = []
    if search:
        found = (column.icontains(search, autoescape=True) for column in (Audit.who, Audit.target))
        conditions.append(sa.or_(*found))
    if acts:
        conditions.append(Audit.act.in_(acts))
    if outcomes:
        conditions.append(Audit.outcome.in_(outcomes))
    total = session.scalar(sa.select(sa.func.count(Audit.id)).where(*conditions)) or 0
    query = sa.select(Audit).where(*conditions).order_by(Audit.id.desc()).limit(limit).offset(offset)
    lines = [AuditLine(a.id, a.at, a.who, a.act, a.target, a.outcome, a.detail) for a in session.scalars(query)]
    return lines, total


def privacy(config: Mapping[str, Any]) -> tuple[float, float]:
    """(clip norm, noise in clip norms) that a run asks its devices for; 0 where it asks for none."""
    form = config.get("update")
    form = form if isinstance(form, Mapping) else {}
    clip, noise = form.get("clip_norm", 0.0), form.get("noise", 0.0)
    return (
        float(clip) if isinstance(clip, int | float) else 0.0,
        float(noise) if isinstance(noise, int | float) else 0.0,
    )
