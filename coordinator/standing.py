"""What the store knows of earlier updates: the medians that new ones are measured by, and who offended."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.store import Assignment, Round, Run, Store, Update, get_blob
from pocketfed.coordinator.validation import WINDOW, History
from pocketfed.model.parameters import Vector, decode_vector

LOOKED_BACK = 9  # rounds: those that failed leave theta as it was
REFUSED = "RunRefused"  # how a device's reason begins where its app does not want the run


def recall(store: Store, run_id: int, number: int) -> History:
    """What the rounds before `number` accepted: taken from the store, so that a coordinator that starts again knows it."""
    newest = (
        sa.select(Update.norm, Update.num_examples, Update.digest, Assignment.round)
        .join(Assignment, Assignment.id == Update.assignment_id)
        .join(Round, sa.and_(Round.run_id == Assignment.run_id, Round.number == Assignment.counted_in))
        .where(Assignment.run_id == run_id, Assignment.counted_in < number, Round.status == "finished")
        .where(Assignment.kind == "train", Assignment.status == "aggregated", Update.norm.is_not(None))
        .order_by(Assignment.counted_in.desc(), Update.norm, Update.digest)
        .limit(WINDOW)
    )
    with store.read() as session:
        rows = list(reversed(session.execute(newest).all()))
    return History(
        tuple(row.norm for row in rows),
        tuple(row.num_examples for row in rows),
        {row.digest: row.round for row in rows if row.digest},
    )


def last_step(store: Store, run_id: int, theta: Vector) -> Vector | None:
    """How the run's newest round that moved theta (P,) moved it; None before there was one, or where it is forgotten."""
    ended = sa.select(Round.parameters).where(Round.run_id == run_id, Round.status != "running")
    with store.read() as session:
        newest, *before = session.scalars(ended.order_by(Round.number.desc()).limit(LOOKED_BACK)).all() or [None]
        other = next((digest for digest in before if digest != newest), None)  # None is one that is forgotten
        if other is None:
            return None
        return theta - decode_vector("theta", get_blob(session, other), len(theta))


def offences(session: Session, run_id: int) -> dict[int, int]:
    """Device id -> how many of its updates the run has quarantined."""
    rows = session.execute(
        sa.select(Assignment.device_id, sa.func.count())
        .where(Assignment.run_id == run_id, Assignment.kind == "train", Assignment.status == "quarantined")
        .group_by(Assignment.device_id)
    )
    return {row[0]: row[1] for row in rows}


def set_aside(store: Store, run_id: int, most: int) -> set[int]:
    """The devices that the run samples no more: `most` of their updates were quarantined (0: nobody is set aside for that),
    or their apps take no part in it."""
    refusals = sa.select(Assignment.device_id).where(
        Assignment.run_id == run_id, Assignment.status == "failed", Assignment.error.like(f"{REFUSED}:%")
    )
    with store.read() as session:
        offenders = {device for device, count in offences(session, run_id).items() if most and count >= most}
        return offenders | set(session.scalars(refusals.distinct()))


def offenders(session: Session, device_ids: Sequence[int]) -> set[int]:
    """Those of the devices that had an update quarantined."""
    quarantined = sa.select(Assignment.device_id).where(Assignment.status == "quarantined")
    return set(session.scalars(quarantined.where(Assignment.device_id.in_(device_ids)).distinct()))


def last_refusal(session: Session, device_id: int) -> str | None:
    """Why the device's last update was not used, in a sentence for its log; None if it was, or is still open."""
    last = session.scalars(
        sa.select(Assignment)
        .where(Assignment.device_id == device_id, Assignment.kind == "train")
        .order_by(Assignment.run_id.desc(), Assignment.round.desc(), Assignment.attempt.desc())
        .limit(1)
    ).first()
    if last is None or last.status != "quarantined":
        return None
    why = f"the update for round {last.round} was not used: {last.error}"
    count = offences(session, last.run_id).get(device_id, 0)
    most = session.get_one(Run, last.run_id).config.get("max_offences", 0)
    return f"{why}; after {count} such updates this run asks the device no more" if most and count >= most else why
