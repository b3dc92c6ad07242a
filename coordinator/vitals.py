"""How the coordinator does: counts of what its calls cost, and a row of vital figures in the database now and then.

Plain numbers, kept whether or not anybody looks: metrics.py shows them to Prometheus, the `vitals` table to the dashboard.
"""

from __future__ import annotations

import contextlib
import os
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.store import OUTAGES, Device, Presence, Store, StoreError, Vitals, now

EVERY_S = 15.0
KEPT = timedelta(days=1)
HOURS_KEPT = timedelta(days=35)
BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
EXPECTED = ("OK", "CANCELLED")  # codes that are nobody's fault: a device may hang up


@dataclass
class Histogram:
    """How many took at most so long; the last count is of those beyond all bounds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    total_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.total_s += seconds


def quantile(counts: Sequence[int], share: float) -> float:
    """The bound that this share stays below, in seconds, evenly spread between two bounds.

    >>> quantile([0, 0, 10] + [0] * 11, 0.5), quantile([0] * 14, 0.5)
    (0.00375, 0.0)
    """
    wanted, below = share * sum(counts), 0
    for place, count in enumerate(counts):
        if count and below + count >= wanted:
            lower = BOUNDS_S[place - 1] if place else 0.0
            upper = BOUNDS_S[min(place, len(BOUNDS_S) - 1)]
            return lower + (upper - lower) * (wanted - below) / count
        below += count
    return 0.0


@dataclass
class Tally:
    """Since the start. calls: by method and status code; the time is what the coordinator was busy, not a long poll's wait."""

    calls: dict[tuple[str, str], Histogram] = field(default_factory=dict)
    writes: Histogram = field(
        default_factory=Histogram
    )  # transactions of the database, from their begin to their commit
    bytes_in: int = 0
    bytes_out: int = 0
    polls: Callable[[], int] = lambda: 0  # long polls open now
    queue: Callable[[], int] = lambda: 0  # check-ins and uploads that wait for the database

    def called(self, method: str, code: str, seconds: float) -> None:
        self.calls.setdefault((method, code), Histogram()).add(max(0.0, seconds))

    def wrote(self, seconds: float) -> None:
        self.writes.add(seconds)


def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def open_files() -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir("/proc/self/fd"))
    return 0


def spooled(spool: Path) -> tuple[int, int]:
    """Files that wait in the spool, and their bytes."""
    sizes = []
    with contextlib.suppress(OSError), os.scandir(spool) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # it may be gone by now
                if entry.name.endswith((".update", ".part")):
                    sizes.append(entry.stat().st_size)
    return len(sizes), sum(sizes)


def devices_there(store: Store) -> int:
    with store.read() as session:
        there = sa.select(sa.func.count()).select_from(Device).where(Device.present_until >= now())
        return session.scalar(there) or 0


class Recorder:
    """Writes a row of `vitals` every EVERY_S within its `with` block, and forgets what is older than KEPT."""

    def __init__(self, store: Store, spool: Path, tally: Tally, every_s: float = EVERY_S) -> None:
        self._store, self._spool, self._tally, self._every_s = store, spool, tally, every_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pocketfed-vitals", daemon=True)
        self._before = self._figures()

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(self._every_s):
            with contextlib.suppress(*OUTAGES, StoreError):  # the next one may work
                self.record()

    def _figures(self) -> Mapping[str, float]:
        """What only grows."""
        called, errors, calls = Counter[int](), 0, 0
        for (_, code), histogram in self._tally.calls.copy().items():
            called.update(dict(enumerate(histogram.counts)))
            calls += sum(histogram.counts)
            errors += 0 if code in EXPECTED else sum(histogram.counts)
        writes = self._tally.writes
        grown: dict[str, float] = {
            "calls": calls,
            "errors": errors,
            "bytes_in": self._tally.bytes_in,
            "bytes_out": self._tally.bytes_out,
        }
        grown |= {"writes": sum(writes.counts), "write_s": writes.total_s}
        return {**grown, **{f"bucket {place}": called[place] for place in range(len(BOUNDS_S) + 1)}}

    def record(self) -> None:
        """A row of what has happened since the last one, and of what there is now."""
        figures = self._figures()
        since = {name: value - self._before[name] for name, value in figures.items()}
        self._before = figures
        buckets = [int(since[f"bucket {place}"]) for place in range(len(BOUNDS_S) + 1)]
        files, held = spooled(self._spool)
        row = Vitals(
            at=now(),
            seconds=self._every_s,
            calls=int(since["calls"]),
            errors=int(since["errors"]),
            p50_ms=1000 * quantile(buckets, 0.5),
            p95_ms=1000 * quantile(buckets, 0.95),
            p99_ms=1000 * quantile(buckets, 0.99),
            bytes_in=int(since["bytes_in"]),
            bytes_out=int(since["bytes_out"]),
            write_ms=1000 * since["write_s"] / since["writes"] if since["writes"] else 0.0,
            devices=devices_there(self._store),
            polls=self._tally.polls(),
            queue=self._tally.queue(),
            spool_files=files,
            spool_bytes=held,
            rss_bytes=resident_bytes(),
            open_files=open_files(),
        )
        with self._store.write() as session:
            session.add(row)
            session.execute(sa.delete(Vitals).where(Vitals.at < now() - KEPT))
            note_presence(session, row.at, row.devices)


def note_presence(session: Session, at: datetime, devices: int) -> None:
    """The hour's greatest number of devices that were there at once."""
    hour = at.replace(minute=0, second=0, microsecond=0)
    noted = session.get(Presence, hour)
    if noted is None:
        session.add(Presence(hour=hour, devices=devices))
        session.execute(sa.delete(Presence).where(Presence.hour < hour - HOURS_KEPT))
    else:
        noted.devices = max(noted.devices, devices)
