"""What the coordinator remembers: typed tables, and the few writes that touch more than one of them."""

from __future__ import annotations

import errno
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy import ForeignKey, String, UniqueConstraint
from sqlalchemy.engine import URL, make_url
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.orm.attributes import get_history
from sqlalchemy.orm.base import PASSIVE_NO_INITIALIZE

CHUNK_BYTES = 1 << 20
MIGRATIONS = Path(__file__).with_name("migrations")
MIGRATION_LOCK = 7_305_804_385_369_681_253  # PostgreSQL's advisory lock of whoever upgrades the schema


# What a run may come to be from what it is; likewise a round (its attempt counts up with the way back) and an assignment.
MOVES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "runs": {"waiting": ("running", "failed"), "running": ("waiting", "finished", "failed")},
    "rounds": {"running": ("finished", "failed")},
    "assignments": {
        "offered": ("accepted", "uploaded", "failed", "expired"),
        "accepted": ("offered", "uploaded", "failed", "expired"),
        "uploaded": ("offered", "aggregated", "quarantined", "discarded"),
    },
}


class StoreError(RuntimeError):
    """The database cannot be used; the message says why and what to do."""


OUTAGES = (sa.exc.OperationalError, sa.exc.InterfaceError, OSError)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def is_outage(error: BaseException) -> bool:
    """Whether the database or the disk is not there or full now, so that trying again later may help."""
    return isinstance(error, OUTAGES) and (not isinstance(error, OSError) or error.errno in _DISK)


class HasNow(Protocol):
    def now(self) -> datetime:
        """Aware, in UTC, and never earlier than before."""


class Clock:
    """The time of day when this was made, and from then on what has really passed: a clock that is set ends no lease.

    Args:
        wall: the time of day; passed: seconds from any point on, never set back (and, where the system can, counting sleep).
    """

    def __init__(self, wall: Callable[[], datetime], passed: Callable[[], float]) -> None:
        self._passed = passed
        self._begin, self._origin = wall(), passed()

    def now(self) -> datetime:
        return self._begin + timedelta(seconds=self._passed() - self._origin)


def _passed_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


_clock: ContextVar[HasNow] = ContextVar("clock", default=Clock(lambda: datetime.now(UTC), _passed_s))  # noqa: B039 - it has no state


def now() -> datetime:
    return _clock.get().now()


@contextmanager
def by_clock(clock: HasNow) -> Iterator[None]:
    """In this thread, and as long as this lasts, it is what that clock says: fleets are simulated on a virtual one."""
    before = _clock.set(clock)
    try:
        yield
    finally:
        _clock.reset(before)


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """An aware UTC datetime; SQLite has none of its own."""

    impl = sa.DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    type_annotation_map = {datetime: UtcDateTime, dict[str, Any]: sa.JSON, list[str]: sa.JSON, list[int]: sa.JSON}


class Chunk(Base):
    """A piece of at most CHUNK_BYTES of one or more blobs."""

    __tablename__ = "chunks"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)  # sha256, hex
    data: Mapped[bytes] = mapped_column(sa.LargeBinary)


class Blob(Base):
    """Bytes by their sha256: artifact files and the parameters of every round."""

    __tablename__ = "blobs"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    bytes: Mapped[int] = mapped_column(sa.BigInteger)
    chunks: Mapped[list[str]]  # digests in order


class Artifact(Base):
    """A published model: its manifest names the blobs it is made of."""

    __tablename__ = "artifacts"
    version: Mapped[str] = mapped_column(String(64), primary_key=True)
    manifest: Mapped[dict[str, Any]]
    bytes: Mapped[int] = mapped_column(sa.BigInteger)
    created_at: Mapped[datetime] = mapped_column(default=now)


class Release(Base):
    """What devices on a channel should run: an artifact, one of its trainable sets, values for it.

    state: staged (for `percent` of the devices), live (for all), paused (for nobody new), halted (worse than its parent),
    superseded, rolled_back. The newest that covers a device is the device's; see releases.py.
    """

    __tablename__ = "releases"
    id: Mapped[int] = mapped_column(primary_key=True)
    channel: Mapped[str] = mapped_column(String(100), index=True)
    artifact_version: Mapped[str] = mapped_column(ForeignKey("artifacts.version"))
    trainable_set: Mapped[str] = mapped_column(String(50))
    parameters: Mapped[str] = mapped_column(ForeignKey("blobs.digest"))
    run_id: Mapped[int | None] = mapped_column(ForeignKey("runs.id"), index=True)
    created_at: Mapped[datetime] = mapped_column(default=now)
    state: Mapped[str] = mapped_column(String(20), default="live", server_default="live")
    percent: Mapped[float] = mapped_column(default=100.0, server_default="100")  # of the channel's devices
    parent_id: Mapped[int | None]  # the release it is to follow, and is measured against
    undoes_id: Mapped[int | None]  # the release that it takes devices back from
    margin: Mapped[float] = mapped_column(default=0.0, server_default="0")  # of accuracy that a cohort may lose
    loss_margin: Mapped[float] = mapped_column(default=0.0, server_default="0")  # nats an example that it may gain
    min_devices: Mapped[int] = mapped_column(default=0, server_default="0")  # that judge for a cohort; 0: nobody does
    automatic: Mapped[bool] = mapped_column(default=False, server_default=sa.false())  # it goes on to more by itself
    min_sdk: Mapped[str] = mapped_column(String(20), default="", server_default=sa.text("''"))
    max_sdk: Mapped[str] = mapped_column(String(20), default="", server_default=sa.text("''"))


class Device(Base):
    """An enrolled device. `id` is also its Flower node id."""

    __tablename__ = "devices"
    __table_args__ = (sa.Index("ix_devices_channel_present_until", "channel", "present_until"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    channel: Mapped[str] = mapped_column(String(100), default="stable", index=True)
    token_hash: Mapped[str] = mapped_column(
        String(64), index=True
    )  # sha256 of the bearer token; the token itself is not kept
    sdk_version: Mapped[str] = mapped_column(String(50), default="")
    examples: Mapped[int] = mapped_column(default=0)
    enrolled_at: Mapped[datetime] = mapped_column(default=now)
    last_seen_at: Mapped[datetime | None] = mapped_column(index=True)
    present_until: Mapped[datetime | None]  # it asks for work until then, or will again by then
    enrolment_key_id: Mapped[int | None] = mapped_column(ForeignKey("enrolment_keys.id"), index=True)
    cohort: Mapped[str | None] = mapped_column(String(100))  # of the enrolment key, where it has one
    revoked_at: Mapped[datetime | None]
    shared_at: Mapped[datetime | None]  # when its credential was last seen in use at two places at once
    release_id: Mapped[int | None]  # what it runs, as it says
    tier: Mapped[str | None] = mapped_column(
        String(50)
    )  # what kind of device it is, as its app says; nothing follows from it


class Run(Base):
    """One training of the fleet. status: waiting (for a coordinator), running, finished, failed; see MOVES."""

    __tablename__ = "runs"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    channel: Mapped[str] = mapped_column(String(100))
    status: Mapped[str] = mapped_column(String(20), default="waiting")
    reason: Mapped[str | None] = mapped_column(String(500))
    config: Mapped[dict[str, Any]]
    artifact_version: Mapped[str] = mapped_column(ForeignKey("artifacts.version"))
    trainable_set: Mapped[str] = mapped_column(String(50))
    seed: Mapped[int] = mapped_column(sa.BigInteger)
    rounds_planned: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(default=now)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class Round(Base):
    """One round; number 0 holds the evaluation of what the run started from. status: running, finished, failed.

    An attempt that fails is followed by another with the same parameters: `attempt` is the one that counts.
    """

    __tablename__ = "rounds"
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str] = mapped_column(String(20), default="running")
    attempt: Mapped[int] = mapped_column(default=1, server_default="1")
    cohort: Mapped[list[int] | None]  # devices sampled for the attempt, in order of their names
    reason: Mapped[str | None] = mapped_column(String(500))
    parameters: Mapped[str | None] = mapped_column(ForeignKey("blobs.digest"))  # what the round ended with
    accuracy: Mapped[float | None]  # on the coordinator's test set, or on the devices' own where there is none
    loss: Mapped[float | None]
    train_loss: Mapped[float | None]  # mean over the devices' last local epoch, weighted by examples
    devices: Mapped[int] = mapped_column(default=0)  # updates that were aggregated
    failed: Mapped[int] = mapped_column(default=0)  # assignments that ended otherwise
    bytes_up: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    bytes_down: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    seconds: Mapped[float] = mapped_column(default=0.0)
    started_at: Mapped[datetime] = mapped_column(default=now)
    finished_at: Mapped[datetime | None]


class Assignment(Base):
    """One device's part in a round.

    status: offered, accepted, uploaded, aggregated, quarantined, discarded (usable, but its round's attempt failed),
    failed (it said so), expired (lease, deadline, the round had enough); see MOVES.
    """

    __tablename__ = "assignments"
    __table_args__ = (
        UniqueConstraint("run_id", "round", "attempt", "device_id", "kind"),
        sa.Index("ix_assignments_device_id_status", "device_id", "status"),
        sa.Index("ix_assignments_run_id_counted_in", "run_id", "counted_in"),
        sa.Index("ix_assignments_status_run_id", "status", "run_id"),
    )
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"))
    round: Mapped[int]
    attempt: Mapped[int] = mapped_column(default=1)
    device_id: Mapped[int] = mapped_column(ForeignKey("devices.id"))
    kind: Mapped[str] = mapped_column(String(10))  # train, evaluate
    counted_in: Mapped[int | None]  # the round whose commit settled it: a later one where rounds are buffered
    status: Mapped[str] = mapped_column(String(20), default="offered")
    config: Mapped[dict[str, Any]]
    parameters: Mapped[str] = mapped_column(ForeignKey("blobs.digest"))
    phase: Mapped[str | None] = mapped_column(String(20))  # downloading, training, uploading: as the device last said
    progress: Mapped[float] = mapped_column(default=0.0)  # 0 to 1 within the phase
    offered_at: Mapped[datetime] = mapped_column(default=now)
    accepted_at: Mapped[datetime | None]
    lease_until: Mapped[datetime | None]
    deadline: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    error: Mapped[str | None] = mapped_column(String(500))
    bytes_down: Mapped[int] = mapped_column(sa.BigInteger, default=0)


class Update(Base):
    """What a device sent back; its bytes are deleted once the round has committed."""

    __tablename__ = "updates"
    assignment_id: Mapped[str] = mapped_column(ForeignKey("assignments.id"), primary_key=True)
    num_examples: Mapped[int]
    bytes: Mapped[int] = mapped_column(sa.BigInteger)
    digest: Mapped[str] = mapped_column(String(64), index=True)
    metrics: Mapped[dict[str, Any]]
    norm: Mapped[float | None]
    cosine: Mapped[float | None]  # between it and the run's last step, as screening found it
    reason: Mapped[str | None] = mapped_column(String(500))  # why it was quarantined
    received_at: Mapped[datetime] = mapped_column(default=now)


class Metric(Base):
    """Any further number of a round, by name."""

    __tablename__ = "metrics"
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    value: Mapped[float]


class Baseline(Base):
    """A number of what a run is compared with; kind: one of baselines.KINDS."""

    __tablename__ = "baselines"
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    kind: Mapped[str] = mapped_column(String(20), primary_key=True)
    metric: Mapped[str] = mapped_column(String(100), primary_key=True)
    value: Mapped[float]
    at: Mapped[datetime] = mapped_column(default=now)


class Checkpoint(Base):
    """What beside the parameters the next round depends on, as of a run's newest committed round."""

    __tablename__ = "checkpoints"
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    round: Mapped[int]
    state: Mapped[str] = mapped_column(ForeignKey("blobs.digest"))  # see strategy_state.py


class History(Base):
    """What a run, a round's attempt or an assignment came to be, and when. Only ever added to."""

    __tablename__ = "history"
    __table_args__ = (sa.Index("ix_history_run_id_round", "run_id", "round"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(default=now)
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"))
    round: Mapped[int | None]
    attempt: Mapped[int | None]
    assignment_id: Mapped[str | None] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(20))
    reason: Mapped[str | None] = mapped_column(String(500))


class Lease(Base):
    """Which coordinator may write; `token` goes up with every new holder."""

    __tablename__ = "leases"
    name: Mapped[str] = mapped_column(String(20), primary_key=True)
    holder: Mapped[str] = mapped_column(String(500))
    token: Mapped[int]
    held_until: Mapped[datetime]


class Vitals(Base):
    """How the leading coordinator did in the `seconds` before `at`; kept for a day (vitals.py)."""

    __tablename__ = "vitals"
    at: Mapped[datetime] = mapped_column(primary_key=True)
    seconds: Mapped[float]
    calls: Mapped[int]
    errors: Mapped[int]  # calls that ended otherwise than well, hang-ups left out
    p50_ms: Mapped[float]  # of a call, the wait of a long poll left out
    p95_ms: Mapped[float]
    p99_ms: Mapped[float]
    bytes_in: Mapped[int] = mapped_column(sa.BigInteger)
    bytes_out: Mapped[int] = mapped_column(sa.BigInteger)
    write_ms: Mapped[float]  # a transaction that writes, on average
    devices: Mapped[int]  # there at that moment, as all that follows
    polls: Mapped[int]
    queue: Mapped[int]  # check-ins and uploads waiting for the database
    spool_files: Mapped[int]
    spool_bytes: Mapped[int] = mapped_column(sa.BigInteger)
    rss_bytes: Mapped[int] = mapped_column(sa.BigInteger)
    open_files: Mapped[int]


class Presence(Base):
    """The most devices that were there at once in an hour; kept for five weeks (vitals.py)."""

    __tablename__ = "presence"
    hour: Mapped[datetime] = mapped_column(primary_key=True)  # its beginning
    devices: Mapped[int]


def database_url(text: str) -> URL:
    """`fleet.db`, `/data/fleet.db` or any SQLAlchemy URL.

    Raises:
        StoreError: not a URL, an unknown kind of database, or a folder that does not exist.
    """
    if "://" not in text:
        text = f"sqlite:///{text}"
    try:
        url = make_url(text)
        url.get_dialect()
    except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError) as error:
        raise StoreError(
            f"{text!r} is not a database URL: {error}; use a file name or e.g. sqlite:///fleet.db"
        ) from None
    if url.get_backend_name() == "sqlite" and url.database and url.database != ":memory:":
        folder = Path(url.database).absolute().parent
        if not folder.is_dir():
            raise StoreError(f"the folder {folder} of database {url.database} does not exist; create it first")
        if Path(url.database).is_dir():
            raise StoreError(f"{url.database} is a folder; name a file in it, e.g. {url.database}/fleet.db")
    return url


class Store:
    """An open database. Sessions come from `read()` and `write()`; a write is one transaction.

    `fence` is called at the start of every write and raises where this process may not write any more (leadership.py);
    `on_write` is told how long a write took, from its begin to its commit.

    Args:
        database: a file name or SQLAlchemy URL.
        create: make or upgrade the tables (a reader leaves the schema alone).
        must_exist: do not make a file where there is none.

    Raises:
        StoreError: unreachable, unreadable, missing, or of a schema this version does not know.
    """

    def __init__(self, database: str, create: bool = True, must_exist: bool = False) -> None:
        self.url = database_url(database)
        self.fence: Callable[[Session], None] | None = None
        self.on_write: Callable[[float], None] = lambda seconds: None
        if (must_exist or not create) and self.file is not None and not self.file.exists():
            raise StoreError(
                f"there is no database {self.file}; start `pocketfed simulate` or `pocketfed serve` with it first"
            )
        try:
            self.engine = sa.create_engine(self.url, pool_pre_ping=not self.is_sqlite)
        except ImportError as error:
            raise StoreError(
                f"the database {self.name} needs a driver that is not installed ({error}); install it, e.g. "
                "`pip install 'pocketfed[postgresql]'` for postgresql+psycopg://"
            ) from None
        if self.is_sqlite:
            sa.event.listen(self.engine, "connect", _prepare_sqlite)
        try:
            self._migrate(create)
        except sa.exc.DBAPIError as error:
            self.close()
            raise StoreError(
                f"cannot use the database {self.name}: {error.orig}; "
                "check that it is there, is a database and may be written"
            ) from None
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        return self.url.render_as_string(hide_password=True)

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @property
    def file(self) -> Path | None:
        """The database's file, where it has one."""
        is_file = self.is_sqlite and self.url.database not in (None, "", ":memory:")
        return Path(str(self.url.database)).absolute() if is_file else None

    def _migrate(self, create: bool) -> None:
        from alembic import command
        from alembic.config import Config
        from alembic.script import ScriptDirectory

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.set_main_option("path_separator", "os")
        script = ScriptDirectory.from_config(config)
        known, head = {r.revision for r in script.walk_revisions()}, script.get_current_head()
        with self.engine.connect() as connection:
            found = _revision(connection)
        if found is not None and found not in known:
            raise StoreError(
                f"the database {self.name} has schema revision {found}, newer than this version of pocketfed knows "
                f"({head}); upgrade pocketfed or use another database"
            )
        if found == head:
            return
        if not create:
            raise StoreError(
                f"the database {self.name} has schema revision {found}, not {head}; run `pocketfed db upgrade` on it"
            )
        from pocketfed.coordinator.operators import local_admin

        line = {"who": local_admin().name, "act": "db.upgrade", "target": f"{found} to {head}"}
        try:
            with self.engine.begin() as connection:  # all or nothing, and one process at a time
                if self.is_sqlite:
                    connection.exec_driver_sql("BEGIN IMMEDIATE")  # by itself SQLite's driver commits every table
                else:
                    connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
                if _revision(connection) != head:  # another process may have been faster
                    config.attributes["connection"] = connection
                    command.upgrade(config, "head")
                    if found is not None:  # a new database is no act
                        connection.execute(sa.insert(Audit).values(**line, outcome="done"))
        except Exception as error:
            with suppress(sa.exc.DBAPIError), self.engine.begin() as connection:  # the old schema may have no audit
                told = printable(f"{type(error).__name__}: {error}", 500)
                connection.execute(sa.insert(Audit).values(**line, outcome="failed", detail=told))
            raise

    @contextmanager
    def read(self) -> Iterator[Session]:
        with Session(self.engine) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        began = time.perf_counter()
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            if self.is_sqlite:
                # What is read here must still hold when it is written; SQLite would take its lock only then.
                session.connection().exec_driver_sql("BEGIN IMMEDIATE")
            if self.fence is not None:
                self.fence(session)
            yield session
        self.on_write(time.perf_counter() - began)

    def close(self) -> None:
        self.engine.dispose()


def _revision(connection: sa.Connection) -> str | None:
    from alembic.runtime.migration import MigrationContext

    return MigrationContext.configure(connection).get_current_revision()


@sa.event.listens_for(Session, "after_flush")
def _remember_moves(session: Session, _context: Any) -> None:
    """Every new status becomes a row of the history, in the same transaction; one that MOVES lacks is refused."""
    told = [row for row in [*session.new, *session.dirty] if isinstance(row, Run | Round | Assignment)]
    entries = [entry for row in told if (entry := _move(row, row in session.new)) is not None]
    if entries:
        session.connection().execute(sa.insert(History), entries)


def _move(row: Run | Round | Assignment, is_new: bool) -> dict[str, Any] | None:
    """The history's row for what has become of one, None if its status is as before."""
    status = get_history(row, "status", PASSIVE_NO_INITIALIZE)
    repeated = isinstance(row, Round) and get_history(row, "attempt", PASSIVE_NO_INITIALIZE).deleted
    if not is_new and not repeated and not status.added:
        return None
    if status.deleted and not repeated:
        inspected: Any = sa.inspect(row)
        name = " ".join(str(value) for value in inspected.identity or ())
        check_move(row.__tablename__, name, status.deleted[0], row.status)
    if isinstance(row, Run):
        return history_entry(row.id, row.status, row.reason)
    if isinstance(row, Round):
        return history_entry(row.run_id, row.status, row.reason, row.number, row.attempt)
    return history_entry(row.run_id, row.status, row.error, row.round, row.attempt, row.id)


def check_move(table: str, name: str, before: str, after: str) -> None:
    """
    Raises:
        StoreError: MOVES has no such step.
    """
    if after not in MOVES[table].get(before, ()):
        raise StoreError(f"{table[:-1]} {name} is {before} and cannot become {after}")


def history_entry(
    run_id: int,
    status: str,
    reason: str | None,
    number: int | None = None,
    attempt: int | None = None,
    assignment_id: str | None = None,
    at: datetime | None = None,
) -> dict[str, Any]:
    """A row of the history, for whoever writes many rows by one statement; `at` is now unless given."""
    entry: dict[str, Any] = {"at": at or now(), "run_id": run_id, "round": number, "attempt": attempt}
    return entry | {"assignment_id": assignment_id, "status": status, "reason": reason}


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def printable(text: str, most: int) -> str:
    """A peer's text as it may be stored and shown: no control characters (PostgreSQL takes no NUL), at most `most` long.

    >>> printable("low\\x1b[2J\\0 battery", 9)
    'low [2J  '
    """
    return "".join(c if c.isprintable() else " " for c in text[:most])


# ---- blobs -----------------------------------------------------------------------------------------------------------


def is_digest(text: str) -> bool:
    """Whether that can be the SHA-256 of anything here: 64 lower-case hexadecimal digits."""
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def split_chunks(data: bytes | memoryview) -> Iterator[tuple[str, memoryview]]:
    """(sha256, piece) for each CHUNK_BYTES of data."""
    view = memoryview(data)
    for start in range(0, len(view), CHUNK_BYTES):
        piece = view[start : start + CHUNK_BYTES]
        yield hashlib.sha256(piece).hexdigest(), piece


def put_blob(session: Session, data: bytes) -> str:
    """Store bytes once, whatever the number of times they are put. Returns their sha256."""
    digest = hashlib.sha256(data).hexdigest()
    if session.get(Blob, digest) is not None:
        return digest
    pieces = list(split_chunks(data))
    wanted = dict(pieces)
    held = set(session.scalars(sa.select(Chunk.digest).where(Chunk.digest.in_(wanted))))
    session.add_all(Chunk(digest=d, data=bytes(p)) for d, p in wanted.items() if d not in held)
    session.add(Blob(digest=digest, bytes=len(data), chunks=[d for d, _ in pieces]))
    session.flush()
    return digest


def get_blob(session: Session, digest: str) -> bytes:
    """The bytes with that sha256.

    Raises:
        StoreError: the database does not hold them.
    """
    return b"".join(iterate_blob(session, digest))


def iterate_blob(session: Session, digest: str, first_chunk: int = 0) -> Iterator[bytes]:
    """The chunks of a blob in order, from `first_chunk` on; one in memory at a time."""
    blob = session.get(Blob, digest)
    if blob is None:
        raise StoreError(f"the database holds no bytes with sha256 {digest}; was it restored from an older copy?")
    for chunk in blob.chunks[first_chunk:]:
        yield session.scalars(sa.select(Chunk.data).where(Chunk.digest == chunk)).one()


# ---- the writes that touch more than one row -------------------------------------------------------------------------


def put_artifact(session: Session, manifest: Mapping[str, Any], version: str, files: Iterable[bytes]) -> bool:
    """Publish an artifact's files and manifest. False if that very version was there already."""
    if session.get(Artifact, version) is not None:
        return False
    total = 0
    for data in files:
        put_blob(session, data)
        total += len(data)
    session.add(Artifact(version=version, manifest=dict(manifest), bytes=total))
    session.flush()
    return True


def latest_release(session: Session, channel: str) -> Release | None:
    """The newest that is for all of the channel's devices: what runs start from. releases.py knows what one device gets."""
    live = sa.select(Release).where(Release.channel == channel, Release.state == "live")
    return session.scalars(live.order_by(Release.id.desc()).limit(1)).first()


def device_named(session: Session, name: str, **values: Any) -> Device:
    """The device of that name, made if there is none (with `values`)."""
    device = session.scalars(sa.select(Device).where(Device.name == name)).first()
    if device is None:
        device = Device(name=name, **({"token_hash": ""} | values))
        session.add(device)
        session.flush()
    return device


# ---- who may come in -------------------------------------------------------------------------------------------------


class EnrolmentKey(Base):
    """What lets so many devices enrol until some day."""

    __tablename__ = "enrolment_keys"
    id: Mapped[int] = mapped_column(primary_key=True)
    key_hash: Mapped[str] = mapped_column(String(64), unique=True)  # sha256 of the key; the key itself is not kept
    cohort: Mapped[str] = mapped_column(String(100), default="")
    quota: Mapped[int]  # devices that may enrol with it
    used: Mapped[int] = mapped_column(default=0)
    round_cap: Mapped[int] = mapped_column(default=0)  # at most so many of its devices in one round; 0: no limit
    created_at: Mapped[datetime] = mapped_column(default=now)
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class KeyList(Base):
    """Which keys may sign artifacts, signed by the publisher's root key. The newest holds."""

    __tablename__ = "key_lists"
    sequence: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    publisher: Mapped[str] = mapped_column(String(64))  # the root's public key, hex
    statement: Mapped[bytes] = mapped_column(sa.LargeBinary)
    signature: Mapped[bytes] = mapped_column(sa.LargeBinary)
    created_at: Mapped[datetime] = mapped_column(default=now)


class Signature(Base):
    """The publisher's word that a channel runs a version, from `sequence` on."""

    __tablename__ = "signatures"
    channel: Mapped[str] = mapped_column(String(100), primary_key=True)
    sequence: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    artifact_version: Mapped[str] = mapped_column(ForeignKey("artifacts.version"), index=True)
    key: Mapped[str] = mapped_column(String(16))  # id of the key that signed
    statement: Mapped[bytes] = mapped_column(sa.LargeBinary)
    signature: Mapped[bytes] = mapped_column(sa.LargeBinary)
    created_at: Mapped[datetime] = mapped_column(default=now)
    withheld_for: Mapped[int | None]  # the way back from that release: handed out once it was halted, not before


class Operator(Base):
    """A person who may look, act or administer. role: viewer, operator, admin."""

    __tablename__ = "operators"
    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    role: Mapped[str] = mapped_column(String(20))
    password: Mapped[str] = mapped_column(String(200))  # scrypt, with its salt and cost
    created_at: Mapped[datetime] = mapped_column(default=now)
    disabled_at: Mapped[datetime | None]


class Audit(Base):
    """Who did what, when, and how it ended. Triggers refuse to change or delete a row."""

    __tablename__ = "audit"
    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(default=now, index=True)
    who: Mapped[str] = mapped_column(String(120))
    act: Mapped[str] = mapped_column(String(50))
    target: Mapped[str] = mapped_column(String(200), default="")
    outcome: Mapped[str] = mapped_column(String(20))  # done, refused, failed, noticed
    detail: Mapped[str] = mapped_column(String(500), default="")


# ---- how releases fare -----------------------------------------------------------------------------------------------


class ReleaseReport(Base):
    """A release on one device's own held-out examples, beside the one that the device ran before."""

    __tablename__ = "release_reports"
    release_id: Mapped[int] = mapped_column(ForeignKey("releases.id"), primary_key=True)
    device_id: Mapped[int] = mapped_column(ForeignKey("devices.id"), primary_key=True)
    before_id: Mapped[int]
    cohort: Mapped[str | None] = mapped_column(String(100))  # the device's then
    examples: Mapped[int]
    correct: Mapped[int]
    correct_before: Mapped[int]
    loss_sum: Mapped[float]  # nats
    loss_sum_before: Mapped[float]
    went_back: Mapped[bool]  # the device by itself, to the one before
    at: Mapped[datetime] = mapped_column(default=now)


class ReleaseEvent(Base):
    """What a release came to be, when and why. Only ever added to."""

    __tablename__ = "release_events"
    id: Mapped[int] = mapped_column(primary_key=True)
    release_id: Mapped[int] = mapped_column(ForeignKey("releases.id"), index=True)
    at: Mapped[datetime] = mapped_column(default=now)
    state: Mapped[str] = mapped_column(String(20))
    percent: Mapped[float]
    who: Mapped[str] = mapped_column(String(120))
    reason: Mapped[str] = mapped_column(String(500), default="")
