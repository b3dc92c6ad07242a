"""Runs, their rounds, and what went wrong in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.store import Assignment, Device, History, Metric, Round, Run, Update
from pocketfed.dashboard.queries.rounds import DROPPED, reason_given

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
class Problem:
    """Something that did not go as planned. `what` is a run, a round, or a device's name where `device` is set."""

    at: datetime
    what: str  # run, round, device
    round: int | None
    device: str | None
    status: str
    reason: str | None


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


def configs(session: Session, run_ids: Sequence[int]) -> dict[int, Mapping[str, Any]]:
    """What runs were configured with, as they were stored."""
    rows = session.execute(sa.select(Run.id, Run.config).where(Run.id.in_(run_ids)))
    return {row.id: row.config if isinstance(row.config, Mapping) else {} for row in rows}


def last_change(session: Session, run_id: int, number: int) -> datetime | None:
    """When anything of that round last came to be something else."""
    return session.scalar(sa.select(sa.func.max(History.at)).where(History.run_id == run_id, History.round == number))


def metric_names(session: Session, run_ids: Sequence[int], limit: int = 100) -> list[str]:
    """Names of all else that rounds of these runs have measured, the newest measured round's alone of each run."""
    newest = sa.select(Metric.run_id, sa.func.max(Metric.round).label("round")).where(Metric.run_id.in_(run_ids))
    last = newest.group_by(Metric.run_id).subquery()
    query = sa.select(Metric.name).join(last, sa.and_(last.c.run_id == Metric.run_id, last.c.round == Metric.round))
    return list(session.scalars(query.distinct().order_by(Metric.name).limit(limit)))


def metric(session: Session, run_ids: Sequence[int], name: str, limit: int = 10_000) -> list[tuple[int, int, float]]:
    """(run, round, value) of a metric, by run and round."""
    query = sa.select(Metric.run_id, Metric.round, Metric.value).where(Metric.run_id.in_(run_ids), Metric.name == name)
    rows = session.execute(query.order_by(Metric.run_id, Metric.round).limit(limit))
    return [(row.run_id, row.round, row.value) for row in rows]


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
        sa.select(ended, Assignment.round, Device.name, Assignment.status, reason_given())
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
