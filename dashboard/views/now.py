"""Now: what the fleet is doing this moment, in words first."""

from __future__ import annotations

import html

import streamlit as st

from pocketfed.coordinator.store import Store, now
from pocketfed.dashboard import charts, frame, queries, words


def show(opened: Store) -> None:
    run_id = frame.chosen_run(opened)
    frame.heading("Now", "What the fleet is doing this moment. Times are UTC.")
    # the newest run may change while we look; a chosen one does not
    frame.live(lambda again: _current(again, run_id if st.session_state["run"] is not None else None))()


def _current(opened: Store, run_id: int | None) -> None:
    at = now()
    with opened.read() as session:
        run_id = run_id if run_id is not None else queries.runs.newest_run_id(session)
        line = queries.runs.run(session, run_id) if run_id is not None else None
        if line is None:
            raise frame.NothingToShowError("No run", "the run that was shown is gone from the database; choose another")
        rounds = queries.runs.rounds(session, [line.id])
        funnel = queries.rounds.funnel(session, line.id, line.current_round) if line.current_round else None
        states = queries.fleet.device_states(session, at)
        problems = queries.runs.problems(session, line.id, limit=8)
    _banner(line, funnel, rounds)
    _numbers(line, states)
    _pictures(line, rounds, states)
    _problems(problems)
    st.caption(
        f"As of {words.utc(at)} UTC; looks again every {frame.LIVE_S} seconds. "
        f"A device is offline when it was not seen for {queries.fleet.OFFLINE_AFTER_S} s."
    )


def _banner(
    line: queries.runs.RunLine, funnel: queries.rounds.Funnel | None, rounds: list[queries.runs.RoundLine]
) -> None:
    about = frame.run_sentence(line)
    reason = f"<br>{words.markup(line.reason, 300)}" if line.reason else ""
    goal = max(line.rounds_planned, 1)
    if line.status == "finished":
        result = f" Accuracy {words.percent(line.accuracy)}." if line.accuracy is not None else ""
        frame.notice(
            "good",
            f"Finished: all {words.number_of(line.rounds_done, 'round')} are done",
            f"{about}{html.escape(result)}{reason}",
        )
    elif line.status == "failed":
        frame.notice(
            "bad",
            f"Failed after {words.number_of(line.rounds_done, 'round')}",
            about + (reason or "<br>No reason was recorded."),
        )
    elif line.status == "waiting":
        frame.notice(
            "wait",
            "Waiting for devices",
            about + (reason or "<br>The run starts when enough devices have asked for work."),
        )
    elif funnel is None or not funnel.sampled or rounds[-1].status != "running":
        frame.notice("busy", f"Running: round {line.rounds_done} of {goal} is done", f"{about}{reason}")
    else:
        answered = funnel.uploaded + funnel.statuses.get("failed", 0) + funnel.statuses.get("expired", 0)
        since = words.duration(max((now() - rounds[-1].started_at).total_seconds(), 0))
        progress = (
            f"<br>{answered:,} of {words.number_of(funnel.sampled, 'device')} have answered, "
            f"{funnel.dropped:,} of them with a problem; under way for {since}."
        )
        frame.notice("busy", f"Running: round {line.current_round} of {goal}", about + progress + reason)
    st.progress(min(line.rounds_done / goal, 1.0), text=f"{line.rounds_done:,} of {line.rounds_planned:,} rounds done")


def _numbers(line: queries.runs.RunLine, states: dict[str, int]) -> None:
    gain = ""
    if line.accuracy is not None and line.first_accuracy is not None:
        gain = f"{100 * (line.accuracy - line.first_accuracy):+.1f} points since the start"
    total = sum(states.values())
    moving = f"{states['downloading']:,} down, {states['uploading']:,} up"
    frame.cards(
        ("Accuracy", words.percent(line.accuracy), gain),
        ("Devices online", f"{total - states['offline']:,}", f"of {total:,} enrolled"),
        ("Training now", f"{states['training']:,}", f"{states['offered']:,} asked, not begun"),
        ("Moving data now", f"{states['downloading'] + states['uploading']:,}", moving),
        ("Updates taken in", f"{line.updates:,}", f"{line.failed:,} did not count"),
        ("Data moved", words.size(line.bytes_up + line.bytes_down), f"{words.size(line.bytes_up)} of it up"),
    )


def _pictures(line: queries.runs.RunLine, rounds: list[queries.runs.RoundLine], states: dict[str, int]) -> None:
    left, right = st.columns([3, 2], gap="large")
    with left:
        st.subheader("Accuracy so far")
        curve = charts.learning_frame(rounds, {line.id: line.name})
        if (curve["measure"] == "accuracy").any():
            st.altair_chart(charts.learning(curve, "accuracy", height=240), width="stretch")
        else:
            st.info("No accuracy is known yet: it comes with the first evaluated round.")
    with right:
        st.subheader("Devices by state")
        if sum(states.values()):
            st.altair_chart(charts.states(states, height=240), width="stretch")
        else:
            st.info("No device has enrolled yet.")


def _problems(problems: list[queries.runs.Problem]) -> None:
    st.subheader("Last problems")
    if not problems:
        st.success("None in this run.")
        return
    rows = [
        {
            "Time (UTC)": words.utc(p.at),
            "Round": p.round,
            "Where": words.plain(p.device, 40) or f"the {p.what} itself",
            "What": p.status,
            "Reason": words.plain(p.reason, 200) or "no reason given",
        }
        for p in problems
    ]
    columns = {
        "Reason": st.column_config.TextColumn(width="large"),
        "Round": st.column_config.NumberColumn(width="small"),
    }
    frame.table(rows, columns)


if __name__ == "__main__":
    frame.page(show)
