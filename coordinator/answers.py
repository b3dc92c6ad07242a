"""Writing down what many devices are asked and have answered at once, in the rows that one after another would make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.assignments import OPEN
from pocketfed.coordinator.store import Assignment, Blob, Device, History, StoreError, Update, history_entry, printable


@dataclass(frozen=True)
class Answer:
    """What came of an assignment that is open.

    error: why there is no update. told: the row of one, but for its assignment. bytes_down: besides the parameters.
    """

    assignment_id: str
    device_id: int
    begun: datetime
    ended: datetime
    bytes_down: int = 0
    error: str | None = None
    told: Mapping[str, Any] | None = None

    @property
    def status(self) -> str:
        return "failed" if self.told is None else "uploaded"


def offer_all(session: Session, rows: Sequence[Mapping[str, Any]]) -> None:
    """New assignments (all of a row's columns but those with a default) and their history, a statement each."""
    if not rows:
        return
    told = ("round", "attempt", "id", "offered_at")
    history = [history_entry(row["run_id"], "offered", None, *(row[name] for name in told)) for row in rows]
    session.connection().execute(sa.insert(Assignment), rows)
    session.connection().execute(sa.insert(History), history)


def write_answers(session: Session, answers: Sequence[Answer]) -> None:
    """Assignments, updates, devices and history: a statement each, whatever the number of answers.

    Raises:
        StoreError: an assignment is not open.
    """
    if not answers:
        return
    columns = (Assignment.id, Assignment.run_id, Assignment.round, Assignment.attempt, Blob.bytes)
    asked = sa.select(*columns).join(Blob, Blob.digest == Assignment.parameters)
    open_ = asked.where(Assignment.id.in_([a.assignment_id for a in answers]), Assignment.status.in_(OPEN))
    rows = {row.id: row for row in session.execute(open_)}
    for answer in answers:
        if answer.assignment_id not in rows:
            raise StoreError(f"assignment {answer.assignment_id} is not open and cannot become {answer.status}")
    connection = session.connection()
    settled = sa.update(Assignment).where(Assignment.id == sa.bindparam("row_id"))
    connection.execute(settled, [_settled(a, rows[a.assignment_id].bytes) for a in answers])
    seen = sa.update(Device).where(Device.id == sa.bindparam("row_id"))
    connection.execute(seen, [{"row_id": a.device_id, "last_seen_at": a.ended} for a in answers])
    connection.execute(sa.insert(History), [_history(a, rows[a.assignment_id]) for a in answers])
    updates = [{"assignment_id": a.assignment_id, **a.told} for a in answers if a.told is not None]
    if updates:
        connection.execute(sa.insert(Update), updates)


def _settled(answer: Answer, parameters_bytes: int) -> dict[str, Any]:
    return {
        "row_id": answer.assignment_id,
        "status": answer.status,
        "error": answer.error,
        "accepted_at": answer.begun,
        "finished_at": answer.ended,
        "progress": 1.0,
        "bytes_down": parameters_bytes + answer.bytes_down,
    }


def _history(answer: Answer, row: Any) -> dict[str, Any]:
    return history_entry(
        row.run_id, answer.status, answer.error, row.round, row.attempt, answer.assignment_id, answer.ended
    )


def real_device(session: Session) -> str | None:
    """The name of a device that can log in, if there is one."""
    return session.scalar(sa.select(Device.name).where(Device.token_hash != "").order_by(Device.id).limit(1))


def enrol_virtual(
    session: Session, channel: str, examples: Mapping[str, int], tiers: Mapping[str, str] | None = None
) -> dict[int, str]:
    """Devices that nobody can log in as, with so many examples each: id -> name, in the order given.

    tiers: what kind of device each is, where that is known.
    """
    held = {"channel": channel, "examples": 0, "token_hash": ""}
    kinds = {name: printable(tier, 50) for name, tier in (tiers or {}).items()}
    known: dict[str, int] = {}
    for _ in range(2):
        known = {row.name: row.id for row in session.execute(sa.select(Device.name, Device.id)) if row.name in examples}
        missing = [held | {"name": name} for name in examples if name not in known]
        if missing:
            session.connection().execute(sa.insert(Device), missing)
    holds = sa.update(Device).where(Device.id == sa.bindparam("row_id"))
    rows = [{"row_id": known[n], "examples": count, "tier": kinds.get(n)} for n, count in examples.items()]
    session.connection().execute(holds, rows)
    return {known[name]: name for name in examples}
