"""Where a run stands, and its steps: each is one transaction, so any coordinator can go on from the last."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.assignments import OPEN
from pocketfed.coordinator.config import RunConfig
from pocketfed.coordinator.forms import form_of, layout_of
from pocketfed.coordinator.operators import record
from pocketfed.coordinator.releases import add_release, lock_channel, open_releases
from pocketfed.coordinator.retention import delete_blobs
from pocketfed.coordinator.screening import Tally
from pocketfed.coordinator.store import (
    Artifact,
    Assignment,
    Checkpoint,
    Device,
    History,
    Metric,
    Release,
    Round,
    Run,
    Store,
    Update,
    check_move,
    get_blob,
    history_entry,
    latest_release,
    now,
    put_blob,
)
from pocketfed.model.parameters import Parameter, ParametersError, Vector, decode_vector, encode_vector

THETA = "theta"
SIMULATION = "simulation"  # in a run's stored configuration: its devices are virtual


class RunError(RuntimeError):
    """A run that cannot start or did not end well."""


class Interrupted(RunError):  # noqa: N818 - says what it is
    """A run that a coordinator has left; the next one goes on with it."""


@dataclass(frozen=True)
class RoundResult:
    """What one round ended with; `accuracy` and `loss` are None where nothing was measured.

    Where a fleet is simulated also, else None: virtual_s, fleet time since the round before had ended; device_s, for which
    devices worked, all added up; dropped, how many assignments ended without an update, by why; fates, by kind, how many were
    offered, began each phase and were lost in it (simulations/books.py).
    """

    number: int
    status: str
    accuracy: float | None
    loss: float | None
    train_loss: float | None
    devices: int
    failed: int
    bytes_up: int
    bytes_down: int
    seconds: float
    reason: str | None = None
    virtual_s: float | None = None
    device_s: float | None = None
    dropped: Mapping[str, int] | None = None
    fates: Mapping[str, Mapping[str, int]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON files have it: the number is called `round`; without what only fleets have, where there is none."""
        values = dataclasses.asdict(self)
        of_fleets = ("virtual_s", "device_s", "dropped", "fates")
        values = {k: v for k, v in values.items() if v is not None or k not in of_fleets}
        return {"round": values.pop("number"), **values}


@dataclass(frozen=True)
class Attempt:
    """What an attempt at a round came to: theta is what the run goes on with, `reason` why it failed.

    state: of the strategy, encoded; trained: the devices' metrics; measured: of theta.
    """

    theta: Vector
    reason: str | None
    tally: Tally
    trained: Mapping[str, float]
    measured: Mapping[str, float]
    seconds: float
    state: bytes | None


@dataclass(frozen=True)
class Place:
    """Where a run stands.

    number: of the round to do next; 0 if nothing was done yet. attempt, cohort: of that round; None: to be sampled.
    state: of the strategy, encoded, after the round before; None where it has none.
    """

    theta: Vector
    number: int
    attempt: int
    cohort: Mapping[int, str] | None
    failed_in_a_row: int
    state: bytes | None


# ---- starting --------------------------------------------------------------------------------------------------------


def create_run(store: Store, config: RunConfig, simulation: Mapping[str, Any] | None = None) -> int:
    """A run of the channel's newest release, waiting to be driven. Returns its id.

    Args:
        simulation: of virtual devices, made of this: no coordinator goes on with it, only a simulation of the same.

    Raises:
        RunError: nothing is released on the channel, or the artifact lacks the trainable set.
    """
    with store.write() as session:
        release = latest_release(session, config.channel)
        if release is None:
            raise RunError(
                f"nothing is published on channel {config.channel!r} of {store.name}; run `pocketfed publish` first"
            )
        manifest = get_manifest(session, release.artifact_version)
        chosen = config.trainable_set or release.trainable_set
        if chosen not in manifest["trainable_sets"]:
            raise RunError(
                f"the artifact on {config.channel!r} has no trainable set {chosen!r}, "
                f"only {', '.join(manifest['trainable_sets'])}"
            )
        try:
            form_of(config.update, manifest["trainable_sets"][chosen])
        except ParametersError as error:
            raise RunError(f"update: {error}") from None
        run = Run(
            name=config.name,
            channel=config.channel,
            config=config.to_dict() | ({SIMULATION: dict(simulation)} if simulation is not None else {}),
            artifact_version=release.artifact_version,
            trainable_set=chosen,
            seed=config.seed,
            rounds_planned=config.rounds,
        )
        session.add(run)
        session.flush()
        return run.id


def get_manifest(session: Session, version: str) -> dict[str, Any]:
    return dict(session.get_one(Artifact, version).manifest)


def run_layout(store: Store, run_id: int) -> tuple[Parameter, ...]:
    """What theta's values are called in a run."""
    with store.read() as session:
        run = session.get_one(Run, run_id)
        return layout_of(get_manifest(session, run.artifact_version)["trainable_sets"][run.trainable_set])


def starting_theta(store: Store, run_id: int) -> tuple[Vector, int]:
    """What the run goes on from, and its size: its newest round, else the channel's release, else the artifact's own."""
    with store.read() as session:
        run = session.get_one(Run, run_id)
        manifest = get_manifest(session, run.artifact_version)
        described = manifest["trainable_sets"][run.trainable_set]
        ended = sa.select(Round.parameters).where(Round.run_id == run_id, Round.parameters.is_not(None))
        digest = session.scalar(ended.order_by(Round.number.desc()).limit(1))
        release = latest_release(session, run.channel)
        of_this = (run.artifact_version, run.trainable_set)
        if digest is None and release is not None and (release.artifact_version, release.trainable_set) == of_this:
            digest = release.parameters
        digest = digest or manifest["files"][described["initial"]]["sha256"]
        return decode_vector(THETA, get_blob(session, digest), described["size"]), described["size"]


def unfinished_runs(store: Store) -> list[int]:
    """Runs that a coordinator has left, the oldest first; those of virtual devices are none of its."""
    left = sa.select(Run.id, Run.config).where(Run.status.in_(("waiting", "running"))).order_by(Run.id)
    with store.read() as session:
        return [row.id for row in session.execute(left) if SIMULATION not in row.config]


@dataclass(frozen=True)
class Simulated:
    """A run of virtual devices, as stored: `config` is a RunConfig's, `simulation` what its devices were made of."""

    run_id: int
    status: str
    artifact_version: str
    config: Mapping[str, Any]
    simulation: Mapping[str, Any]


def simulated_runs(store: Store) -> list[Simulated]:
    """Those that have not failed, the newest first."""
    with store.read() as session:
        rows = session.scalars(sa.select(Run).where(Run.status != "failed").order_by(Run.id.desc())).all()
        found = [(row, dict(row.config)) for row in rows]
        return [
            Simulated(row.id, row.status, row.artifact_version, config, config.pop(SIMULATION))
            for row, config in found
            if SIMULATION in config
        ]


def find_place(store: Store, run_id: int) -> Place:
    """Where the run stands."""
    theta, _ = starting_theta(store, run_id)
    with store.read() as session:
        rounds = session.scalars(sa.select(Round).where(Round.run_id == run_id).order_by(Round.number)).all()
        kept = session.get(Checkpoint, run_id)
        state = None if kept is None else get_blob(session, kept.state)
        if not rounds:
            return Place(theta, 0, 1, None, 0, state)
        failed = 0
        for done in rounds:
            failed = {"failed": failed + 1, "finished": 0}.get(done.status, failed)
        last = rounds[-1]
        if last.status != "running":
            return Place(theta, last.number + 1, 1, None, failed, state)
        return Place(theta, last.number, last.attempt, _cohort_of(session, last), failed, state)


def _cohort_of(session: Session, row: Round) -> dict[int, str] | None:
    """Who was sampled for an open round (id -> name, in order of the names), None if nobody was yet."""
    ids = row.cohort
    if ids is None:  # before schema 0002 only the assignments say
        mine = sa.select(Assignment.device_id).where(Assignment.run_id == row.run_id, Assignment.round == row.number)
        ids = list(session.scalars(mine.where(Assignment.attempt == row.attempt, Assignment.kind == "train")))
    names = {d: session.get_one(Device, d).name for d in ids}
    return dict(sorted(names.items(), key=lambda item: item[1])) or None


# ---- steps -----------------------------------------------------------------------------------------------------------


def begin_run(store: Store, run_id: int) -> None:
    with store.write() as session:
        run = session.get_one(Run, run_id)
        run.status, run.reason, run.started_at = "running", None, run.started_at or now()


def begin_attempt(store: Store, run_id: int, number: int, cohort: Sequence[int]) -> None:
    """These devices are sampled: from now on, whoever drives the run asks them and no others."""
    with store.write() as session:
        row = session.get(Round, (run_id, number))
        if row is None:
            session.add(Round(run_id=run_id, number=number, cohort=list(cohort)))
        else:
            row.cohort = list(cohort)


def commit_start(
    store: Store, run_id: int, theta: Vector, measured: Mapping[str, float], seconds: float
) -> RoundResult:
    """Round 0: what the run starts from, as measured."""
    accuracy, loss = _finite(measured.get("accuracy")), _finite(measured.get("loss"))
    with store.write() as session:
        row = Round(run_id=run_id, number=0, status="finished", accuracy=accuracy, loss=loss, seconds=seconds)
        row.parameters, row.finished_at = put_blob(session, encode_vector(THETA, theta)), now()
        session.add(row)
    return RoundResult(0, "finished", accuracy, loss, None, 0, 0, 0, 0, seconds)


def commit_attempt(store: Store, run_id: int, number: int, done: Attempt, retry: bool) -> RoundResult | None:
    """The new parameters, what became of every assignment and all numbers; None if the round is to be tried again."""
    with store.write() as session:
        row = session.get_one(Round, (run_id, number))
        accepted = _settle(session, row, done)
        if done.reason and retry:
            row.reason, row.attempt = f"attempt {row.attempt} failed: {done.reason}"[:500], row.attempt + 1
            row.cohort = None
            _keep_state(session, run_id, number, done.state)
            return None
        row.status, row.reason = ("failed", done.reason) if done.reason else ("finished", None)
        row.parameters = put_blob(session, encode_vector(THETA, done.theta))
        row.accuracy, row.loss = _finite(done.measured.get("accuracy")), _finite(done.measured.get("loss"))
        row.train_loss, row.devices = _finite(done.trained.get("loss")), accepted
        row.seconds, row.finished_at = row.seconds + done.seconds, now()
        named = {**{f"train_{k}": v for k, v in done.trained.items()}, **done.measured}
        finite = {k[:100]: v for k, v in named.items() if np.isfinite(v)}
        session.add_all(Metric(run_id=run_id, round=number, name=k, value=v) for k, v in finite.items())
        _keep_state(session, run_id, number, done.state)
        return result_of(row)


def _settle(session: Session, row: Round, done: Attempt) -> int:
    """Book what was settled since the last commit on this round. Returns how many updates were accepted."""
    mine = _SETTLED.where(Assignment.run_id == row.run_id, Assignment.counted_in.is_(None))
    settled, judged, moved = list[dict[str, Any]](), list[dict[str, Any]](), list[dict[str, Any]]()
    accepted = 0
    for found in session.execute(mine.where(Assignment.status.not_in(OPEN)).order_by(Assignment.id)):
        told = done.tally.statuses.get(found.id)
        status, why = found.status, found.error
        if found.kind == "evaluate":
            told = ("aggregated", None, None) if status == "uploaded" else None
        elif told is None and status == "uploaded":
            continue  # it waits for a later buffer
        if told is not None:
            status, why, norm = told
            if status == "aggregated" and done.reason:
                status, why = "discarded", done.reason[:500]
            if found.status != "uploaded":  # the device had given up, and says the tally so too
                status = found.status
            if found.bytes is not None and found.kind == "train":
                cosine = done.tally.cosines.get(found.id)
                judged.append({"row_id": found.id, "reason": why, "norm": norm, "cosine": cosine})
        if status != found.status:
            check_move("assignments", found.id, found.status, status)
            moved.append(history_entry(row.run_id, status, why, found.round, found.attempt, found.id))
        ended = {"counted_in": row.number, "finished_at": found.finished_at or now()}
        settled.append({"row_id": found.id, "status": status, "error": why, **ended})
        row.bytes_down += found.bytes_down
        row.bytes_up += found.bytes or 0
        if found.kind == "train":
            accepted += status == "aggregated"
            row.failed += status not in ("aggregated", "discarded")
    this: sa.BindParameter[str] = sa.bindparam("row_id")
    for statement, rows in (
        (sa.update(Assignment).where(Assignment.id == this), settled),
        (sa.update(Update).where(Update.assignment_id == this), judged),
        (sa.insert(History), moved),
    ):
        if rows:
            session.connection().execute(statement, rows)
    return accepted


# What settling looks at, in columns: a round of ten thousand devices is not as many objects.
_SETTLED = (
    sa.select(Assignment.id, Assignment.kind, Assignment.status, Assignment.error, Assignment.round)
    .add_columns(Assignment.attempt, Assignment.finished_at, Assignment.bytes_down, Update.bytes)
    .outerjoin(Update, Update.assignment_id == Assignment.id)
)


def _keep_state(session: Session, run_id: int, number: int, state: bytes | None) -> None:
    """The strategy's state in the place of the one before."""
    if state is None:
        return
    kept, digest = session.get(Checkpoint, run_id), put_blob(session, state)
    if kept is None:
        session.add(Checkpoint(run_id=run_id, round=number, state=digest))
        return
    before, kept.round, kept.state = kept.state, number, digest
    session.flush()
    delete_blobs(session, {before})


def result_of(row: Round) -> RoundResult:
    return RoundResult(
        row.number, row.status, row.accuracy, row.loss, row.train_loss, row.devices, row.failed, row.bytes_up,
        row.bytes_down, row.seconds, row.reason,
    )  # fmt: skip


def results_of(store: Store, run_id: int) -> list[RoundResult]:
    """All rounds that have ended."""
    ended = sa.select(Round).where(Round.run_id == run_id, Round.status != "running").order_by(Round.number)
    with store.read() as session:
        return [result_of(row) for row in session.scalars(ended)]


def _finite(value: float | None) -> float | None:
    """None for what is no number: a device's loss of 1e308 makes an infinite mean."""
    return value if value is not None and np.isfinite(value) else None


def settled_in(store: Store, run_id: int, number: int) -> list[str]:
    """The assignments that a round has settled, those that expired included."""
    with store.read() as session:
        mine = sa.select(Assignment.id).where(Assignment.run_id == run_id, Assignment.counted_in == number)
        return list(session.scalars(mine))


# ---- ending ----------------------------------------------------------------------------------------------------------


def finish_run(store: Store, run_id: int, config: RunConfig, theta: Vector) -> None:
    """The run has ended well; its result is released, where that is asked for.

    Not if something else was published on the channel meanwhile: that would take the devices back.
    """
    with store.write() as session:
        run = session.get_one(Run, run_id)
        run.status, run.reason, run.finished_at = "finished", None, now()
        _close_open(session, run_id)
        lock_channel(session, run.channel)  # before the look: a publish that is under way counts
        newest = next(iter(open_releases(session, run.channel)), None)
        if config.release and newest is not None and newest.artifact_version != run.artifact_version:
            run.reason = f"not released: {run.channel!r} has gone on to the artifact {newest.artifact_version[:12]}"
        elif config.release:
            release = Release(
                channel=run.channel,
                artifact_version=run.artifact_version,
                trainable_set=run.trainable_set,
                run_id=run_id,
                parameters=put_blob(session, encode_vector(THETA, theta)),
            )
            sdks = (newest.min_sdk, newest.max_sdk) if newest is not None else ("", "")
            add_release(session, release, config.rollout_plan(*sdks), f"run {run_id}")
        told = run.reason or (f"released on {run.channel}" if config.release else "not to be released")
        record(session, "coordinator", "run.finish", run.name, "done", f"run {run_id}: {told}")


def interrupt_run(store: Store, run_id: int, reason: str) -> None:
    """This coordinator stops driving the run. What devices have under way goes on."""
    with store.write() as session:
        run = session.get_one(Run, run_id)
        if run.status == "running":
            run.status, run.reason = "waiting", reason[:500]


def give_up(store: Store, run_id: int, reason: str) -> list[str]:
    """The run has failed, and with it its open round and what devices still work on. Returns all of its assignments."""
    with store.write() as session:
        run = session.get_one(Run, run_id)
        if run.status in ("waiting", "running"):
            run.status, run.reason, run.finished_at = "failed", reason[:500], now()
        for row in session.scalars(sa.select(Round).where(Round.run_id == run_id, Round.status == "running")):
            row.status, row.reason, row.finished_at = "failed", reason[:500], now()
        _close_open(session, run_id)
        return list(session.scalars(sa.select(Assignment.id).where(Assignment.run_id == run_id)))


def _close_open(session: Session, run_id: int) -> None:
    mine = sa.select(Assignment).where(Assignment.run_id == run_id, Assignment.status.in_(OPEN))
    for found in session.scalars(mine.order_by(Assignment.id).with_for_update()):
        found.status, found.error, found.finished_at = "expired", "the run has ended", now()
