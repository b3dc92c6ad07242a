"""Fleet: every enrolled device, and what it is doing."""

from __future__ import annotations

import streamlit as st

from pocketfed.coordinator.store import Store, now
from pocketfed.dashboard import charts, frame, queries, words


def show(opened: Store) -> None:
    with opened.read() as session:
        enrolled = sum(queries.fleet.device_states(session, now()).values())
    frame.heading("Fleet", "Every enrolled device and what it is doing. Times are UTC.")
    if not enrolled:
        raise frame.NothingToShowError(
            "No device yet",
            "devices appear here when they enrol: `pocketfed device --coordinator HOST:PORT`, or a simulation",
        )
    with st.container(horizontal=True, vertical_alignment="bottom"):
        search = st.text_input("Search by name", key="search", width=300, max_chars=100, placeholder="part of a name")
        states = st.multiselect("State", queries.fleet.STATES, key="states", width=380, placeholder="all")
    frame.live(lambda again: _devices(again, search, states))()


def _devices(opened: Store, search: str, states: list[str]) -> None:
    at = now()
    with opened.read() as session:
        counts = queries.fleet.device_states(session, at)
    st.altair_chart(charts.states(counts, height=210), width="stretch")
    with opened.read() as session:
        _, total = queries.fleet.devices(session, at, search, states, limit=0)
    first = frame.offset(total, f"devices {search} {states}", "devices")
    with opened.read() as session:
        rows, total = queries.fleet.devices(session, at, search, states, limit=frame.PAGE_ROWS, offset=first)
    if not rows:
        st.info("No device matches. Take away a letter or a state.")
        return
    columns = {
        "Progress": st.column_config.ProgressColumn("Progress of this step", min_value=0, max_value=100, format="%d%%"),
        "Examples": st.column_config.NumberColumn(
            help="what the device says it holds; the text itself never leaves it"
        ),
    }
    frame.table([_row(d) for d in rows], columns)
    st.caption(
        f"{words.number_of(total, 'device')} of {sum(counts.values()):,}; as of {words.utc(at)} UTC. "
        f"A device is offline when it was not seen for {queries.fleet.OFFLINE_AFTER_S} s."
    )


def _row(d: queries.fleet.DeviceLine) -> dict[str, object]:
    return {
        "Device": words.plain(d.name, 60),
        "State": d.state,
        "Progress": 100 * (d.progress or 0.0) if d.state in ("downloading", "training", "uploading") else None,
        "Works on": f"run {d.run_id}, round {d.round}" if d.run_id is not None else "",
        "Examples": d.examples,
        "SDK": words.plain(d.sdk_version, 20),
        "Last seen (UTC)": words.utc(d.last_seen_at) or "never",
        "Enrolled (UTC)": words.utc(d.enrolled_at),
    }


if __name__ == "__main__":
    frame.page(show)
