"""The transaction behind check-ins: who is there, what they take, what they are told."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.assignments import AWAY_S, Assignments
from pocketfed.coordinator.enrolment import Seen, mark_seen
from pocketfed.coordinator.reports import note_release
from pocketfed.coordinator.standing import offenders
from pocketfed.coordinator.store import Assignment, Device, now
from pocketfed.protos import fleet_pb2 as pb


@dataclass(frozen=True)
class Asked:
    """A device asks for work. stays_s: it will be there for so long; None: it has said so already and only asks again.

    request: None: its connection has ended, and it asks nothing.
    """

    device_id: int
    channel: str
    request: pb.CheckInRequest | None
    stays_s: float | None


# What a device is told: (session, asked, the assignment found for it, whether an update of it was ever refused).
Answer = Callable[[Session, Asked, Assignment | None, bool], pb.CheckInReply]


def serve(
    assignments: Assignments, lease_s: float, answer: Answer, unknown: Callable[[], Exception], batch: Sequence[Asked]
) -> list[pb.CheckInReply | Exception]:
    """All of them in one transaction; devices that are not enrolled, or not any more, get `unknown`."""
    ids = sorted({asked.device_id for asked in batch})
    with assignments.store.write() as session:
        enrolled = sa.select(Device).where(Device.id.in_(ids), Device.revoked_at.is_(None))
        devices = {device.id: device for device in session.scalars(enrolled)}  # held: `answer` reads them one by one
        known = set(devices)
        asking = sorted({a.device_id for a in batch if a.request is not None} & known)
        found = assignments.take(session, asking, lease_s)  # before devices: uploads lock them in this order too
        mark_seen(session, _seen([asked for asked in batch if asked.device_id in known], found))
        for asked in batch:  # after mark_seen, which has locked their rows in order
            if asked.request is not None and asked.stays_s is not None and asked.device_id in known:
                note_release(session, devices[asked.device_id], asked.request)
        offended = offenders(session, ids)
        replies: list[pb.CheckInReply | Exception] = []
        for asked in batch:
            its = asked.device_id
            if asked.request is None:
                replies.append(pb.CheckInReply())
            elif its not in known:
                replies.append(unknown())
            else:
                replies.append(answer(session, asked, found.get(its), its in offended))
    if any(asked.stays_s is not None for asked in batch):
        assignments.notify_changed()
    return replies


def _seen(batch: Sequence[Asked], at_work: Collection[int]) -> list[Seen]:
    """Who is there until when, in the order of their numbers; one that has work is back when it has done it."""
    moment, seen = now(), dict[int, Seen]()
    for asked in batch:
        stays_s = AWAY_S if asked.device_id in at_work else asked.stays_s
        if stays_s is not None:
            seen[asked.device_id] = Seen(asked.device_id, moment + timedelta(seconds=stays_s), asked.request)
    return [seen[device_id] for device_id in sorted(seen)]
