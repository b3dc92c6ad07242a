"""Curves of runs: accuracy and loss against what they cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from pocketfed.dashboard.charts.base import (
    AXES,
    BLUE,
    CURVE_COLOURS,
    DASHES,
    EVALUATED,
    LEVELS,
    MOST_DRAWN,
    ON_DEVICES,
    POINTS_UP_TO,
    SERIES,
    TRAINING,
)
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
    levels: Mapping[tuple[int, str], Mapping[str, float]] | None = None,
) -> pd.DataFrame:
    """One line a round and curve: what was evaluated, the devices' own training loss, and what runs are compared with.

    Args:
        on_devices: measure -> (run, round, value) of what devices found on their own examples.
        levels: (run, kind of LEVELS) -> measure -> value, for level lines; where no previous model is among them, it is
            what the run began with. None: no level lines.
    """
    lines: list[dict[str, Any]] = []
    rounds = thinned(rounds)
    devices = {m: {(run, n): v for run, n, v in values} for m, values in (on_devices or {}).items()}
    for r in rounds:
        for measure, curve, value in (
            ("accuracy", EVALUATED, r.accuracy), ("loss", EVALUATED, r.loss), ("loss", TRAINING, r.train_loss),
            *((m, ON_DEVICES, found.get((r.run_id, r.number))) for m, found in devices.items()),
        ):  # fmt: skip
            if value is not None:
                lines.append({**_place(r, names), "measure": measure, "curve": curve, "value": value})
    if levels is not None:
        lines += _level_lines(rounds, names, levels)
    columns = ["run", "number", "megabytes", "seconds", "devices", "measure", "curve", "value"]
    frame = pd.DataFrame(lines, columns=columns)
    return frame[np.isfinite(frame["value"].astype(float))]


def thinned(rounds: Sequence[RoundLine], most: int = MOST_DRAWN) -> list[RoundLine]:
    """Of runs with more rounds than `most`: the first, every so many after it, and the newest that are there."""
    by_run: dict[int, list[RoundLine]] = {}
    for r in rounds:
        by_run.setdefault(r.run_id, []).append(r)
    kept = []
    for mine in by_run.values():
        step, known = (
            -(-len(mine) // most),
            [i for i, r in enumerate(mine) if r.accuracy is not None or r.loss is not None],
        )
        ends = {len(mine) - 1, *known[-1:]}
        kept += [r for i, r in enumerate(mine) if i % step == 0 or i in ends]
    return kept


def _place(r: RoundLine, names: Mapping[int, str]) -> dict[str, Any]:
    return {
        "run": run_label(r.run_id, names.get(r.run_id, "")), "number": r.number, "megabytes": r.total_bytes / 1e6,
        "seconds": r.total_seconds, "devices": r.devices,
    }  # fmt: skip


def _level_lines(
    rounds: Sequence[RoundLine], names: Mapping[int, str], levels: Mapping[tuple[int, str], Mapping[str, float]]
) -> Iterator[dict[str, Any]]:
    """From each run's first round to its last."""
    for run_id in dict.fromkeys(r.run_id for r in rounds):
        mine = [r for r in rounds if r.run_id == run_id]
        began = {"accuracy": mine[0].accuracy, "loss": mine[0].loss} if mine[0].number == 0 else {}
        for kind, curve in LEVELS.items():
            told: Mapping[str, float | None] = levels.get((run_id, kind), began if kind == "previous" else {})
            for measure, value in told.items():
                if value is not None and measure in ("accuracy", "loss") and len(mine) > 1:
                    for end in (mine[0], mine[-1]):
                        yield {**_place(end, names), "devices": 0, "measure": measure, "curve": curve, "value": value}


def learning(frame: pd.DataFrame, measure: str, axis: str = "round", height: int = 280) -> Any:
    """Accuracy or loss against rounds, megabytes or seconds: a colour a run and dashes a curve; of one run, both a curve."""
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
    # outside of the plot, where it hides no curve
    named = alt.Legend(orient="bottom", title=None, columns=2, labelLimit=260, symbolType="stroke", symbolSize=500)
    dash = alt.StrokeDash(
        "curve:N", title=None, scale=alt.Scale(domain=curves, range=[DASHES[c] for c in curves] or [[1, 0]]),
        legend=None if len(curves) < 2 else named,
    )  # fmt: skip
    if len(runs) < 2:
        colours = alt.Scale(domain=curves, range=[CURVE_COLOURS[c] for c in curves] or [BLUE])
        color = alt.Color("curve:N", title=None, scale=colours, legend=None if len(curves) < 2 else named)
    else:
        top = alt.Legend(
            orient="top",
            title=None,
            labelLimit=260,
            columns=2 if len(runs) > 1 else 1,
            symbolType="stroke",
            symbolSize=300,
        )
        color = alt.Color("run:N", title=None, scale=alt.Scale(domain=runs, range=SERIES[: len(runs)]), legend=top)
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
    line = base.mark_line(strokeWidth=2.2, interpolate="linear").encode(strokeDash=dash, tooltip=tooltip)
    few = len(shown) <= POINTS_UP_TO * max(len(runs) * len(curves), 1)
    points = (
        base.transform_filter(alt.FieldOneOfPredicate("curve", [c for c in curves if c not in LEVELS.values()]))
        .mark_point(filled=True, size=45 if few else 12, opacity=1 if few else 0)
        .encode(tooltip=tooltip)
    )
    rows = -(-len(curves) // 2) * (len(curves) > 1) + -(-len(runs) // 2) * (len(runs) > 1)
    return alt.layer(line, points).properties(height=height + 34 * rows)


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
            legend=alt.Legend(orient="top", labelLimit=200, symbolType="stroke", symbolSize=300, symbolOpacity=1),
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
