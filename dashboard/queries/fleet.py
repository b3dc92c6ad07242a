"""Devices: what they are and what they are doing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.store import Assignment, Device, Presence, Update

OFFLINE_AFTER_S = 60


STATES = ("offered", "downloading", "training", "uploading", "idle", "offline")


OPEN = ("offered", "accepted")
# what a device may miss, by the name that it tells (client_sdk/conditions.py); its sensors' readings it keeps
CONDITIONS = ("charging", "battery", "idle", "temperature", "window", "unmetered", "data", "disk", "separation", "app")
NOT_ELIGIBLE = "NOT_ELIGIBLE: "


@dataclass(frozen=True)
class DeviceLine:
    """An enrolled device and what it is doing; `run_id` and `round` are those of its open assignment."""

    id: int
    name: str
    sdk_version: str
    examples: int
    state: str
    run_id: int | None
    round: int | None
    progress: float | None
    enrolled_at: datetime
    last_seen_at: datetime | None
    cohort: str | None
    tier: str | None
    revoked: bool
    shared: bool  # its credential was seen in use at two places at once


@dataclass(frozen=True)
class Present:
    """Devices that were not revoked: all, seen lately, and asking for work at this moment."""

    enrolled: int
    online: int
    eligible: int


@dataclass(frozen=True)
class WorkLine:
    """One device's part in a round of any run."""

    run_id: int
    round: int
    attempt: int
    kind: str
    status: str
    offered_at: datetime
    seconds: float | None
    norm: float | None
    reason: str | None


def _state(at: datetime) -> sa.Case[str]:
    """A device's state: offline when not seen lately, else what the furthest of its open assignments is at.

    Sets of device ids rather than a join: SQLite would join the open assignments without an index, which takes
    10,000 devices 10,000 times through them.
    """
    online = sa.and_(Device.last_seen_at.is_not(None), Device.last_seen_at >= at - timedelta(seconds=OFFLINE_AFTER_S))
    phase = sa.func.coalesce(Assignment.phase, "")
    moving = ("downloading", "uploading")

    def doing(*conditions: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
        return Device.id.in_(sa.select(Assignment.device_id).where(*conditions))

    return sa.case(
        (sa.not_(online), "offline"),
        (doing(Assignment.status == "accepted", phase == "uploading"), "uploading"),
        # what a device calls its phase is not trusted: anything that is not known is training
        (doing(Assignment.status == "accepted", phase.not_in(moving)), "training"),
        (doing(Assignment.status == "accepted", phase == "downloading"), "downloading"),
        (doing(Assignment.status == "offered"), "offered"),
        else_="idle",
    )


def device_states(session: Session, at: datetime) -> dict[str, int]:
    """How many devices are in each state at that time; every state is named, also those with none."""
    state = _state(at).label("state")
    found = {row.state: row.n for row in session.execute(sa.select(state, sa.func.count().label("n")).group_by(state))}
    return {name: found.get(name, 0) for name in STATES}


def devices(
    session: Session, at: datetime, search: str = "", states: Sequence[str] = (), limit: int = 50, offset: int = 0
) -> tuple[list[DeviceLine], int]:
    """A page of devices by name, and how many match in all. `search` is part of a name, taken literally."""
    conditions: list[sa.ColumnElement[bool]] = []
    if search:
        conditions.append(Device.name.icontains(search, autoescape=True))
    if states:
        conditions.append(_state(at).in_(states))
    total = session.scalar(sa.select(sa.func.count(Device.id)).where(*conditions)) or 0
    query = (
        sa.select(Device, _state(at).label("state"))
        .where(*conditions)
        .order_by(Device.name)
        .limit(limit)
        .offset(offset)
    )
    rows = [(device, state) for device, state in session.execute(query)]
    work = _open_assignments(session, [device.id for device, _ in rows])
    return [_device_line(device, state, work.get(device.id)) for device, state in rows], total


def _open_assignments(session: Session, device_ids: Sequence[int]) -> dict[int, Assignment]:
    """Each device's open assignment: an accepted one before an offered one, a newer before an older."""
    query = (
        sa.select(Assignment)
        .where(Assignment.device_id.in_(device_ids), Assignment.status.in_(OPEN))
        .order_by(sa.desc(Assignment.status), Assignment.offered_at)  # later ones replace earlier ones
    )
    return {found.device_id: found for found in session.scalars(query)}


def _device_line(device: Device, state: str, work: Assignment | None) -> DeviceLine:
    return DeviceLine(
        id=device.id, name=device.name, sdk_version=device.sdk_version, examples=device.examples, state=state,
        run_id=work.run_id if work else None, round=work.round if work else None,
        progress=work.progress if work else None, enrolled_at=device.enrolled_at, last_seen_at=device.last_seen_at,
        cohort=device.cohort, tier=device.tier, revoked=device.revoked_at is not None, shared=device.shared_at is not None,
    )  # fmt: skip


def device(session: Session, device_id: int, at: datetime) -> DeviceLine | None:
    """One device by its number, which says nothing of its owner."""
    found = session.execute(sa.select(Device, _state(at)).where(Device.id == device_id)).first()
    if found is None:
        return None
    return _device_line(found[0], found[1], _open_assignments(session, [device_id]).get(device_id))


def work_of(session: Session, device_id: int, limit: int = 50, offset: int = 0) -> list[WorkLine]:
    """What a device was asked and what came of it, the newest first."""
    query = (
        sa.select(Assignment, Update.norm, sa.func.coalesce(Update.reason, Assignment.error).label("reason"))
        .outerjoin(Update, Update.assignment_id == Assignment.id)
        .where(Assignment.device_id == device_id)
        .order_by(Assignment.offered_at.desc(), Assignment.id)
        .limit(limit)
        .offset(offset)
    )
    return [
        WorkLine(
            run_id=a.run_id, round=a.round, attempt=a.attempt, kind=a.kind, status=a.status, offered_at=a.offered_at,
            seconds=None if a.finished_at is None else (a.finished_at - a.offered_at).total_seconds(),
            norm=norm, reason=reason,
        )
        for a, norm, reason in session.execute(query)
    ]  # fmt: skip


def present(session: Session, at: datetime) -> Present:
    """How many devices there are, and how many of them could take work now."""
    seen = Device.last_seen_at >= at - timedelta(seconds=OFFLINE_AFTER_S)
    row = session.execute(
        sa.select(
            sa.func.count(),
            sa.func.sum(sa.case((seen, 1), else_=0)),
            sa.func.sum(sa.case((Device.present_until >= at, 1), else_=0)),
        ).where(Device.revoked_at.is_(None))
    ).one()
    return Present(row[0], int(row[1] or 0), int(row[2] or 0))


def versions(session: Session, limit: int = 12) -> dict[str, int]:
    """Devices by the version of their SDK, most first; "" where a device has told none."""
    count = sa.func.count().label("n")
    query = sa.select(Device.sdk_version, count).group_by(Device.sdk_version).order_by(count.desc(), Device.sdk_version)
    return {row[0]: row[1] for row in session.execute(query.limit(limit))}


def cohorts(session: Session, limit: int = 12) -> dict[str, int]:
    """Devices by the cohort of their enrolment key, most first; "" for those without one."""
    name, count = sa.func.coalesce(Device.cohort, "").label("name"), sa.func.count().label("n")
    return {
        row[0]: row[1]
        for row in session.execute(sa.select(name, count).group_by(name).order_by(count.desc(), name).limit(limit))
    }


def tiers(session: Session, limit: int = 12) -> dict[str, int]:
    """Devices by the word that their apps have for their kind, most first; "" for those that tell none."""
    name, count = sa.func.coalesce(Device.tier, "").label("name"), sa.func.count().label("n")
    query = sa.select(name, count).group_by(name).order_by(count.desc(), name).limit(limit)
    return {row[0]: row[1] for row in session.execute(query)}


def last_seen(session: Session, at: datetime) -> dict[str, int]:
    """Devices by how long ago they were last seen."""
    ages = (("within a minute", 60), ("within an hour", 3600), ("within a day", 86400), ("within a week", 7 * 86400))
    seen = Device.last_seen_at
    label = sa.case(
        (seen.is_(None), "never"),
        *((seen >= at - timedelta(seconds=age), name) for name, age in ages),
        else_="longer ago",
    )
    found = {row[0]: row[1] for row in session.execute(sa.select(label, sa.func.count()).group_by(label))}
    return {name: found.get(name, 0) for name in (*(name for name, _ in ages), "longer ago", "never")}


def activity(session: Session, at: datetime, days: int = 7) -> list[tuple[datetime, int]]:
    """(hour, the most devices that were there at once) over the last days."""
    query = sa.select(Presence.hour, Presence.devices).where(Presence.hour >= at - timedelta(days=days))
    return [(row.hour, row.devices) for row in session.execute(query.order_by(Presence.hour))]


def failures(session: Session, run_id: int, limit: int = 10) -> list[tuple[str, int, int]]:
    """(reason, how often, of how many devices) for what a run's devices gave up over, most frequent first."""
    reason = sa.func.coalesce(Assignment.error, "").label("reason")
    count = sa.func.count().label("n")
    query = (
        sa.select(reason, count, sa.func.count(sa.distinct(Assignment.device_id)))
        .where(Assignment.status == "failed", Assignment.run_id == run_id)
        .group_by(reason)
        .order_by(count.desc(), reason)
        .limit(limit)
    )
    return [(row[0], row[1], row[2]) for row in session.execute(query)]


def refused_for(session: Session, run_id: int) -> dict[str, int]:
    """Condition -> how often a run's devices gave work back because it did not hold; one refusal may name several."""
    told = sa.func.replace(Assignment.error, NOT_ELIGIBLE, ", ") + ","
    columns = (sa.func.sum(sa.case((told.like(f"%, {name},%"), 1), else_=0)).label(name) for name in CONDITIONS)
    query = sa.select(*columns).where(
        Assignment.status == "failed",
        Assignment.run_id == run_id,
        Assignment.error.like(f"{NOT_ELIGIBLE.replace('_', '!_')}%", escape="!"),
    )
    row = session.execute(query).one()
    found = {name: int(getattr(row, name) or 0) for name in CONDITIONS}
    return dict(sorted(((k, n) for k, n in found.items() if n), key=lambda item: -item[1]))
