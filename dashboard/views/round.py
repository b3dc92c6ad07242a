"""Round: who was asked, how far each came, and why some did not arrive."""

from __future__ import annotations

import streamlit as st

from pocketfed.coordinator.store import Store, now
from pocketfed.dashboard import charts, frame, opening, queries, words

TONES = {"finished": "good", "running": "busy", "failed": "bad"}


def show(opened: Store) -> None:
    run_id = frame.chosen_run(opened)
    frame.heading("Round", "Who was asked, how far each device came, and why some did not arrive. Times are UTC.")
    with opened.read() as session:
        rounds = queries.runs.rounds(session, [run_id])
    if not rounds:
        raise opening.NothingToShowError(
            "No round yet", "the run has not begun its first round; it does when enough devices have asked for work"
        )
    numbers = [r.number for r in rounds][::-1]
    with st.container(horizontal=True, vertical_alignment="bottom"):
        number = st.selectbox("Round", numbers, index=_wanted(numbers), key=f"round of {run_id}", width=160)
        st.query_params["round"] = str(number)
        with opened.read() as session:
            kinds = queries.rounds.kinds(session, run_id, number)
        kind = (
            st.segmented_control("Task", kinds, default=kinds[0], key="kind")
            if len(kinds) > 1
            else next(iter(kinds), "train")
        )
    chosen = next(r for r in rounds if r.number == number)
    if chosen.status == "running":
        frame.live(lambda again: _round(again, run_id, chosen, kind or "train"))()
    else:
        _round(opened, run_id, chosen, kind or "train")


def _wanted(numbers: list[int]) -> int:
    """The round of the address (`?round=3`), else the newest."""
    text = st.query_params.get("round", "")
    return (
        numbers.index(int(text)) if text.isascii() and text.isdigit() and len(text) < 10 and int(text) in numbers else 0
    )


def _round(opened: Store, run_id: int, line: queries.runs.RoundLine, kind: str) -> None:
    number, at = line.number, now()
    with opened.read() as session:
        line = next((r for r in queries.runs.rounds(session, [run_id]) if r.number == number), line)
        funnel = queries.rounds.funnel(session, run_id, number, kind)
        reasons = queries.rounds.drop_reasons(session, run_id, number, kind)
        attempts = queries.rounds.attempts(session, run_id, number)
        spans = queries.rounds.spans(session, run_id, number, kind)
        late = queries.rounds.staleness(session, run_id, number) if kind == "train" else {}
        buffered = queries.runs.configs(session, [run_id]).get(run_id, {}).get("mode") == "fedbuff"
        measured = queries.rounds.metrics(session, run_id, number)
    _banner(line, funnel)
    if not funnel.sampled:
        st.info(
            "No device took part: round 0 is the coordinator's own evaluation of the start."
            if number == 0
            else "No device was asked yet."
        )
        return
    _reached(funnel, reasons)
    st.subheader("When each was where")
    st.caption(f"The {len(spans):,} slowest of {words.number_of(funnel.sampled, 'device')}.")
    since = (at - line.started_at).total_seconds() if line.status == "running" else None
    st.altair_chart(charts.phases(spans, since), width="stretch")
    _histograms(opened, run_id, number, kind)
    if buffered and late:
        st.subheader("How late the updates were")
        st.altair_chart(charts.staleness(late), width="stretch")
    _attempts(attempts)
    _measured(measured)
    _devices(opened, run_id, number, kind, funnel)


def _reached(funnel: queries.rounds.Funnel, reasons: list[tuple[str, str, int]]) -> None:
    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("How far they came")
        st.altair_chart(charts.funnel(funnel), width="stretch")
    with right:
        st.subheader("Why some do not count")
        if reasons:
            st.altair_chart(charts.dropped(reasons, height=36 * len(reasons) + 130), width="stretch")
        else:
            st.success("Nobody has dropped out.")


def _histograms(opened: Store, run_id: int, number: int, kind: str) -> None:
    with opened.read() as session:
        times = queries.rounds.times(session, run_id, number, kind)
        norms = queries.rounds.norms(session, run_id, number) if kind == "train" else []
        clipped = queries.rounds.clip_line(session, run_id, number) if norms else None
    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("Time that they took")
        if times:
            title = "Time from a device's yes to its update (s)"
            st.altair_chart(charts.histogram(times, title, "Updates"), width="stretch")
        else:
            st.info("No update has arrived yet.")
    with right:
        if kind == "train":
            st.subheader("Size of the updates")
            if norms:
                title = "Norm of the update (L2, no unit)"
                st.altair_chart(charts.histogram(norms, title, "Updates", clipped, "clipped above"), width="stretch")
                if clipped is None:
                    st.caption("No clip line: the run clips by no median, or too few updates came before.")
            else:
                st.info("No norm is known yet: updates are measured when the round ends.")


def _attempts(attempts: list[queries.rounds.AttemptLine]) -> None:
    if len({a.attempt for a in attempts}) > 1 or any(a.reason for a in attempts):
        st.subheader("Attempts")
        rows = [
            {
                "Time (UTC)": words.utc(a.at),
                "Attempt": a.attempt,
                "Became": a.status,
                "Reason": words.plain(a.reason, 200),
            }
            for a in attempts
        ]
        frame.table(rows, {"Reason": st.column_config.TextColumn(width="large")})


def _measured(measured: dict[str, float]) -> None:
    if measured:
        with st.expander(f"{words.number_of(len(measured), 'further number')} of this round"):
            frame.table([{"Name": words.plain(name, 60), "Value": value} for name, value in measured.items()], {})


def _banner(line: queries.runs.RoundLine, funnel: queries.rounds.Funnel) -> None:
    parts = [f"Began {words.utc(line.started_at)}"]
    if line.status != "running":
        parts.append(f"took {words.duration(line.seconds)}")
    if line.accuracy is not None:
        parts.append(f"accuracy {words.percent(line.accuracy)}")
    if funnel.sampled:
        parts.append(f"{funnel.aggregated:,} of {words.number_of(funnel.sampled, 'device')} counted")
    parts.append(f"{words.size(line.bytes_up)} up, {words.size(line.bytes_down)} down")
    reason = f"<br>{words.markup(line.reason, 300)}" if line.reason else ""
    frame.notice(
        TONES.get(line.status, "quiet"),
        f"Round {line.number}: {words.plain(line.status, 20)}",
        "; ".join(parts) + "." + reason,
    )


def _devices(opened: Store, run_id: int, number: int, kind: str, funnel: queries.rounds.Funnel) -> None:
    st.subheader("Devices")
    place = f"{run_id}/{number}/{kind}"
    with st.container(horizontal=True, vertical_alignment="bottom"):
        statuses = st.multiselect(
            "Status", sorted(funnel.statuses), key=f"statuses of {place}", placeholder="all", width=420
        )
        total = sum(funnel.statuses.get(s, 0) for s in statuses) if statuses else funnel.sampled
        first = frame.offset(total, f"assignments of {place}", "devices")
    with opened.read() as session:
        rows = queries.rounds.assignments(session, run_id, number, kind, statuses, limit=frame.PAGE_ROWS, offset=first)
    columns = {
        "Time": st.column_config.NumberColumn("Time (s)", format="%.1f", help="from the offer to the end"),
        "Up": st.column_config.NumberColumn("Up (kB)", format="%.1f"),
        "Down": st.column_config.NumberColumn("Down (kB)", format="%.1f"),
        "Norm": st.column_config.NumberColumn("Update norm", format="%.3f", help="L2 norm of the update"),
        "Reason": st.column_config.TextColumn(width="large"),
    }
    frame.table([_row(a) for a in rows], columns)


def _row(a: queries.rounds.AssignmentLine) -> dict[str, object]:
    doing = f"{a.phase}, {a.progress:.0%}" if a.status == "accepted" and a.phase else ""
    return {
        "Device": words.plain(a.device, 60),
        "Status": f"{a.status} ({words.plain(doing, 40)})" if doing else a.status,
        "Time": a.seconds,
        "Examples": a.examples,
        "Up": None if a.bytes_up is None else a.bytes_up / 1e3,
        "Down": a.bytes_down / 1e3,
        "Norm": a.norm,
        "Reason": words.plain(a.reason, 200),
    }


if __name__ == "__main__":
    frame.page(show)
