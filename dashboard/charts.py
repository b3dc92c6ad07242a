"""Charts from rows: units on every axis, colours that stay apart for colour-blind readers, light or dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd

from pocketfed.dashboard.queries import ArtifactLine, Bin, Funnel, RoundLine
from pocketfed.dashboard.words import plain

# the "vibrant" scheme (Paul Tol, "Colour Schemes", 2021): distinct for all kinds of colour vision, on white and black
BLUE, ORANGE, TEAL, MAGENTA, CYAN, RED, GREY = (
    "#0077BB",
    "#EE7733",
    "#009988",
    "#EE3377",
    "#33BBEE",
    "#CC3311",
    "#999999",
)
SERIES = [BLUE, ORANGE, TEAL, MAGENTA, CYAN, RED, GREY]
STATUS_COLOURS = {
    "aggregated": TEAL, "uploaded": CYAN, "accepted": BLUE, "offered": GREY,
    "failed": RED, "expired": ORANGE, "quarantined": MAGENTA, "discarded": GREY,
}  # fmt: skip
STATE_COLOURS = {
    "training": BLUE,
    "downloading": CYAN,
    "uploading": TEAL,
    "offered": ORANGE,
    "idle": GREY,
    "offline": "#6B6B6B",
}
PRECISION_COLOURS = {"fp32": GREY, "fp16": CYAN, "int8": BLUE}
AXES = {
    "round": ("Round", "number"),
    "data moved": ("Data moved, up and down (MB)", "megabytes"),
    "time": ("Time spent in rounds (s)", "seconds"),
}
EVALUATED, TRAINING = "evaluation", "training, on the devices"
_NAMES = alt.Axis(labelLimit=230, ticks=False, domain=False)  # an axis of names needs no line
_POINTS_UP_TO = 60  # rounds; beyond that, dots are a smear


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
    few = len(shown) <= _POINTS_UP_TO * max(len(runs) * len(curves), 1)
    points = base.mark_point(filled=True, size=45 if few else 12, opacity=1 if few else 0).encode(tooltip=tooltip)
    return alt.layer(line, points).properties(height=height)


def states(counts: Mapping[str, int], height: int = 220) -> Any:
    """Devices by what they are doing."""
    frame = pd.DataFrame({"state": list(counts), "devices": list(counts.values())})
    return _bars(frame, "state", "devices", "Devices (count)", STATE_COLOURS, list(counts), height)


def funnel(found: Funnel, height: int = 200) -> Any:
    """How far the assignments of a round came, as counts and as shares of those sampled."""
    steps = {
        "sampled": found.sampled,
        "accepted": found.accepted,
        "uploaded": found.uploaded,
        "aggregated": found.aggregated,
    }
    frame = pd.DataFrame({"step": list(steps), "devices": list(steps.values())})
    frame["label"] = [f"{n:,}  ({n / max(found.sampled, 1):.0%})" for n in steps.values()]
    colours = {"sampled": GREY, "accepted": BLUE, "uploaded": CYAN, "aggregated": TEAL}
    return _bars(frame, "step", "devices", "Assignments (count)", colours, list(steps), height, label="label:N")


def dropped(reasons: Sequence[tuple[str, str, int]], height: int = 200) -> Any:
    """Why assignments did not count."""
    frame = pd.DataFrame(
        [
            {"status": status, "reason": plain(reason, 60) or f"{status}, no reason given", "devices": n}
            for status, reason, n in reasons
        ]
    )
    order = list(dict.fromkeys(frame["reason"]))
    return _bars(frame, "reason", "devices", "Assignments (count)", STATUS_COLOURS, order, height, color="status")


def _bars(
    frame: pd.DataFrame, category: str, value: str, title: str, colours: Mapping[str, str], order: Sequence[str],
    height: int, label: str | None = None, color: str | None = None,
) -> Any:  # fmt: skip
    """Horizontal bars with their values written beside them: readable without the axis, and without colour."""
    color = color or category
    present = [c for c in colours if c in set(frame[color])]
    top = max(int(frame[value].max()), 1)
    tooltip = [alt.Tooltip(f"{name}:N", title=name.capitalize()) for name in dict.fromkeys((category, color))]
    base = alt.Chart(frame).encode(
        y=alt.Y(f"{category}:N", sort=list(order), title=None, axis=_NAMES),
        x=alt.X(
            f"{value}:Q", title=title, scale=alt.Scale(domain=[0, top * 1.22], nice=False),
            axis=alt.Axis(format=",d", tickMinStep=1, tickCount=5, grid=False),
        ),
        tooltip=[*tooltip, alt.Tooltip(f"{value}:Q", title=title, format=",d")],
    )  # fmt: skip
    bars = base.mark_bar(cornerRadiusEnd=3, height={"band": 0.7}).encode(
        color=alt.Color(
            f"{color}:N", title=None, scale=alt.Scale(domain=present, range=[colours[c] for c in present]),
            legend=None if color == category else alt.Legend(orient="top"),
        )
    )  # fmt: skip
    text = base.mark_text(align="left", dx=5, color=GREY, fontSize=12).encode(
        text=alt.Text(label or f"{value}:Q", **({} if label else {"format": ",d"}))
    )
    return alt.layer(bars, text).properties(height=height)


def histogram(bins: Sequence[Bin], height: int = 200) -> Any:
    """Update norms of a round."""
    frame = pd.DataFrame([{"low": b.low, "high": b.high, "count": b.count} for b in bins])
    return (
        alt.Chart(frame)
        .mark_bar(color=BLUE, binSpacing=1)
        .encode(
            x=alt.X(
                "low:Q",
                bin="binned",
                title="Norm of the update (L2, no unit)",
                axis=alt.Axis(format="~r", grid=False, tickCount=6),
            ),
            x2="high:Q",
            y=alt.Y("count:Q", title="Updates (count)", axis=alt.Axis(format="d", tickMinStep=1, tickCount=5)),
            tooltip=[
                alt.Tooltip("low:Q", title="From", format=".3f"),
                alt.Tooltip("high:Q", title="To", format=".3f"),
                alt.Tooltip("count:Q", title="Updates", format=",d"),
            ],
        )
        .properties(height=height)
    )


def artifact_label(artifact: ArtifactLine) -> str:
    return f"{plain(artifact.preset, 24) or 'model'} · {plain(artifact.version[:8])}"


def sizes(artifacts: Sequence[ArtifactLine]) -> Any:
    """Megabytes of each model's backbone by precision."""
    lines = [
        {"model": artifact_label(a), "precision": precision, "MB": count / 1e6, "label": f"{count / 1e6:,.2f} MB"}
        for a in artifacts
        for precision, count in a.sizes.items()
    ]
    frame = pd.DataFrame(lines, columns=["model", "precision", "MB", "label"])
    models = list(dict.fromkeys(frame["model"]))
    precisions = list(PRECISION_COLOURS)
    base = alt.Chart(frame).encode(
        y=alt.Y("model:N", sort=models, title=None, axis=_NAMES, scale=alt.Scale(paddingInner=0.3)),
        yOffset=alt.YOffset("precision:N", sort=precisions),
        x=alt.X(
            "MB:Q", title="Size (MB, 1 MB = 1,000,000 bytes)", axis=alt.Axis(format="~r", grid=False, tickCount=6),
            scale=alt.Scale(domain=[0, float(frame["MB"].max() or 1) * 1.18], nice=False),
        ),
        tooltip=[
            alt.Tooltip("model:N", title="Model"),
            alt.Tooltip("precision:N", title="Precision"),
            alt.Tooltip("MB:Q", title="Size (MB)", format=",.3f"),
        ],
    )  # fmt: skip
    bars = base.mark_bar(cornerRadiusEnd=3).encode(
        color=alt.Color(
            "precision:N", title=None, sort=precisions, legend=alt.Legend(orient="top"),
            scale=alt.Scale(domain=precisions, range=list(PRECISION_COLOURS.values())),
        )
    )  # fmt: skip
    text = base.mark_text(align="left", dx=5, color=GREY, fontSize=12).encode(text="label:N")
    return alt.layer(bars, text).properties(height=75 * len(models) + 110)
