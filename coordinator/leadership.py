"""Which of several coordinators on one database may write: a lease with a fencing token."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.store import OUTAGES, Lease, Store, StoreError

# Windows has no such locks: there only the lease's time tells.
LOCKS: Any = importlib.import_module("fcntl") if os.name == "posix" else None
NAME = "coordinator"
LEASE_S = 10.0  # a leader that is not heard of for so long may be followed by another


class Deposed(StoreError):  # noqa: N818 - says what happened
    """Another coordinator has taken over; nothing that this one writes counts any more."""


class Leadership:
    """The right to write, from `acquire()` on, kept up by a thread until `release()`.

    Every write of the store takes the lease's row with it: either it commits before another coordinator takes over, or it
    is refused (Deposed). Clocks decide when to take over, never what is written.

    Args:
        spool: the folder of uploads; coordinators that share it know from its lock whether the other one is alive.
    """

    def __init__(self, store: Store, spool: Path, lease_s: float = LEASE_S) -> None:
        self.store, self.lease_s = store, lease_s
        self.holder = f"{socket.gethostname()}:{spool.absolute()}"[:500]
        self.token = 0
        spool.mkdir(parents=True, exist_ok=True)
        self._lock_path = spool / "lock"
        self._lock: int | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    # ---- becoming the leader -----------------------------------------------------------------------------------------

    def acquire(self, on_wait: Callable[[str], None], should_stop: Callable[[], bool]) -> bool:
        """Wait until this is the leader; `on_wait` is told once who is. False: stopped before."""
        told = False
        while not should_stop():
            other = self._try()
            if other is None:
                self.store.fence = self.check
                self._thread = threading.Thread(target=self._renew, name="pocketfed-lease", daemon=True)
                self._thread.start()
                return True
            if not told:
                on_wait(other)
                told = True
            self._done.wait(min(1.0, self.lease_s / 5))
        return False

    def _try(self) -> str | None:
        """Take the lease if it is free; else who holds it."""
        if self._lock is None:
            self._lock = try_lock(self._lock_path)
        if self._lock is None:
            return self.holder
        with self.store.write() as session:
            held, moment = session.get(Lease, NAME, with_for_update=True), _time(session)
            if held is None:
                held = Lease(name=NAME, holder=self.holder, token=0, held_until=moment)
                session.add(held)
            # Whoever held it with this very spool is dead: we have the lock that a process keeps while it lives.
            elif held.holder not in ("", self.holder if LOCKS else "") and held.held_until > moment:
                return held.holder
            held.token += 1
            held.holder, held.held_until = self.holder, moment + timedelta(seconds=self.lease_s)
            session.flush()
            self.token = held.token
        return None

    # ---- being it ----------------------------------------------------------------------------------------------------

    def check(self, session: Session) -> None:
        """Raises Deposed unless this is the leader still, and holds off others until the session's transaction ends."""
        # FOR KEY SHARE: renewing goes on beside it, taking over (FOR UPDATE) waits for it.
        mine = sa.select(Lease.token).where(Lease.name == NAME).with_for_update(read=True, key_share=True)
        token = session.scalar(mine)
        if token != self.token:
            raise Deposed(
                f"another coordinator has taken over the database {self.store.name} (lease {token}, ours was "
                f"{self.token}); this one writes nothing more: stop it, or start it again to wait its turn"
            )

    def _renew(self) -> None:
        while not self._done.wait(self.lease_s / 3):
            with contextlib.suppress(*OUTAGES), Session(self.store.engine) as session, session.begin():
                mine = sa.update(Lease).where(Lease.name == NAME, Lease.token == self.token)
                session.execute(mine.values(held_until=_time(session) + timedelta(seconds=self.lease_s)))

    def release(self) -> None:
        """Let another coordinator follow at once."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self.store.fence = None
            with contextlib.suppress(*OUTAGES), Session(self.store.engine) as session, session.begin():
                mine = sa.update(Lease).where(Lease.name == NAME, Lease.token == self.token)
                session.execute(mine.values(holder="", held_until=_time(session)))
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _time(session: Session) -> datetime:
    """What the database's clock says: coordinators need not agree on the time. SQLite has the machine's."""
    if session.get_bind().dialect.name == "postgresql":
        moment: datetime = session.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
        return moment
    return datetime.now(UTC)


def try_lock(path: Path) -> int | None:
    """A lock that ends with the process, or None where another process has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    if LOCKS is None:
        return descriptor
    try:
        LOCKS.flock(descriptor, LOCKS.LOCK_EX | LOCKS.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):  # else whoever had it has removed it meanwhile
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


@contextlib.contextmanager
def holding(path: Path) -> Iterator[bool]:
    """Whether this process has the lock at `path` for as long as the block lasts; its file goes with it."""
    lock = try_lock(path)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            path.unlink(missing_ok=True)
            os.close(lock)


@contextlib.contextmanager
def lead(
    store: Store, spool: Path, on_wait: Callable[[str], None], should_stop: Callable[[], bool]
) -> Iterator[Leadership | None]:
    """Be the leader for as long as the block lasts; None if told to stop while waiting."""
    leadership = Leadership(store, spool)
    try:
        yield leadership if leadership.acquire(on_wait, should_stop) else None
    finally:
        leadership.release()


@contextlib.contextmanager
def claim(store: Store, name: str) -> Iterator[bool]:
    """Whether this process may do what only one at a time may, for as long as the block lasts; a lock dies with its process."""
    if store.file is not None:
        with holding(store.file.with_name(f"{store.file.name}.{name}.lock")) as mine:
            yield mine
    elif store.engine.dialect.name == "postgresql":
        with store.engine.connect() as connection:
            key = sa.func.hashtext(f"pocketfed {name}")
            yield bool(connection.scalar(sa.select(sa.func.pg_try_advisory_lock(key))))
            connection.invalidate()  # with its session the lock is gone, whatever state it is in
    else:
        yield True  # in this process's memory
