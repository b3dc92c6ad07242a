"""Security & privacy: which updates were refused and why, who tried to log in, who did what, and what noise costs."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from pocketfed.coordinator.store import Store, now
from pocketfed.dashboard import charts, frame, opening, queries, words

MOST_EXPORTED = 10_000


def show(opened: Store) -> None:
    frame.heading("Security & privacy", "What was refused and why, who did what, and what noise costs. Times are UTC.")
    try:
        run_id = frame.chosen_run(opened)
    except opening.NothingToShowError as nothing:
        st.info(f"{nothing.title}: {nothing.sentence}.")
    else:
        _updates(opened, run_id)
        _privacy(opened, run_id)
    _credentials(opened)
    _audit(opened)


# ---- updates ---------------------------------------------------------------------------------------------------------


def _updates(opened: Store, run_id: int) -> None:
    with opened.read() as session:
        refused = queries.security.refusals(session, run_id)
        offenders = queries.security.offenders(session, run_id)
        line = queries.runs.run(session, run_id)
        points = queries.security.points(session, run_id, (line.current_round if line else 0) or 0)
        config = queries.runs.configs(session, [run_id]).get(run_id, {})
    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("Quarantined updates, by reason")
        if refused:
            st.altair_chart(charts.counted(refused, "reason", "Updates (count)"), width="stretch")
        else:
            st.success("No update of this run was quarantined.")
        if offenders:
            _offenders(offenders, config.get("max_offences", 0))
    with right:
        pointed = any(p.cosine is not None for p in points)
        st.subheader("Length beside direction" if pointed else "Length beside weight")
        if points:
            st.altair_chart(charts.scatter(points), width="stretch")
            unplaced = sum(p.cosine is None for p in points) if pointed else 0
            st.caption(
                "The newest 20 rounds, as the coordinator's screening measured them. Left of 0 an update pulled against "
                "where the round before had gone; honest devices with unlike data do, too, so nothing is refused for it."
                + (f" {unplaced:,} more are not shown: of theirs no cosine is known." if unplaced else "")
                if pointed
                else "The newest 20 rounds. No cosine is known: it is measured from a run's second round on."
            )
        else:
            st.info("No norm is known yet.")
    if refused:
        _quarantined(opened, run_id, sum(refused.values()))


def _offenders(offenders: list[queries.security.OffenderLine], most: int) -> None:
    st.subheader("Devices that offended")
    rows = [
        {
            "Number": o.device_id, "Device": words.plain(o.device, 60), "Quarantined": o.count,
            "Last in round": o.last_round, "Set aside": bool(most) and o.count >= most,
        }
        for o in offenders
    ]  # fmt: skip
    frame.table(rows, {}, most=5)
    st.caption(
        f"After {most} quarantined updates this run samples a device no more."
        if most
        else "This run sets nobody aside for quarantined updates (`max_offences` is 0)."
    )


def _quarantined(opened: Store, run_id: int, total: int) -> None:
    first = frame.offset(total, f"quarantined {run_id}", "updates")
    with opened.read() as session:
        lines = queries.security.quarantined(session, run_id, frame.PAGE_ROWS, first)
    rows = [
        {
            "Time (UTC)": words.utc(q.at), "Round": q.round, "Number": q.device_id, "Device": words.plain(q.device, 60),
            "Norm": q.norm, "Examples": q.examples, "Reason": words.plain(q.reason, 200),
        }
        for q in lines
    ]  # fmt: skip
    frame.table(rows, {"Reason": st.column_config.TextColumn(width="large")})


def _privacy(opened: Store, run_id: int) -> None:
    st.subheader("Privacy")
    with opened.read() as session:
        clip, noise = queries.security.privacy(queries.runs.configs(session, [run_id]).get(run_id, {}))
        spent = queries.runs.metric(session, [run_id], "epsilon")
    if spent:
        st.altair_chart(charts.metric(spent, {}, "ε spent by the end of the round (no unit)"), width="stretch")
        st.caption(f"In all {spent[-1][2]:.3f}, as the run has recorded it.")
    elif noise:
        st.info(
            f"Devices clip their updates to a norm of {clip:g} and add noise of {noise:g} times that. The coordinator "
            "cannot verify it, so no ε is recorded and none is claimed."
        )
    else:
        st.info("This run uses no noise, so there is no ε to account for.")


# ---- people and credentials ------------------------------------------------------------------------------------------


def _credentials(opened: Store) -> None:
    with opened.read() as session:
        tried, failed = queries.security.failed_log_ins(session, now())
        shared, revoked = queries.security.credentials(session)
    st.subheader("Log-ins and credentials")
    frame.cards(
        ("Failed log-ins", f"{failed:,}", "in the last 7 days"),
        ("Credentials at two places", f"{shared:,}", "devices, named in the audit"),
        ("Revoked devices", f"{revoked:,}", ""),
    )
    if tried:
        rows = [
            {"Name that was tried": words.plain(name, 60), "Times": times, "Last (UTC)": words.utc(last)}
            for name, times, last in tried
        ]
        frame.table(rows, {})


def _audit(opened: Store) -> None:
    st.subheader("Audit")
    st.caption("Who did what, when, and how it ended. The database refuses to change or delete a line.")
    with opened.read() as session:
        known = queries.security.audit_acts(session)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        search = st.text_input("Who or what", key="audit search", width=240, max_chars=100, placeholder="part of it")
        acts = st.multiselect("Act", known, key="audit acts", width=300, placeholder="all")
        outcomes = st.multiselect(
            "Ended", queries.security.OUTCOMES, key="audit outcomes", width=240, placeholder="all"
        )
    given = (search, tuple(acts), tuple(outcomes))
    with opened.read() as session:
        _, total = queries.security.audit(session, *given, limit=0)
    if not total:
        st.info("No line matches." if search or acts or outcomes else "Nobody has done anything yet.")
        return
    first = frame.offset(total, f"audit {given}", "lines")
    with opened.read() as session:
        lines, _ = queries.security.audit(session, *given, limit=frame.PAGE_ROWS, offset=first)
    frame.table([_row(line) for line in lines], {"Detail": st.column_config.TextColumn(width="large")})
    if st.button("Prepare an export of these lines", icon=":material/download:"):
        with opened.read() as session:
            lines, _ = queries.security.audit(session, *given, limit=MOST_EXPORTED)
        rows = [{k: words.cell(str(v)) for k, v in _row(line).items()} for line in lines]
        file = pd.DataFrame(rows).to_csv(index=False)
        st.download_button("Save as CSV", file, "pocketfed-audit.csv", "text/csv", on_click="ignore", type="primary")
        st.caption(f"{len(lines):,} of {total:,} lines, the newest first.")


def _row(line: queries.security.AuditLine) -> dict[str, object]:
    return {
        "Time (UTC)": words.utc(line.at), "Who": words.plain(line.who, 60), "Act": words.plain(line.act, 50),
        "Target": words.plain(line.target, 80), "Ended": line.outcome, "Detail": words.plain(line.detail, 200),
    }  # fmt: skip


if __name__ == "__main__":
    frame.page(show)
