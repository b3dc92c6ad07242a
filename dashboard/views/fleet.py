"""Fleet: every enrolled device, and what it is doing."""

from __future__ import annotations

import streamlit as st

from pocketfed.coordinator.store import Store, now
from pocketfed.dashboard import charts, frame, opening, queries, words


def show(opened: Store) -> None:
    with opened.read() as session:
        enrolled = sum(queries.fleet.device_states(session, now()).values())
    frame.heading("Fleet", "Every enrolled device and what it is doing. Times are UTC.")
    if not enrolled:
        raise opening.NothingToShowError(
            "No device yet",
            "devices appear here when they enrol: `pocketfed device --coordinator HOST:PORT`, or a simulation",
        )
    with st.container(horizontal=True, vertical_alignment="bottom"):
        search = st.text_input("Search by name", key="search", width=300, max_chars=100, placeholder="part of a name")
        states = st.multiselect("State", queries.fleet.STATES, key="states", width=380, placeholder="all")
    frame.live(lambda again: _devices(again, search, states))()
    _one(opened)
    left, right = st.columns(2, gap="large")
    with left:
        _kinds(opened)
    with right:
        _refusals(opened)
    _availability(opened)


def _one(opened: Store) -> None:
    st.subheader("One device")
    st.caption(
        "By its number, which says nothing of its owner; what a device is and does is in the store, its text is not."
    )
    text = st.query_params.get("device", "")
    asked = int(text) or None if text.isascii() and text.isdigit() and len(text) < 10 else None  # there is no device 0
    number = st.number_input("Number", 1, 2**31 - 1, asked, key="device", width=200, placeholder="e.g. 7")
    if number is None:
        return
    st.query_params["device"] = str(number)
    with opened.read() as session:
        found = queries.fleet.device(session, int(number), now())
        work = queries.fleet.work_of(session, int(number), limit=frame.PAGE_ROWS)
    if found is None:
        st.info(f"There is no device {number}.")
        return
    told = ", ".join(("revoked",) * found.revoked + ("its credential was seen at two places",) * found.shared)
    frame.cards(
        ("Device", words.plain(found.name, 24), f"number {found.id}"),
        ("State", found.state, told),
        ("SDK", words.plain(found.sdk_version, 20) or "–", ""),
        ("Cohort", words.plain(found.cohort, 24) or "none", "of its enrolment key"),
        ("Tier", words.plain(found.tier, 24) or "not told", "as its app says"),
        ("Last seen (UTC)", words.utc(found.last_seen_at) or "never", f"enrolled {words.utc(found.enrolled_at)}"),
    )
    if not work:
        st.info("It was never asked to work.")
        return
    st.caption(f"Its newest {len(work):,} assignments.")
    rows = [
        {
            "Offered (UTC)": words.utc(w.offered_at), "Run": w.run_id, "Round": w.round, "Attempt": w.attempt,
            "Task": w.kind, "Status": w.status, "Time": w.seconds, "Norm": w.norm, "Reason": words.plain(w.reason, 200),
        }
        for w in work
    ]  # fmt: skip
    frame.table(rows, {"Time": st.column_config.NumberColumn("Time (s)", format="%.1f")})


def _kinds(opened: Store) -> None:
    with opened.read() as session:
        versions, cohorts = queries.fleet.versions(session), queries.fleet.cohorts(session)
        tiers = queries.fleet.tiers(session)
    st.subheader("By version of the SDK")
    st.altair_chart(charts.counted(versions, "version"), width="stretch")
    st.subheader("By cohort")
    st.altair_chart(charts.counted(cohorts, "cohort", without="no cohort"), width="stretch")
    st.caption("Cohorts are those of enrolment keys.")
    st.subheader("By tier")
    if set(tiers) - {""}:
        st.altair_chart(charts.counted(tiers, "tier"), width="stretch")
        st.caption("A tier is the word that a device's app has for its kind; nothing follows from it.")
    else:
        st.info("No device tells a tier: apps may (`Device(tier=…)`, `pocketfed device --tier`).")


def _refusals(opened: Store) -> None:
    with opened.read() as session:
        run_id = queries.runs.newest_run_id(session)
        refused = queries.fleet.refused_for(session, run_id) if run_id else {}
        failed = queries.fleet.failures(session, run_id) if run_id else []
        seen = queries.fleet.last_seen(session, now())
    st.subheader("Work given back, by condition")
    if refused:
        st.altair_chart(charts.counted(refused, "condition", "Times named (count)"), width="stretch")
        st.caption(
            "Of the newest run. Devices name the condition that did not hold; what their sensors read they keep."
        )
    else:
        st.info(
            "No device of the newest run has given work back for a condition. Devices that wait for one without having "
            "been asked do not say so."
        )
    st.subheader("Most frequent failures")
    if failed:
        rows = [
            {"Reason": words.plain(reason, 200) or "no reason given", "Times": times, "Devices": devices}
            for reason, times, devices in failed
        ]
        frame.table(rows, {"Reason": st.column_config.TextColumn(width="medium")})
    else:
        st.success("No device of the newest run has failed.")
    st.subheader("Last seen")
    st.altair_chart(charts.counted(seen, "when"), width="stretch")


def _availability(opened: Store) -> None:
    st.subheader("When devices are there")
    with opened.read() as session:
        hours = queries.fleet.activity(session, now(), days=28)
    if not hours:
        st.info("Nothing was noted yet: a coordinator writes down every hour how many devices were there, from now on.")
        return
    st.altair_chart(charts.heat(hours), width="stretch")
    st.caption(
        f"The most devices there at once in an hour, as a mean over the last {len(hours):,} hours that a coordinator served. UTC."
    )


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
