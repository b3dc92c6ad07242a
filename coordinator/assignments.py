"""Assignments as devices see them: handed out, kept alive, and uploads spooled to disk before they count."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.forms import knows_forms
from pocketfed.coordinator.rollout import sdk_fits
from pocketfed.coordinator.store import Assignment, Device, History, Run, Store, Update, is_digest, now, printable

T = TypeVar("T")
OPEN = ("offered", "accepted")
AWAY_S = 2.0  # a device that has its answer is back, or sends its first heartbeat, within so long
REPLAYED = "STALE_OR_FOREIGN"
MAX_METRICS = 32
MAX_NAME = 100


class UploadError(Exception):
    """An upload that cannot go on. `kind` is not_found, invalid, out_of_range, data_loss or too_large."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Foreign(UploadError):  # noqa: N818 - says what it is
    """A device spoke for another one's assignment; to it that is as good as none."""

    def __init__(self, assignment: Assignment, device_id: int) -> None:
        super().__init__("not_found", f"this device holds no assignment {assignment.id!r}")
        why = f"{REPLAYED}: device {device_id} spoke for another one"
        self.refusal: dict[str, Any] = {
            "run_id": assignment.run_id,
            "round": assignment.round,
            "attempt": assignment.attempt,
        }
        self.refusal |= {"assignment_id": assignment.id, "status": "refused", "reason": why}


@dataclass(frozen=True)
class Header:
    """What a device says of its upload; see UploadHeader in fleet.proto."""

    assignment_id: str
    total_bytes: int
    digest: str
    offset: int
    num_examples: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Receipt:
    accepted: bool
    reason: str = ""


@dataclass
class Assignments:
    """The assignments of a store. Where several rows are locked, it is in the order of their ids, assignments before devices.

    `changed` is notified whenever a device came or an assignment ended; `on_offer` is called when there are new ones.

    Args:
        spool: where uploads wait until their round has committed.
    """

    store: Store
    spool: Path

    def __post_init__(self) -> None:
        self.spool.mkdir(parents=True, exist_ok=True)
        self.changed = threading.Condition()
        self.changes = 0  # how often it was notified
        self.on_offer: list[Callable[[], None]] = []

    def notify_changed(self) -> None:
        with self.changed:
            self.changes += 1
            self.changed.notify_all()

    def wait_changed(self, since: int, timeout_s: float) -> None:
        """Until something has changed since `changes` was that."""
        with self.changed:
            self.changed.wait_for(lambda: self.changes != since, timeout_s)

    def notify_offered(self) -> None:
        for callback in self.on_offer:
            callback()

    # ---- asking for work ---------------------------------------------------------------------------------------------

    def next_for(self, device_id: int, lease_s: float) -> Assignment | None:
        """The device's open assignment, marked as accepted; the same one again until it is settled."""
        with self.store.write() as session:
            found = self.take(session, [device_id], lease_s).get(device_id)
            if found is not None:
                session.get_one(Device, device_id).present_until = now() + timedelta(seconds=AWAY_S)
            return found

    def take(
        self, session: Session, device_ids: Sequence[int], lease_s: float, run_id: int | None = None
    ) -> dict[int, Assignment]:
        """The open assignments of these devices, one each, marked as accepted. run_id: of that run alone."""
        moment, found = now(), dict[int, Assignment]()
        if not device_ids:
            return found
        open_ = sa.select(Assignment).where(Assignment.device_id.in_(device_ids), Assignment.status.in_(OPEN))
        if run_id is not None:
            open_ = open_.where(Assignment.run_id == run_id)
        rows = session.scalars(open_.order_by(Assignment.id).with_for_update()).all()
        for row in sorted(rows, key=lambda a: a.offered_at):
            # Overdue ones are passed over: a coordinator that was killed may have left some that nobody closes.
            if row.device_id in found or _overdue(row, moment):
                continue
            row.status, row.accepted_at = "accepted", row.accepted_at or moment
            row.lease_until = moment + timedelta(seconds=lease_s)
            found[row.device_id] = row
        return found

    def offered_to(self, session: Session) -> set[int]:
        """Devices that have something new to take."""
        moment = now()
        columns = (Assignment.device_id, Assignment.lease_until, Assignment.deadline)
        rows = session.execute(sa.select(*columns).where(Assignment.status == "offered"))
        return {row.device_id for row in rows if not _overdue(row, moment)}

    def heartbeat(self, device_id: int, assignment_id: str, phase: str, progress: float, lease_s: float) -> bool:
        """Extend the lease. False: the assignment has ended, stop."""
        with self._noting_refusals(), self.store.write() as session:
            found = self._mine(session, device_id, assignment_id, lock=True)
            if found.status not in OPEN or _overdue(found, now()):
                return False
            found.phase, found.progress = phase, min(1.0, max(0.0, progress)) if math.isfinite(progress) else 0.0
            found.lease_until = now() + timedelta(seconds=lease_s)
            return True

    def decline(self, device_id: int, assignment_id: str, reason: str) -> None:
        with self._noting_refusals(), self.store.write() as session:
            found = self._mine(session, device_id, assignment_id, lock=True)
            if found.status in OPEN:
                found.status, found.error, found.finished_at = "failed", printable(reason, 500), now()
        self.notify_changed()

    def add_downloads(self, sent: Sequence[tuple[int, int]]) -> list[Exception | None]:
        """Bytes sent to devices (id, how many), booked on the assignments that they hold."""
        counts = Counter[int]()
        for device_id, count in sent:
            counts[device_id] += count
        with self.store.write() as session:
            mine = sa.select(Assignment).where(Assignment.device_id.in_(counts), Assignment.status == "accepted")
            for row in session.scalars(mine.order_by(Assignment.id).with_for_update()):
                row.bytes_down += counts[row.device_id]
        return [None] * len(sent)

    def expire(self, assignment_ids: Sequence[str], reason: str | None = None) -> None:
        """Close those whose lease or deadline has passed; all that are open, if there is another `reason` to."""
        moment = now()
        with self.store.write() as session:
            for some in portions(assignment_ids):
                mine = sa.select(Assignment).where(Assignment.id.in_(some), Assignment.status.in_(OPEN))
                for found in session.scalars(mine.order_by(Assignment.id).with_for_update()):
                    why = reason or _overdue(found, moment)
                    if why:
                        found.status, found.error, found.finished_at = "expired", why, moment

    def _mine(self, session: Session, device_id: int, assignment_id: str, lock: bool = False) -> Assignment:
        """`lock`: nobody else changes it until the transaction ends."""
        usable = assignment_id.isprintable()  # PostgreSQL takes no NUL
        found = session.get(Assignment, assignment_id, with_for_update=lock or None) if usable else None
        return _of(found, assignment_id, device_id)

    @contextmanager
    def _noting_refusals(self) -> Iterator[None]:
        """A device that speaks for another one is written down, once: one that goes on fills nothing."""
        try:
            yield
        except Foreign as error:
            self._note(error)
            raise

    def _note(self, error: Foreign) -> None:
        known = sa.select(History.id).filter_by(**error.refusal)
        with self.store.write() as session:
            if session.scalar(known) is None:
                session.add(History(**error.refusal))

    def forget(self, assignment_ids: Iterable[str]) -> None:
        """Delete what devices sent for assignments that are settled, be it whole or in part."""
        for assignment_id in assignment_ids:
            self.upload_path(assignment_id).unlink(missing_ok=True)
            self._part(assignment_id).unlink(missing_ok=True)

    # ---- handing in --------------------------------------------------------------------------------------------------

    def upload_path(self, assignment_id: str) -> Path:
        return self.spool / f"{assignment_id}.update"

    def received(self, device_id: int, assignment_id: str) -> tuple[int, Receipt | None]:
        """Bytes that have arrived, and the receipt if that was all."""
        with self._noting_refusals(), self.store.read() as session:
            found = self._mine(session, device_id, assignment_id)
            if session.get(Update, assignment_id) is not None:
                return 0, Receipt(True)
            if found.status not in OPEN:
                return 0, Receipt(False, f"the assignment has ended: {found.error or found.status}")
        part = self._part(assignment_id)
        return (part.stat().st_size if part.exists() else 0), None

    def _part(self, assignment_id: str) -> Path:
        return self.spool / f"{assignment_id}.part"

    def check_header(self, device_id: int, header: Header, limit_bytes: int) -> Receipt | None:
        """A receipt if there is nothing to receive any more; None: send the data.

        Raises:
            UploadError: not this device's, malformed, too large, or not where the upload stands.
        """
        stands_at, receipt = self.received(device_id, header.assignment_id)
        if receipt is not None:
            return receipt
        if header.total_bytes > limit_bytes:
            raise UploadError(
                "too_large",
                f"an update of {header.total_bytes} bytes is larger than the {limit_bytes} that this assignment "
                "can have",
            )
        if (header.total_bytes or header.digest) and not is_digest(header.digest):
            raise UploadError("invalid", f"{header.digest[:80]!r} is not a SHA-256")
        if len(header.metrics) > MAX_METRICS or any(
            not 0 < len(n) <= MAX_NAME or not n.isprintable() for n in header.metrics
        ):
            raise UploadError(
                "invalid", f"at most {MAX_METRICS} metrics with names of 1 to {MAX_NAME} printable characters are taken"
            )
        if header.offset != stands_at:
            raise UploadError("out_of_range", f"the upload goes on at byte {stands_at}, not {header.offset}")
        return None

    def append(self, header: Header, data: bytes) -> None:
        part = self._part(header.assignment_id)
        with part.open("ab") as stream:
            if stream.tell() + len(data) > header.total_bytes:
                raise UploadError(
                    "invalid",
                    f"more than the {header.total_bytes} bytes announced have arrived; ask for the upload's status",
                )
            stream.write(data)

    def finish(self, device_id: int, header: Header) -> Receipt:
        """Everything has arrived: check it, make it durable, then count it, once.

        Raises:
            UploadError: bytes are missing (send the rest), or the whole has another digest (start again).
        """
        self.check_arrived(header)
        (result,) = self.count([(device_id, header)])
        if isinstance(result, Exception):
            raise result
        return result

    def check_arrived(self, header: Header) -> None:
        """
        Raises:
            UploadError: as `finish`.
        """
        part = self._part(header.assignment_id)
        if not header.total_bytes:
            return
        size = part.stat().st_size if part.exists() else 0
        if size < header.total_bytes:
            raise UploadError("invalid", f"{size} of {header.total_bytes} bytes have arrived; send the rest")
        with part.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
        if digest != header.digest:
            part.unlink()
            raise UploadError("data_loss", "what arrived does not have the digest announced; start again at byte 0")

    def count(self, arrived: Sequence[tuple[int, Header]]) -> list[Receipt | Exception]:
        """Uploads that have arrived (device id, header) count from now on: in one transaction, which costs as much as one."""
        ids = sorted({header.assignment_id for _, header in arrived if header.assignment_id.isprintable()})
        results: list[Receipt | Exception] = []
        with self.store.write() as session:
            mine = sa.select(Assignment).where(Assignment.id.in_(ids)).order_by(Assignment.id).with_for_update()
            held = {row.id: row for row in session.scalars(mine)}
            known = set(session.scalars(sa.select(Update.assignment_id).where(Update.assignment_id.in_(ids))))
            trained = _trained(session, {header.digest for _, header in arrived})
            counted: list[int] = []
            for device_id, header in arrived:
                try:
                    found = _of(held.get(header.assignment_id), header.assignment_id, device_id)
                    results.append(self._count(session, found, header, known, trained))
                except UploadError as error:
                    results.append(error)
                    continue
                if results[-1] == Receipt(True):
                    counted.append(device_id)
            if counted:
                _sync_folder(self.spool)
            mark_back(session, counted)
        for foreign in (result for result in results if isinstance(result, Foreign)):
            self._note(foreign)
        self.notify_changed()
        return results

    def _count(
        self, session: Session, found: Assignment, header: Header, known: set[str], trained: dict[str, set[str]]
    ) -> Receipt:
        """known: assignments that have their update; trained: digest -> the parameters that such an update came for."""
        part = self._part(header.assignment_id)
        if found.id in known:
            return Receipt(True)
        why = found.error or found.status if found.status not in OPEN else _overdue(found, now())
        if why:
            part.unlink(missing_ok=True)
            return Receipt(False, f"too late: {why}; check in for the next")
        if header.total_bytes and trained.get(header.digest, set()) - {found.parameters}:
            part.unlink(missing_ok=True)
            found.status, found.error, found.finished_at = "failed", f"{REPLAYED}: {header.digest}", now()
            return Receipt(False, f"{REPLAYED}: these very bytes were handed in for other parameters")
        if header.total_bytes:
            # Only now: a second upload must not take the place of one that counts.
            os.replace(part, self.upload_path(header.assignment_id))
        found.status, found.finished_at, found.progress = "uploaded", now(), 1.0
        metrics = {n: float(v) for n, v in header.metrics.items() if math.isfinite(v)}
        told = {"num_examples": header.num_examples, "digest": header.digest, "metrics": metrics}
        session.add(Update(assignment_id=found.id, bytes=header.total_bytes, **told))
        known.add(found.id)
        trained.setdefault(header.digest, set()).add(found.parameters)
        return Receipt(True)

    # ---- after a crash -----------------------------------------------------------------------------------------------

    def holds(self, update: Update) -> bool:
        """Whether the spool has the bytes that the row speaks of."""
        path = self.upload_path(update.assignment_id)
        return update.bytes == 0 or (path.exists() and path.stat().st_size == update.bytes)

    def sweep(self) -> int:
        """Delete what is in the spool for assignments that are settled, or unknown. Returns of how many.

        Updates of a run that is to retain them stay.
        """
        files: dict[str, list[Path]] = {}
        for path in self.spool.iterdir():
            if path.suffix in (".update", ".part"):
                files.setdefault(path.stem, []).append(path)
        with self.store.read() as session:
            for some in portions(list(files)):
                known = sa.select(Assignment.id, Assignment.status, Run.config).join(Run).where(Assignment.id.in_(some))
                for row_id, status, config in session.execute(known):
                    if status in (*OPEN, "uploaded") or config.get("retain_updates"):
                        del files[row_id]
        for path in (path for paths in files.values() for path in paths):
            path.unlink(missing_ok=True)
        return len(files)


def _of(found: Assignment | None, assignment_id: str, device_id: int) -> Assignment:
    """
    Raises:
        UploadError: there is no such assignment, or it is another device's.
    """
    if found is not None and found.device_id != device_id:
        raise Foreign(found, device_id)
    if found is None:
        raise UploadError("not_found", f"this device holds no assignment {assignment_id[:MAX_NAME]!r}")
    return found


def _trained(session: Session, digests: set[str]) -> dict[str, set[str]]:
    """Which parameters updates of these bytes came for, from any device: the same bytes for others are a replay."""
    rows = sa.select(Update.digest, Assignment.parameters).join(Assignment).where(Update.digest.in_(digests - {""}))
    found: dict[str, set[str]] = {}
    for digest, parameters in session.execute(rows.distinct()):
        found.setdefault(digest, set()).add(parameters)
    return found


def mark_back(session: Session, device_ids: Sequence[int]) -> None:
    """These devices have just done their work: they will be there for the next round."""
    moment, device = now(), sa.bindparam("device", type_=sa.Integer)
    there = {"last_seen_at": moment, "present_until": moment + timedelta(seconds=AWAY_S)}
    session.flush()  # assignments are locked before devices, everywhere
    if device_ids:
        statement = sa.update(Device).where(Device.id == device).values(there)
        session.connection().execute(statement, [{"device": i} for i in sorted(set(device_ids))])


def _sync_folder(folder: Path) -> None:
    """Make a rename in it durable: the receipt promises that a power cut loses nothing."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _overdue(assignment: Any, moment: datetime) -> str | None:
    """Why an open assignment is to be closed, or None."""
    if assignment.deadline is not None and moment > assignment.deadline:
        return "the round's deadline has passed"
    if assignment.lease_until is not None and moment > assignment.lease_until:
        return "no heartbeat within the lease"
    return None


def portions(ids: Sequence[T], size: int = 1000) -> Iterator[Sequence[T]]:
    """A database takes only so many values in one statement."""
    return (ids[start : start + size] for start in range(0, len(ids), size))


def devices_online(
    session: Session, channel: str, forms: bool = False, sdks: tuple[str, str] = ("", "")
) -> dict[int, str]:
    """Devices (id -> name) of a channel with labelled examples that are asking for work now, or will again at once.

    forms: only those that know other forms of an update than the plain one. sdks: least and greatest version of the SDK.
    """
    there = sa.select(Device.id, Device.name, Device.sdk_version).where(
        Device.channel == channel, Device.present_until >= now()
    )
    rows = session.execute(there.where(Device.examples > 0))
    return {
        row.id: row.name
        for row in rows
        if (not forms or knows_forms(row.sdk_version)) and sdk_fits(row.sdk_version, *sdks)
    }
