"""System: the coordinator and its database."""

from __future__ import annotations

from datetime import timedelta

import streamlit as st

from pocketfed.coordinator.store import Store, now
from pocketfed.dashboard import charts, frame, queries, words

WINDOWS = {"1 hour": 1, "6 hours": 6, "24 hours": 24}  # vital figures are kept for a day


def show(opened: Store) -> None:
    frame.heading("System", "The coordinator and its database. Times are UTC.")
    hours = WINDOWS[st.segmented_control("The last", list(WINDOWS), default="1 hour", key="window") or "1 hour"]
    frame.live(lambda again: _system(again, hours))()


def _system(opened: Store, hours: int) -> None:
    at = now()
    with opened.read() as session:
        lease = queries.system.lease(session)
        last = queries.system.newest_vitals(session)
        lines = queries.system.vitals(session, at - timedelta(hours=hours))
        work = queries.system.open_work(session)
        size = queries.system.database_bytes(session)
        rows = queries.system.table_rows(session)
    serves = lease is not None and lease[1] >= at
    frame.cards(
        ("Coordinator", "serves" if serves else "none serves", words.plain(lease[0], 40) if lease and serves else ""),
        ("Database", words.size(size), opened.url.get_backend_name()),
        ("Under way", f"{sum(work.values()):,}", f"{work['offered']:,} offered, {work['accepted']:,} accepted"),
        ("Memory", words.size(last.rss_bytes) if last else "–", "of the coordinator"),
        ("Queue", f"{last.queue:,}" if last else "–", "wait for the database"),
        ("Spool", words.size(last.spool_bytes) if last else "–", f"{last.spool_files:,} uploads" if last else ""),
        ("Long polls", f"{last.polls:,}" if last else "–", "devices that wait for work"),
        ("Open files", f"{last.open_files:,}" if last else "–", ""),
    )
    if not lines:
        st.info(
            "No figures of this time: a coordinator (`pocketfed serve`) writes them every 15 seconds and keeps a day; "
            "simulations need none."
        )
    else:
        _figures(lines)
    st.subheader("What lies in the database")
    frame.table([{"Table": name, "Rows, about": count} for name, count in rows.items()], {})
    st.caption(f"As of {words.utc(at)} UTC. Rows are an estimate of the database's own: counting them would read them.")


def _figures(lines: list[queries.system.VitalLine]) -> None:
    pictures = (
        ("What calls took", {"p50_ms": "median", "p95_ms": "95 %", "p99_ms": "99 %"}, "Latency (ms)", 1.0),
        ("Calls", {"calls": "calls", "errors": "errors"}, "Calls (count)", 1.0),
        ("Waiting for the database", {"queue": "check-ins and uploads"}, "Queue (count)", 1.0),
        ("A write", {"write_ms": "on average"}, "Begin to commit (ms)", 1.0),
        ("Memory of the coordinator", {"rss_bytes": "resident"}, "Memory (MB)", 1e-6),
        ("Devices there", {"devices": "there", "polls": "waiting for work"}, "Devices (count)", 1.0),
    )
    columns = st.columns(2, gap="large")
    for place, (title, fields, unit, scale) in enumerate(pictures):
        with columns[place % 2]:
            st.subheader(title)
            st.altair_chart(charts.series(lines, fields, unit, scale), width="stretch")


if __name__ == "__main__":
    frame.page(show)
