"""Devices: what they are and what they are doing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.store import Assignment, Device

OFFLINE_AFTER_S = 60


STATES = ("offered", "downloading", "training", "uploading", "idle", "offline")


OPEN = ("offered", "accepted")


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
    )  # fmt: skip
