"""Now: what the fleet is doing this moment, in words first."""

from __future__ import annotations

from datetime import datetime

import streamlit as st

from pocketfed.coordinator.store import Store, now
from pocketfed.dashboard import charts, frame, opening, queries, words
from pocketfed.dashboard.health import Condition, condition


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
            raise opening.NothingToShowError(
                "No run", "the run that was shown is gone from the database; choose another"
            )
        rounds = queries.runs.rounds(session, [line.id])
        last = rounds[-1] if rounds else None
        under_way = last.number if last is not None and last.status == "running" else None
        funnel = queries.rounds.funnel(session, line.id, under_way) if under_way else None
        ends = queries.rounds.deadline(session, line.id, under_way) if under_way else None
        config = queries.runs.configs(session, [line.id])[line.id]
        present = queries.fleet.present(session, at)
        lease = queries.system.lease(session)
        changed = queries.runs.last_change(session, line.id, line.current_round) if line.current_round else None
        states = queries.fleet.device_states(session, at)
        live = queries.models.live(session, line.channel)
        runs = queries.models.running(session, line.channel) if live is not None else {}
        problems = queries.runs.problems(session, line.id, limit=8)
    changed = max((moment for moment in (changed, last.started_at if last else None) if moment), default=None)
    found = condition(line, config, present.eligible, lease[1] if lease else None, ends, changed, at)
    _banner(line, found, funnel, rounds, ends, at)
    share = (live.id, live.artifact_version, runs.get(live.id, 0) / max(sum(runs.values()), 1)) if live else None
    _numbers(line, present, states, share)
    _pictures(line, rounds, states)
    _problems(problems)
    st.caption(
        f"As of {words.utc(at)} UTC; looks again every {frame.LIVE_S} seconds. Online: seen within the last "
        f"{queries.fleet.OFFLINE_AFTER_S} s. Eligible: it asks for work now."
    )


def _banner(
    line: queries.runs.RunLine,
    found: Condition,
    funnel: queries.rounds.Funnel | None,
    rounds: list[queries.runs.RoundLine],
    ends: datetime | None,
    at: datetime,
) -> None:
    about = frame.run_sentence(line)
    why = f"<br>{words.markup(found.reason, 300)}" if found.reason else ""
    goal = max(line.rounds_planned, 1)
    if line.status == "finished":
        title = f"Finished: all {words.number_of(line.rounds_done, 'round')} are done"
        about += f" Accuracy {words.percent(line.accuracy)}." if line.accuracy is not None else ""
    elif line.status == "failed":
        title = f"Failed after {words.number_of(line.rounds_done, 'round')}"
    elif line.status == "waiting":
        title = "Waiting for devices"
    elif funnel is None or not funnel.sampled:
        title = f"Running: round {line.rounds_done} of {goal} is done"
    else:
        title = f"Running: round {line.current_round} of {goal}"
        about += f"<br>{_progress(funnel, rounds[-1], ends, at)}"
    frame.notice(found.tone, f"{found.word}. {title}", about + why)
    st.progress(min(line.rounds_done / goal, 1.0), text=f"{line.rounds_done:,} of {line.rounds_planned:,} rounds done")


def _progress(funnel: queries.rounds.Funnel, last: queries.runs.RoundLine, ends: datetime | None, at: datetime) -> str:
    answered = funnel.uploaded + funnel.statuses.get("failed", 0) + funnel.statuses.get("expired", 0)
    said = (
        f"{answered:,} of {words.number_of(funnel.sampled, 'device')} have answered, {funnel.dropped:,} of them with "
        f"a problem; under way for {words.duration(max((at - last.started_at).total_seconds(), 0))}"
    )
    if ends is not None:
        left = (ends - at).total_seconds()
        said += f", the deadline is in {words.duration(left)}" if left > 0 else ", the deadline has passed"
    reason = f"<br>{words.markup(last.reason, 300)}" if last.reason else ""
    return f"{said}.{reason}"


def _numbers(
    line: queries.runs.RunLine,
    present: queries.fleet.Present,
    states: dict[str, int],
    share: tuple[int, str, float] | None,
) -> None:
    gain = ""
    if line.accuracy is not None and line.first_accuracy is not None:
        gain = f"{100 * (line.accuracy - line.first_accuracy):+.1f} points since the start"
    moving = f"{states['downloading']:,} down, {states['uploading']:,} up"
    live = (f"release {share[0]}", f"{words.percent(share[2])} of the fleet run it") if share else ("none", "")
    frame.cards(
        ("Accuracy", words.percent(line.accuracy), gain),
        ("Devices online", f"{present.online:,}", f"of {present.enrolled:,} enrolled"),
        ("Eligible now", f"{present.eligible:,}", "ask for work"),
        ("Training now", f"{states['training']:,}", f"{states['offered']:,} asked, not begun"),
        ("Moving data now", f"{states['downloading'] + states['uploading']:,}", moving),
        (f"Live on {words.plain(line.channel, 16)}", *live),
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
