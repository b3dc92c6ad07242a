"""What each device of a run has spent: bytes both ways and seconds of training, summed up from the store."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from pocketfed.coordinator.store import Assignment, Blob, Device, Store, Update


@dataclass(frozen=True)
class Spent:
    """One device's share of a run. seconds: of training, as it told; of its assignments where it did not tell.

    parameters_down: the part of bytes_down that is no artifact. rounds: in which it began to train.
    """

    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    assignments: int = 0
    parameters_down: int = 0
    rounds: int = 0


def uncounted_in(store: Store, run_id: int) -> tuple[int, int]:
    """Bytes up and down of assignments that no round has counted: what was under way, or waited, when the run ended."""
    mine = sa.select(sa.func.sum(Update.bytes), sa.func.sum(Assignment.bytes_down)).select_from(Assignment)
    mine = mine.outerjoin(Update, Update.assignment_id == Assignment.id)
    with store.read() as session:
        up, down = session.execute(mine.where(Assignment.run_id == run_id, Assignment.counted_in.is_(None))).one()
    return int(up or 0), int(down or 0)


def spent_in(store: Store, run_id: int) -> dict[str, Spent]:
    """Device name -> what it has spent in all assignments that the database still has, in order of the names."""
    columns = (
        Device.name, Assignment.bytes_down, Assignment.accepted_at, Assignment.finished_at, Assignment.kind, Update.bytes,
        Update.metrics, Blob.bytes.label("parameters"),
    )  # fmt: skip
    asked = sa.select(*columns).join(Device, Device.id == Assignment.device_id)
    asked = asked.outerjoin(Update, Update.assignment_id == Assignment.id)
    asked = asked.outerjoin(Blob, Blob.digest == Assignment.parameters).where(Assignment.run_id == run_id)
    found: dict[str, Spent] = {}
    with store.read() as session:
        for row in session.execute(asked.execution_options(yield_per=1000)):
            seconds = (row.metrics or {}).get("seconds")
            if seconds is None:
                both = row.kind == "train" and row.accepted_at and row.finished_at
                seconds = (row.finished_at - row.accepted_at).total_seconds() if both else 0.0
            before = found.get(row.name, Spent())
            found[row.name] = Spent(
                before.bytes_up + (row.bytes or 0),
                before.bytes_down + row.bytes_down,
                before.seconds + max(0.0, float(seconds)),
                before.assignments + 1,
                before.parameters_down + min(row.bytes_down, row.parameters or 0),
                before.rounds + (row.kind == "train" and row.accepted_at is not None),
            )
    return dict(sorted(found.items()))
