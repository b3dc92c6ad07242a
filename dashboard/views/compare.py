"""Compare: runs over each other, where their settings differ, and what each cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import streamlit as st

from pocketfed.coordinator.store import Store
from pocketfed.dashboard import charts, frame, opening, queries, words

MOST_RUNS = 7  # as many as there are colours


def show(opened: Store) -> None:
    frame.heading("Compare", "Runs over each other, where their settings differ, and what each cost.")
    with opened.read() as session:
        names = queries.runs.run_names(session)
    if not names:
        raise opening.NothingToShowError(
            "No run yet",
            "there is nothing to compare; start one with `pocketfed simulate` or `pocketfed serve --run run.toml`",
        )
    asked = [i for i in _asked() if i in names]
    with st.container(horizontal=True, vertical_alignment="bottom"):
        chosen = st.multiselect(
            "Runs", list(names), asked or list(names)[:2], format_func=lambda i: charts.run_label(i, names[i]),
            max_selections=MOST_RUNS, key="compared", width=520, placeholder="Choose runs to compare",
        )  # fmt: skip
        axis = st.segmented_control("Against", list(charts.AXES), default="round", key="compared against") or "round"
    st.query_params["runs"] = ",".join(map(str, chosen))
    if not chosen:
        st.info("Choose at least one run.")
        return
    with opened.read() as session:
        rounds = queries.runs.rounds(session, chosen)
        lines = [line for i in chosen if (line := queries.runs.run(session, i)) is not None]
        configs = queries.runs.configs(session, chosen)
    _curves(rounds, names, axis)
    _cost(lines)
    _settings(configs, names)


def _asked() -> list[int]:
    """The runs of the address (`?runs=1,2`)."""
    parts = st.query_params.get("runs", "")[:200].split(",")[:MOST_RUNS]
    return list(dict.fromkeys(int(p) for p in parts if p.isascii() and p.isdigit() and len(p) < 10))


def _curves(rounds: list[queries.runs.RoundLine], names: dict[int, str], axis: str) -> None:
    curves = charts.learning_frame(rounds, names)
    frame.side_by_side(curves, axis)
    rows = [
        {
            "run": words.cell(charts.run_label(r.run_id, names[r.run_id])), "round": r.number, "status": r.status,
            "accuracy": r.accuracy, "loss": r.loss, "training_loss": r.train_loss, "devices": r.devices,
            "moved_mb": r.total_bytes / 1e6, "time_s": r.total_seconds,
        }
        for r in rounds
    ]  # fmt: skip
    file = pd.DataFrame(rows).to_csv(index=False)
    st.download_button(
        "Download the curves as CSV",
        file,
        "pocketfed-curves.csv",
        "text/csv",
        icon=":material/download:",
        on_click="ignore",
    )
    st.caption("Above a chart, when the pointer or the keyboard is on it: its data, and “Download as PNG”.")


def _cost(lines: list[queries.runs.RunLine]) -> None:
    st.subheader("What each cost")
    rows = [
        {
            "Run": charts.run_label(r.id, r.name),
            "Status": r.status,
            "Rounds": r.rounds_done,
            "Accuracy": r.accuracy,
            "Gain": None if r.accuracy is None or r.first_accuracy is None else 100 * (r.accuracy - r.first_accuracy),
            "Loss": r.loss,
            "Updates": r.updates,
            "Did not count": r.failed,
            "MB up": r.bytes_up / 1e6,
            "MB down": r.bytes_down / 1e6,
            "kB an update": (r.bytes_up + r.bytes_down) / max(r.updates, 1) / 1e3,
            "Time": r.seconds,
        }
        for r in lines
    ]
    columns = {
        "Gain": st.column_config.NumberColumn("Gain (points)", format="%.1f"),
        "Loss": st.column_config.NumberColumn("Loss (nats)", format="%.4f"),
        "MB up": st.column_config.NumberColumn(format="%.2f"),
        "MB down": st.column_config.NumberColumn(format="%.2f"),
        "kB an update": st.column_config.NumberColumn(format="%.1f", help="both ways, by updates that counted"),
        "Time": st.column_config.NumberColumn("Time in rounds (s)", format="%.1f"),
    }
    frame.table(rows, columns, shares={"Accuracy": ("Accuracy", None)})
    file = pd.DataFrame([{**row, "Run": words.cell(str(row["Run"]))} for row in rows]).to_csv(index=False)
    st.download_button(
        "Download the costs as CSV",
        file,
        "pocketfed-runs.csv",
        "text/csv",
        icon=":material/download:",
        on_click="ignore",
    )


def _settings(configs: Mapping[int, Mapping[str, Any]], names: dict[int, str]) -> None:
    st.subheader("Where their settings differ")
    if len(configs) < 2:
        st.info("Choose a second run to see where their settings differ.")
        return
    different = queries.compare.differences(configs)
    if not different:
        st.success("They were configured alike.")
        return
    rows = [
        {
            "Setting": words.plain(name, 60),
            **{charts.run_label(i, names[i]): "–" if v is None else words.plain(str(v), 80) for i, v in row.items()},
        }
        for name, row in different.items()
    ]
    frame.table(rows, {})


if __name__ == "__main__":
    frame.page(show)
