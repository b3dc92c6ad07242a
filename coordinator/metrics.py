"""What Prometheus asks for: the coordinator's own counts and the store's, gathered when it asks.

No label holds anything that a device says: methods, status codes, states and the reasons of screening.py are all there is.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from pocketfed.coordinator.store import OUTAGES, Assignment, History, Round, Store, now
from pocketfed.coordinator.vitals import BOUNDS_S, Histogram, Tally, devices_there, spooled

CODE = re.compile("[a-z_]{1,20}")  # as screening.py writes them, before a colon; devices have no say in it
OLD_S = 2.0  # what the database was asked is shown again for so long: scrapes in quick succession cost it nothing
SETTLED = timedelta(seconds=2)  # PostgreSQL: rows become visible in another order than that of their numbers


class MetricsError(RuntimeError):
    """Metrics cannot be served; one sentence."""


class Outcomes:
    """What became of rounds and assignments since the start, counted from the history that the store keeps anyway."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.rounds, self.assignments, self.refusals = Counter[str](), Counter[str](), Counter[str]()
        with store.read() as session:
            self._last = session.scalar(sa.select(sa.func.max(History.id))) or 0

    def update(self) -> None:
        columns = (History.id, History.round, History.assignment_id, History.status, History.reason)
        fresh = sa.select(*columns).where(History.id > self._last).order_by(History.id)
        if not self._store.is_sqlite:
            fresh = fresh.where(History.at < now() - SETTLED)
        with self._store.read() as session:
            for row in session.execute(fresh):
                self._last = row.id
                if row.assignment_id is not None:
                    self.assignments[row.status] += 1
                    if row.status == "quarantined":
                        self.refusals[_reason(row.reason)] += 1
                elif row.round is not None:
                    self.rounds[row.status] += 1


def _reason(text: str | None) -> str:
    """
    >>> _reason("norm: 48.2 is above the limit"), _reason("my own words: 1"), _reason(None)
    ('norm', 'other', 'other')
    """
    code = (text or "").partition(":")[0]
    return code if CODE.fullmatch(code) else "other"


class Metrics:
    """A Prometheus collector. leads: whether this is the coordinator that serves."""

    def __init__(self, store: Store, spool: Path, tally: Tally, leads: Callable[[], bool]) -> None:
        self._store, self._spool, self._tally, self._leads = store, spool, tally, leads
        self._outcomes = Outcomes(store)
        self._lock = threading.Lock()
        self._held: list[Any] = []
        self._asked_at = -OLD_S

    def collect(self) -> Iterator[Any]:
        tally = self._tally
        calls = HistogramMetricFamily(
            "pocketfed_rpc_seconds", "What calls took, the wait of long polls left out", labels=("method", "code")
        )
        for labels, histogram in sorted(tally.calls.copy().items()):
            calls.add_metric(labels, *_cumulative(histogram))
        yield calls
        writes = HistogramMetricFamily("pocketfed_database_write_seconds", "From a write's begin to its commit")
        writes.add_metric((), *_cumulative(tally.writes))
        yield writes
        yield CounterMetricFamily("pocketfed_received_bytes", "Bytes of messages from devices", tally.bytes_in)
        yield CounterMetricFamily("pocketfed_sent_bytes", "Bytes of messages to devices", tally.bytes_out)
        yield GaugeMetricFamily("pocketfed_leader", "1: this coordinator serves; 0: it stands by", int(self._leads()))
        yield GaugeMetricFamily("pocketfed_long_polls", "Devices that wait for work", tally.polls())
        yield GaugeMetricFamily("pocketfed_queue", "Check-ins and uploads waiting for the database", tally.queue())
        files, held = spooled(self._spool)
        yield GaugeMetricFamily("pocketfed_spool_files", "Uploads waiting for their round", files)
        yield GaugeMetricFamily("pocketfed_spool_bytes", "Bytes of these", held)
        yield from self._stored()

    def _stored(self) -> list[Any]:
        """What the database says; where it is out, what it said last is left out and `up` is 0."""
        with self._lock:
            if time.monotonic() - self._asked_at < OLD_S:
                return self._held
            up = GaugeMetricFamily("pocketfed_database_up", "1: the database answers", 0)
            self._held = [up]
            with contextlib.suppress(*OUTAGES):
                self._held = [
                    GaugeMetricFamily("pocketfed_database_up", "1: the database answers", 1),
                    GaugeMetricFamily("pocketfed_devices_online", "Devices that are there", devices_there(self._store)),
                    *self._states(),
                ]
            self._asked_at = time.monotonic()
            return self._held

    def _states(self) -> Iterator[Any]:
        self._outcomes.update()
        for name, text, counts in (
            ("pocketfed_rounds", "Rounds' attempts that came to be so, since the start", self._outcomes.rounds),
            ("pocketfed_assignments", "Assignments that came to be so, since the start", self._outcomes.assignments),
        ):
            family = CounterMetricFamily(name, text, labels=("status",))
            for status, count in sorted(counts.items()):
                family.add_metric((status,), count)
            yield family
        refused = CounterMetricFamily("pocketfed_updates_refused", "Updates quarantined", labels=("reason",))
        for reason, count in sorted(self._outcomes.refusals.items()):
            refused.add_metric((reason,), count)
        yield refused
        open_now = GaugeMetricFamily("pocketfed_open", "Rounds running and assignments open now", labels=("what",))
        running = sa.select(sa.func.count()).select_from(Round).where(Round.status == "running")
        with self._store.read() as session:
            open_now.add_metric(("rounds",), session.scalar(running) or 0)
            for status in ("offered", "accepted", "uploaded"):
                found = sa.select(sa.func.count()).select_from(Assignment).where(Assignment.status == status)
                open_now.add_metric((status,), session.scalar(found) or 0)
        yield open_now


def _cumulative(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    buckets, below = list[tuple[str, float]](), 0
    for bound, count in zip((*BOUNDS_S, float("inf")), list(histogram.counts), strict=True):
        below += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), below))
    return buckets, histogram.total_s


@contextlib.contextmanager
def serve_metrics(metrics: Metrics, address: str, port: int) -> Iterator[int]:
    """Answer Prometheus on that port (0: any free one, which is given) for as long as the block lasts.

    Raises:
        MetricsError: the port is taken, or not of this machine.
    """
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(metrics)
    try:
        server, thread = start_http_server(port, address, registry)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise MetricsError(f"cannot serve metrics on {address}:{port}: {why}; choose another --metrics-port") from None
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
