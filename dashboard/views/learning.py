"""Learning: how good the model has become, and what that cost."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from pocketfed.coordinator.store import Store
from pocketfed.dashboard import charts, frame, queries, words

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
        raise frame.NothingToShowError("No run", "the run that was shown is gone from the database; choose another")
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
    curves = charts.learning_frame(rounds, names)
    for measure, column in zip(("accuracy", "loss"), st.columns(2, gap="large"), strict=True):
        with column:
            st.subheader(measure.capitalize())
            if (curves["measure"] == measure).any():
                st.altair_chart(charts.learning(curves, measure, axis), width="stretch")
            else:
                st.info(f"No {measure} is known yet: it comes with the first evaluated round.")
    _table(rounds, names)


def _table(rounds: list[queries.runs.RoundLine], names: dict[int, str]) -> None:
    st.subheader("Rounds")
    if not rounds:
        st.info("The run has no round yet.")
        return
    rows = [_row(r, names) for r in sorted(rounds, key=lambda r: (-r.number, r.run_id))]
    columns = {
        "Accuracy": st.column_config.NumberColumn("Accuracy (%)", format="percent"),
        "Loss": st.column_config.NumberColumn("Loss (nats)", format="%.4f"),
        "Training loss": st.column_config.NumberColumn(
            "Training loss (nats)", format="%.4f", help="mean over the devices, weighted by their examples"
        ),
        "MB up": st.column_config.NumberColumn(format="%.3f"),
        "MB down": st.column_config.NumberColumn(format="%.3f"),
        "Seconds": st.column_config.NumberColumn("Time (s)", format="%.1f"),
    }
    several = len({r.run_id for r in rounds}) > 1
    frame.table([{k: v for k, v in row.items() if several or k != "Run"} for row in rows], columns)
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
