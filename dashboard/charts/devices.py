"""The fleet's devices, counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import altair as alt
import pandas as pd

from pocketfed.dashboard.charts.base import BLUE, STATE_COLOURS, bars
from pocketfed.dashboard.words import plain

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


def states(counts: Mapping[str, int], height: int = 220) -> Any:
    """Devices by what they are doing."""
    frame = pd.DataFrame({"state": list(counts), "devices": list(counts.values())})
    return bars(frame, "state", "devices", "Devices (count)", STATE_COLOURS, list(counts), height)


def counted(counts: Mapping[str, int], what: str, title: str = "Devices (count)", without: str = "not told") -> Any:
    """Bars of one colour for groups that have no order of their own; their names may be a stranger's."""
    names = [plain(name, 40) or without for name in counts]
    frame = pd.DataFrame({what: names, "count": list(counts.values())})
    colours = dict.fromkeys(names, BLUE)
    return bars(frame, what, "count", title, colours, names, 34 * max(len(names), 1) + 60)


def heat(hours: Sequence[tuple[datetime, int]], height: int = 230) -> Any:
    """Devices that were there, by hour of the day and day of the week: the mean of what the hours had. UTC."""
    found = dict[tuple[str, int], list[int]]()
    for hour, devices in hours:
        found.setdefault((DAYS[hour.weekday()], hour.hour), []).append(devices)
    means = pd.DataFrame([{"day": d, "clock": c, "devices": sum(n) / len(n)} for (d, c), n in found.items()])
    return (
        alt.Chart(means)
        .mark_rect()
        .encode(
            x=alt.X("clock:O", title="Hour of the day (UTC)", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("day:O", title="Day of the week", sort=list(DAYS)),
            color=alt.Color("devices:Q", title="Devices (count)", scale=alt.Scale(scheme="viridis")),
            tooltip=[
                alt.Tooltip("day:N", title="Day"),
                alt.Tooltip("clock:O", title="Hour (UTC)"),
                alt.Tooltip("devices:Q", title="Devices there", format=",.0f"),
            ],
        )
        .properties(height=height)
    )
