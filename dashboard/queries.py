"""What the dashboard asks the store: SQL in, small frozen rows out.

Nothing here writes, and nothing here knows Streamlit.
Counting and summing happen in SQL, and every list that grows with the fleet is a page (`limit`, `offset`), so that
10,000 devices and 1,000 rounds cost no more than what is shown. Bytes are bytes, durations are seconds, times are UTC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.store import Artifact, Assignment, Blob, Device, Release, Round, Run, Update

OFFLINE_AFTER_S = 60
STATES = ("offered", "downloading", "training", "uploading", "idle", "offline")
OPEN = ("offered", "accepted")
DROPPED = ("failed", "expired", "quarantined")
PROBLEM_ROUNDS = 5  # problems are looked for in this many of a run's newest rounds that had any


@dataclass(frozen=True)
class RunLine:
    """A run and what its rounds add up to. `accuracy` and `loss`: the newest known; `first_accuracy`: of round 0."""

    id: int
    name: str
    channel: str
    status: str
    reason: str | None
    artifact_version: str
    trainable_set: str
    seed: int
    rounds_planned: int
    rounds_done: int  # round 0, the evaluation of the start, not counted
    current_round: int | None
    accuracy: float | None
    first_accuracy: float | None
    loss: float | None
    updates: int  # aggregated, over all rounds
    failed: int
    bytes_up: int
    bytes_down: int
    seconds: float
    created_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True)
class RoundLine:
    """A round, and what had been moved and spent by its end."""

    run_id: int
    number: int
    status: str
    reason: str | None
    accuracy: float | None
    loss: float | None
    train_loss: float | None
    devices: int
    failed: int
    bytes_up: int
    bytes_down: int
    seconds: float
    total_bytes: int  # up and down, this round and those before it
    total_seconds: float
    started_at: datetime
    finished_at: datetime | None


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


@dataclass(frozen=True)
class ArtifactLine:
    """A published model as its manifest describes it; what the manifest lacks is None or empty."""

    version: str
    preset: str | None
    parameters: int | None
    flops: int | None
    quantization: str | None
    sizes: Mapping[str, int]  # bytes by precision: fp32, fp16, int8
    trainable_sets: Mapping[str, int]  # parameters by set
    labels: int
    parent: str | None
    bytes: int
    created_at: datetime


@dataclass(frozen=True)
class ReleaseLine:
    """Values of a trainable set that a channel was given. `current`: the newest of its channel."""

    id: int
    channel: str
    artifact_version: str
    trainable_set: str
    bytes: int
    run_id: int | None
    run: str | None
    current: bool
    created_at: datetime


@dataclass(frozen=True)
class Problem:
    """Something that did not go as planned. `what` is a run, a round, or a device's name where `device` is set."""

    at: datetime
    what: str  # run, round, device
    round: int | None
    device: str | None
    status: str
    reason: str | None


# ---- runs and rounds ---------------------------------------------------------------------------------------


def _newest(column: sa.orm.InstrumentedAttribute[float | None]) -> sa.ScalarSelect[Any]:
    """The last known value of a round's number, for the run of the outer query."""
    known = sa.select(column).where(Round.run_id == Run.id, column.is_not(None))
    return known.order_by(Round.number.desc()).limit(1).scalar_subquery()


def _run_lines(session: Session, page: sa.Select[Any]) -> list[RunLine]:
    ids = page.subquery()
    totals = (
        sa.select(
            Round.run_id,
            sa.func.sum(sa.case((sa.and_(Round.status == "finished", Round.number > 0), 1), else_=0)).label("done"),
            sa.func.max(Round.number).label("current"),
            *(sa.func.sum(column).label(column.key) for column in
              (Round.devices, Round.failed, Round.bytes_up, Round.bytes_down, Round.seconds)),
        )
        .where(Round.run_id.in_(sa.select(ids.c.id)))
        .group_by(Round.run_id)
        .subquery()
    )  # fmt: skip
    first = sa.select(Round.accuracy).where(Round.run_id == Run.id, Round.number == 0).scalar_subquery()
    query = (
        sa.select(
            Run,
            totals,
            _newest(Round.accuracy).label("accuracy"),
            _newest(Round.loss).label("loss"),
            first.label("first"),
        )
        .join(ids, ids.c.id == Run.id)
        .outerjoin(totals, totals.c.run_id == Run.id)
        .order_by(Run.id.desc())
    )
    return [
        RunLine(
            id=row.Run.id, name=row.Run.name, channel=row.Run.channel, status=row.Run.status, reason=row.Run.reason,
            artifact_version=row.Run.artifact_version, trainable_set=row.Run.trainable_set, seed=row.Run.seed,
            rounds_planned=row.Run.rounds_planned, rounds_done=row.done or 0, current_round=row.current,
            accuracy=row.accuracy, first_accuracy=row.first, loss=row.loss,
            updates=row.devices or 0, failed=row.failed or 0,
            bytes_up=int(row.bytes_up or 0), bytes_down=int(row.bytes_down or 0), seconds=row.seconds or 0.0,
            created_at=row.Run.created_at, finished_at=row.Run.finished_at,
        )
        for row in session.execute(query)
    ]  # fmt: skip


def runs(session: Session, limit: int = 50, offset: int = 0) -> list[RunLine]:
    """Runs, newest first."""
    return _run_lines(session, sa.select(Run.id).order_by(Run.id.desc()).limit(limit).offset(offset))


def run(session: Session, run_id: int) -> RunLine | None:
    return next(iter(_run_lines(session, sa.select(Run.id).where(Run.id == run_id))), None)


def newest_run_id(session: Session) -> int | None:
    """The run to look at when none was chosen: the newest that is running, else the newest."""
    running_first = sa.case((Run.status == "running", 0), else_=1)
    return session.scalar(sa.select(Run.id).order_by(running_first, Run.id.desc()).limit(1))


def run_names(session: Session, limit: int = 200) -> dict[int, str]:
    """Names by id, newest first: what a chooser offers."""
    rows = session.execute(sa.select(Run.id, Run.name).order_by(Run.id.desc()).limit(limit))
    return {row.id: row.name for row in rows}


def rounds(session: Session, run_ids: Sequence[int], limit: int = 10_000) -> list[RoundLine]:
    """The rounds of some runs, by run and number; the running totals are SQL window sums."""
    window: dict[str, Any] = {"partition_by": Round.run_id, "order_by": Round.number}
    names = (
        "run_id", "number", "status", "reason", "accuracy", "loss", "train_loss", "devices", "failed",
        "bytes_up", "bytes_down", "seconds", "started_at", "finished_at",
    )  # fmt: skip
    query = (
        sa.select(
            *(getattr(Round, name) for name in names),
            sa.func.sum(Round.bytes_up + Round.bytes_down).over(**window).label("total_bytes"),
            sa.func.sum(Round.seconds).over(**window).label("total_seconds"),
        )
        .where(Round.run_id.in_(run_ids))
        .order_by(Round.run_id, Round.number)
        .limit(limit)
    )
    return [RoundLine(**{**row, "total_bytes": int(row["total_bytes"])}) for row in session.execute(query).mappings()]


# ---- one round ---------------------------------------------------------------------------------------------


def _of_round(run_id: int, number: int, kind: str) -> sa.ColumnElement[bool]:
    return sa.and_(Assignment.run_id == run_id, Assignment.round == number, Assignment.kind == kind)


def kinds(session: Session, run_id: int, number: int) -> list[str]:
    """What the round asked of devices: train, evaluate, both or nothing."""
    query = sa.select(Assignment.kind).where(Assignment.run_id == run_id, Assignment.round == number).distinct()
    return sorted(session.scalars(query), reverse=True)


def funnel(session: Session, run_id: int, number: int, kind: str = "train") -> Funnel:
    """How far the round's assignments came; a device asked twice (another attempt) counts twice."""
    query = (
        sa.select(Assignment.status, sa.func.count(), sa.func.count(Assignment.accepted_at))
        .where(_of_round(run_id, number, kind))
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


def _reason() -> sa.ColumnElement[str | None]:
    return sa.func.coalesce(Update.reason, Assignment.error)


def drop_reasons(
    session: Session, run_id: int, number: int, kind: str = "train", limit: int = 8
) -> list[tuple[str, str, int]]:
    """(status, reason, count) of the assignments that did not count, most frequent first."""
    reason = sa.func.coalesce(Update.reason, Assignment.error, "").label("reason")
    query = (
        sa.select(Assignment.status, reason, sa.func.count().label("n"))
        .outerjoin(Update, Update.assignment_id == Assignment.id)
        .where(_of_round(run_id, number, kind), Assignment.status.in_(DROPPED))
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
        sa.select(Assignment, Device.name, Update.bytes, Update.num_examples, Update.norm, _reason().label("reason"))
        .join(Device, Device.id == Assignment.device_id)
        .outerjoin(Update, Update.assignment_id == Assignment.id)
        .where(_of_round(run_id, number, kind))
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
        .where(_of_round(run_id, number, "train"), Update.norm.is_not(None))
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


# ---- the fleet ---------------------------------------------------------------------------------------------


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


# ---- models ------------------------------------------------------------------------------------------------


def artifacts(session: Session, limit: int = 20, offset: int = 0) -> list[ArtifactLine]:
    """Published models, newest first."""
    query = sa.select(Artifact).order_by(Artifact.created_at.desc(), Artifact.version).limit(limit).offset(offset)
    return [_artifact_line(artifact) for artifact in session.scalars(query)]


def _artifact_line(artifact: Artifact) -> ArtifactLine:
    """What the page needs of a manifest, whatever the manifest lacks or holds besides."""
    manifest = _mapping(artifact.manifest)
    model = _mapping(manifest.get("model"))
    labels = manifest.get("labels")
    sets = {str(name): _mapping(value) for name, value in _mapping(manifest.get("trainable_sets")).items()}
    return ArtifactLine(
        version=artifact.version,
        preset=_text(model.get("preset")),
        parameters=_whole(model.get("parameters")),
        flops=_whole(model.get("flops")),
        quantization=_text(manifest.get("quantization")),
        sizes={
            k: n for k in ("fp32", "fp16", "int8") if (n := _whole(_mapping(manifest.get("sizes")).get(k))) is not None
        },
        trainable_sets={name: size for name, value in sets.items() if (size := _whole(value.get("size"))) is not None},
        labels=len(labels) if isinstance(labels, list) else 0,
        parent=_text(manifest.get("parent")),
        bytes=artifact.bytes,
        created_at=artifact.created_at,
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 else None


def releases(session: Session, limit: int = 20, offset: int = 0) -> list[ReleaseLine]:
    """What channels were given, newest first."""
    current = sa.select(sa.func.max(Release.id)).where(Release.state == "live").group_by(Release.channel)
    query = (
        sa.select(Release, Run.name, Blob.bytes, Release.id.in_(current).label("current"))
        .outerjoin(Run, Run.id == Release.run_id)
        .outerjoin(Blob, Blob.digest == Release.parameters)
        .order_by(Release.id.desc())
        .limit(limit)
        .offset(offset)
    )
    return [
        ReleaseLine(
            id=release.id, channel=release.channel, artifact_version=release.artifact_version,
            trainable_set=release.trainable_set, bytes=size or 0, run_id=release.run_id, run=name,
            current=bool(is_current), created_at=release.created_at,
        )
        for release, name, size, is_current in session.execute(query)
    ]  # fmt: skip


# ---- problems ----------------------------------------------------------------------------------------------


def problems(session: Session, run_id: int, limit: int = 20) -> list[Problem]:
    """What went wrong lately in a run, newest first.

    Dropped assignments are sought in the newest PROBLEM_ROUNDS rounds that had any, through the index on (run, round):
    looking through all of a large fleet's history to show twenty lines would take seconds.
    """
    troubled = (
        sa.select(Round.number)
        .where(Round.run_id == run_id, sa.or_(Round.failed > 0, Round.status == "running"))
        .order_by(Round.number.desc())
        .limit(PROBLEM_ROUNDS)
        .subquery()
    )
    ended = sa.func.coalesce(Assignment.finished_at, Assignment.offered_at)
    of_devices = (
        sa.select(ended, Assignment.round, Device.name, Assignment.status, _reason())
        .join(Device, Device.id == Assignment.device_id)
        .outerjoin(Update, Update.assignment_id == Assignment.id)
        .where(
            Assignment.run_id == run_id,
            Assignment.round.in_(sa.select(troubled.c.number)),
            Assignment.status.in_(DROPPED),
        )
        .order_by(ended.desc(), Assignment.id)
        .limit(limit)
    )
    of_rounds = (
        sa.select(sa.func.coalesce(Round.finished_at, Round.started_at), Round.number, Round.reason)
        .where(Round.run_id == run_id, Round.status == "failed")
        .order_by(Round.number.desc())
        .limit(limit)
    )
    of_run = sa.select(sa.func.coalesce(Run.finished_at, Run.created_at), Run.reason).where(
        Run.id == run_id, Run.status == "failed"
    )
    found = [
        Problem(at, "device", number, name, status, why)
        for at, number, name, status, why in session.execute(of_devices)
    ]
    found += [Problem(at, "round", number, None, "failed", why) for at, number, why in session.execute(of_rounds)]
    found += [Problem(at, "run", None, None, "failed", why) for at, why in session.execute(of_run)]
    return sorted(found, key=lambda problem: problem.at, reverse=True)[:limit]
