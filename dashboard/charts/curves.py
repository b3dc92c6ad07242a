"""Curves of runs: accuracy and loss against what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd

from pocketfed.dashboard.charts.base import AXES, EVALUATED, POINTS_UP_TO, SERIES, TRAINING
from pocketfed.dashboard.queries.runs import RoundLine
from pocketfed.dashboard.words import plain


def run_label(run_id: int, name: str) -> str:
    """A run's name as charts and choosers show it; the id keeps runs of one name apart."""
    return f"#{run_id} {plain(name, 32)}"


def learning_frame(rounds: Sequence[RoundLine], names: Mapping[int, str]) -> pd.DataFrame:
    """One line a round and curve: what was evaluated, and the devices' own training loss."""
    lines: list[dict[str, Any]] = []
    for r in rounds:
        common = {
            "run": run_label(r.run_id, names.get(r.run_id, "")), "number": r.number, "megabytes": r.total_bytes / 1e6,
            "seconds": r.total_seconds, "devices": r.devices,
        }  # fmt: skip
        for measure, curve, value in (
            ("accuracy", EVALUATED, r.accuracy), ("loss", EVALUATED, r.loss), ("loss", TRAINING, r.train_loss)
        ):  # fmt: skip
            if value is not None:
                lines.append({**common, "measure": measure, "curve": curve, "value": value})
    columns = ["run", "number", "megabytes", "seconds", "devices", "measure", "curve", "value"]
    return pd.DataFrame(lines, columns=columns)


def learning(frame: pd.DataFrame, measure: str, axis: str = "round", height: int = 320) -> Any:
    """Accuracy or loss against rounds, megabytes or seconds; a colour a run, dashes for what the devices measured."""
    title, field = AXES[axis]
    shown = frame[frame["measure"] == measure]
    runs = list(dict.fromkeys(shown["run"]))
    curves = [c for c in (EVALUATED, TRAINING) if c in set(shown["curve"])]
    value_title, value_format = (
        ("Accuracy (%)", "~%") if measure == "accuracy" else ("Loss, cross-entropy (nats)", "~r")
    )
    ticks = {"format": "d", "tickMinStep": 1} if axis == "round" else {"format": "~s" if axis == "time" else "~r"}
    x = alt.X(
        f"{field}:Q",
        title=title,
        axis=alt.Axis(grid=False, tickCount=8, labelFlush=False, **ticks),
        scale=alt.Scale(nice=axis != "round"),
    )
    y = alt.Y(
        "value:Q",
        title=value_title,
        axis=alt.Axis(format=value_format, tickCount=6),
        scale=alt.Scale(zero=False, nice=True),
    )
    color = alt.Color(
        "run:N", title="Run", scale=alt.Scale(domain=runs, range=SERIES[: max(len(runs), 1)]),
        legend=None if len(runs) < 2 else alt.Legend(
            orient="top", title=None, labelLimit=300, columns=2, symbolType="stroke", symbolSize=300
        ),
    )  # fmt: skip
    dash = alt.StrokeDash(
        "curve:N", title="Measured on", scale=alt.Scale(domain=curves, range=[[1, 0], [5, 4]][: max(len(curves), 1)]),
        legend=None if len(curves) < 2 else alt.Legend(
            orient="top-right", title=None, symbolType="stroke", symbolSize=500
        ),
    )  # fmt: skip
    tooltip = [
        alt.Tooltip("run:N", title="Run"),
        alt.Tooltip("number:Q", title="Round", format="d"),
        alt.Tooltip("value:Q", title=measure.capitalize(), format=".2%" if measure == "accuracy" else ".4f"),
        alt.Tooltip("curve:N", title="Measured on"),
        alt.Tooltip("devices:Q", title="Devices", format=",d"),
        alt.Tooltip("megabytes:Q", title="Moved (MB)", format=",.2f"),
        alt.Tooltip("seconds:Q", title="Time (s)", format=",.1f"),
    ]
    base = alt.Chart(shown).encode(x=x, y=y, color=color)
    line = base.mark_line(strokeWidth=2.2, interpolate="linear").encode(strokeDash=dash)
    few = len(shown) <= POINTS_UP_TO * max(len(runs) * len(curves), 1)
    points = base.mark_point(filled=True, size=45 if few else 12, opacity=1 if few else 0).encode(tooltip=tooltip)
    return alt.layer(line, points).properties(height=height)
