"""Curves of runs: accuracy and loss against what they cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd

from pocketfed.dashboard.charts.base import AXES, BEGAN, DASHES, EVALUATED, ON_DEVICES, POINTS_UP_TO, SERIES, TRAINING
from pocketfed.dashboard.queries.learning import Spread
from pocketfed.dashboard.queries.runs import RoundLine
from pocketfed.dashboard.words import plain


def run_label(run_id: int, name: str) -> str:
    """A run's name as charts and choosers show it; the id keeps runs of one name apart."""
    return f"#{run_id} {plain(name, 32)}"


def learning_frame(
    rounds: Sequence[RoundLine],
    names: Mapping[int, str],
    on_devices: Mapping[str, Sequence[tuple[int, int, float]]] | None = None,
    beginning: bool = False,
) -> pd.DataFrame:
    """One line a round and curve: what was evaluated, the devices' own training loss, and where a run began.

    Args:
        on_devices: measure -> (run, round, value) of what devices found on their own examples. beginning: as a level line.
    """
    lines: list[dict[str, Any]] = []
    devices = {m: {(run, n): v for run, n, v in values} for m, values in (on_devices or {}).items()}
    began = {(r.run_id, m): v for r in rounds if r.number == 0 for m, v in (("accuracy", r.accuracy), ("loss", r.loss))}
    for r in rounds:
        common = {
            "run": run_label(r.run_id, names.get(r.run_id, "")), "number": r.number, "megabytes": r.total_bytes / 1e6,
            "seconds": r.total_seconds, "devices": r.devices,
        }  # fmt: skip
        for measure, curve, value in (
            ("accuracy", EVALUATED, r.accuracy), ("loss", EVALUATED, r.loss), ("loss", TRAINING, r.train_loss),
            *((m, ON_DEVICES, found.get((r.run_id, r.number))) for m, found in devices.items()),
            *((m, BEGAN, began.get((r.run_id, m)) if beginning and r.number else None) for m in ("accuracy", "loss")),
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
    curves = [c for c in DASHES if c in set(shown["curve"])]
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
        "curve:N", title="Measured on", scale=alt.Scale(domain=curves, range=[DASHES[c] for c in curves] or [[1, 0]]),
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


def spreads(found: Sequence[Spread], measure: str, height: int = 280) -> Any:
    """Each cohort's devices by round: the middle one as a line, from the tenth to the ninetieth percentile as a band."""
    frame = pd.DataFrame([{**dataclasses.asdict(s), "cohort": plain(s.cohort, 40) or "no cohort"} for s in found])
    cohorts = list(dict.fromkeys(frame["cohort"]))
    shown, title = (
        (".1%", "Accuracy on the devices (%)") if measure == "accuracy" else (".3f", "Loss on the devices (nats)")
    )
    base = alt.Chart(frame).encode(
        x=alt.X("round:Q", title="Round", axis=alt.Axis(grid=False, tickMinStep=1, format="d")),
        color=alt.Color(
            "cohort:N", title=None, scale=alt.Scale(domain=cohorts, range=[SERIES[i % len(SERIES)] for i in range(len(cohorts))]),
            legend=alt.Legend(orient="top", labelLimit=200, symbolType="stroke", symbolSize=300),
        ),
        tooltip=[
            alt.Tooltip("cohort:N", title="Cohort"), alt.Tooltip("round:Q", title="Round", format="d"),
            alt.Tooltip("devices:Q", title="Devices", format=",d"),
            alt.Tooltip("p10:Q", title="10th percentile", format=shown),
            alt.Tooltip("p50:Q", title="Median", format=shown),
            alt.Tooltip("p90:Q", title="90th percentile", format=shown),
            alt.Tooltip("worst:Q", title="Worst tenth, mean", format=shown),
        ],
    )  # fmt: skip
    axis = alt.Axis(format="~%" if measure == "accuracy" else "~r", tickCount=6)
    band = base.mark_area(opacity=0.18).encode(
        y=alt.Y("p10:Q", title=title, axis=axis, scale=alt.Scale(zero=False)), y2="p90:Q"
    )
    middle = base.mark_line(strokeWidth=2.2, point=True).encode(y=alt.Y("p50:Q", title=title))
    worst = base.mark_line(strokeWidth=1.4, strokeDash=[3, 3]).encode(y=alt.Y("worst:Q", title=title))
    return alt.layer(band, middle, worst).properties(height=height)


def metric(values: Sequence[tuple[int, int, float]], names: Mapping[int, str], title: str, height: int = 240) -> Any:
    """Any number of rounds, against the round; a colour a run."""
    frame = pd.DataFrame(
        [{"run": run_label(r, names.get(r, "")), "round": number, "value": value} for r, number, value in values]
    )
    runs = list(dict.fromkeys(frame["run"]))
    return (
        alt.Chart(frame)
        .mark_line(strokeWidth=2, point=len(frame) <= POINTS_UP_TO)
        .encode(
            x=alt.X("round:Q", title="Round", axis=alt.Axis(grid=False, tickMinStep=1, format="d")),
            y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=False), axis=alt.Axis(format="~r", tickCount=6)),
            color=alt.Color(
                "run:N", title=None, scale=alt.Scale(domain=runs, range=SERIES[: len(runs)]),
                legend=None if len(runs) < 2 else alt.Legend(orient="top", labelLimit=300),
            ),
            tooltip=[
                alt.Tooltip("run:N", title="Run"), alt.Tooltip("round:Q", title="Round", format="d"),
                alt.Tooltip("value:Q", title=title, format=",.5f"),
            ],
        )
        .properties(height=height)
    )  # fmt: skip
