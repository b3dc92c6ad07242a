"""The coordinator's figures over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd

from pocketfed.dashboard.charts.base import SERIES
from pocketfed.dashboard.queries.system import VitalLine


def series(lines: Sequence[VitalLine], fields: Mapping[str, str], title: str, scale: float = 1.0) -> Any:
    """Figures against time: `fields` says which, and what each is called; all in the unit that `title` names."""
    rows = [
        {"at": line.at, "clock": f"{line.at:%m-%d %H:%M:%S}", "figure": name, "value": getattr(line, field) * scale}
        for line in lines
        for field, name in fields.items()
    ]
    frame, names = pd.DataFrame(rows), list(fields.values())
    return (
        alt.Chart(frame)
        .mark_line(strokeWidth=2)
        .encode(
            x=alt.X(
                "at:T", title="Time (UTC)", scale=alt.Scale(type="utc"), axis=alt.Axis(grid=False, tickCount=6, format="%H:%M")
            ),
            y=alt.Y("value:Q", title=title, axis=alt.Axis(format="~s", tickCount=5)),
            color=alt.Color(
                "figure:N", title=None, scale=alt.Scale(domain=names, range=SERIES[: len(names)]),
                legend=None if len(names) < 2 else alt.Legend(orient="top"),
            ),
            strokeDash=alt.StrokeDash(
                "figure:N", title=None, legend=None,
                scale=alt.Scale(domain=names, range=[[1, 0], [6, 3], [2, 2], [8, 2, 2, 2]][: len(names)]),
            ),
            tooltip=[
                alt.Tooltip("clock:N", title="Time (UTC)"),
                alt.Tooltip("figure:N", title="Figure"),
                alt.Tooltip("value:Q", title=title, format=",.2f"),
            ],
        )
        .properties(height=220 + 30 * (len(names) > 1))
    )  # fmt: skip
