"""Learning: how good the model has become, and what that cost."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from pocketfed.coordinator.store import Store
from pocketfed.dashboard import charts, frame, opening, queries, words

MOST_RUNS = 7  # as many as there are colours


def show(opened: Store) -> None:
    run_id = frame.chosen_run(opened)
    frame.heading(
        "Learning",
        "How good the model has become with every round, and what that cost. Round 0 is the model before any training.",
    )
    with opened.read() as session:
        names = queries.runs.run_names(session)
        line = queries.runs.run(session, run_id)
    if line is None:
        raise opening.NothingToShowError("No run", "the run that was shown is gone from the database; choose another")
    names = {run_id: line.name, **names}
    with st.container(horizontal=True, vertical_alignment="bottom"):
        # the key holds the run: choosing another in the sidebar starts the comparison anew
        chosen = st.multiselect(
            "Runs", list(names), [run_id], format_func=lambda i: charts.run_label(i, names[i]),
            max_selections=MOST_RUNS, key=f"runs of {run_id}",
            width=460, placeholder="Choose runs to compare",
        )  # fmt: skip
        axis = st.segmented_control("Against", list(charts.AXES), default="round", key="axis") or "round"
    if not chosen:
        st.info("Choose at least one run.")
        return
    if line.status in ("running", "waiting"):
        frame.live(lambda again: _curves(again, chosen, names, axis))()
    else:
        _curves(opened, chosen, names, axis)


def _curves(opened: Store, chosen: list[int], names: dict[int, str], axis: str) -> None:
    with opened.read() as session:
        rounds = queries.runs.rounds(session, chosen)
        told = {m: queries.runs.metric(session, chosen, f"device_{m}") for m in ("accuracy", "loss")}
        levels = queries.learning.baselines(session, chosen)
    curves = charts.learning_frame(rounds, names, told, levels)
    frame.side_by_side(curves, axis, ": it comes with the first evaluated round")
    st.caption(_compared({kind for _, kind in levels}))
    _spreads(opened, chosen[0])
    _further(opened, chosen, names)
    _table(rounds, names)


def _compared(kinds: set[str]) -> str:
    """What the level lines are, and where those that are missing come from."""
    told = "The release before is what the run began with."
    if kinds & {"central", "local"}:
        told += (
            " All data in one place, and each device alone (the mean over them): trained for as many epochs as a device "
            "of the run."
        )
    if not {"central", "local"} <= kinds:
        told += (
            " Lines of central and of local-only training come with `pocketfed simulate --database … --baselines all`, "
            "or by `pocketfed baseline record`."
        )
    return told


def _spreads(opened: Store, run_id: int) -> None:
    st.subheader("On the devices' own examples, by cohort")
    with opened.read() as session:
        found = queries.learning.spreads(session, run_id)
    if not found:
        st.info(
            "No device of this run was asked to measure (`evaluate_on_devices`), or no cohort has "
            f"{queries.learning.MIN_COHORT} that did: of fewer nothing is shown."
        )
        return
    st.altair_chart(charts.spreads(found, "accuracy"), width="stretch")
    st.caption(
        f"Run {run_id}, its newest {queries.learning.NEWEST} rounds. Line: the median device; "
        "band: 10th to 90th percentile; dotted: mean of the worst tenth. Cohorts of fewer than "
        f"{queries.learning.MIN_COHORT} devices are left out."
    )


def _further(opened: Store, chosen: list[int], names: dict[int, str]) -> None:
    with opened.read() as session:
        known = queries.runs.metric_names(session, chosen)
    if not known:
        return
    st.subheader("Anything else that rounds have measured")
    first = known.index("step_norm") if "step_norm" in known else 0
    name = st.selectbox(
        "Number", known, first, format_func=lambda n: words.plain(n, 60), key="metric", width=300,
        help="step_norm: how far the round moved the parameters (L2)",
    )  # fmt: skip
    with opened.read() as session:
        values = queries.runs.metric(session, chosen, name)
    if values:
        st.altair_chart(charts.metric(values, names, f"{words.plain(name, 60)} (as reported)"), width="stretch")


def _table(rounds: list[queries.runs.RoundLine], names: dict[int, str]) -> None:
    st.subheader("Rounds")
    if not rounds:
        st.info("The run has no round yet.")
        return
    rows = [_row(r, names) for r in sorted(rounds, key=lambda r: (-r.number, r.run_id))]
    columns = {
        "Loss": st.column_config.NumberColumn("Loss (nats)", format="%.4f"),
        "Training loss": st.column_config.NumberColumn(
            "Training loss (nats)", format="%.4f", help="mean over the devices, weighted by their examples"
        ),
        "MB up": st.column_config.NumberColumn(format="%.3f"),
        "MB down": st.column_config.NumberColumn(format="%.3f"),
        "Seconds": st.column_config.NumberColumn("Time (s)", format="%.1f"),
    }
    several = len({r.run_id for r in rounds}) > 1
    shown = [{k: v for k, v in row.items() if several or k != "Run"} for row in rows]
    frame.table(shown, columns, shares={"Accuracy": ("Accuracy", None)})
    file = pd.DataFrame([{**row, "Run": words.cell(str(row["Run"]))} for row in rows]).to_csv(index=False)
    st.download_button(
        "Download as CSV", file, "pocketfed-rounds.csv", "text/csv", icon=":material/download:", on_click="ignore"
    )


def _row(r: queries.runs.RoundLine, names: dict[int, str]) -> dict[str, object]:
    return {
        "Run": charts.run_label(r.run_id, names.get(r.run_id, "")),
        "Round": r.number,
        "Status": r.status,
        "Accuracy": r.accuracy,
        "Loss": r.loss,
        "Training loss": r.train_loss,
        "Devices": r.devices,
        "Failed": r.failed,
        "MB up": r.bytes_up / 1e6,
        "MB down": r.bytes_down / 1e6,
        "Seconds": r.seconds,
    }


if __name__ == "__main__":
    frame.page(show)
