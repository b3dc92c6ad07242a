"""What became of a round's assignments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd

from pocketfed.dashboard.charts.base import BLUE, CYAN, GREY, ORANGE, RED, STATUS_COLOURS, TEAL, bars
from pocketfed.dashboard.queries.rounds import DROPPED, Funnel, Span
from pocketfed.dashboard.queries.spans import Bin
from pocketfed.dashboard.words import plain

STEP_COLOURS = {
    "sampled": GREY, "accepted": BLUE, "downloaded": BLUE, "trained": CYAN, "uploaded": CYAN, "aggregated": TEAL,
}  # fmt: skip
SPAN_COLOURS = {"asked, not begun": GREY, "at work": BLUE, "ended without counting": RED}


def funnel(found: Funnel, height: int = 240) -> Any:
    """How far the assignments of a round came, as counts and as shares of those sampled."""
    steps = found.steps
    frame = pd.DataFrame({"step": list(steps), "devices": list(steps.values())})
    frame["label"] = [f"{n:,}  ({n / max(found.sampled, 1):.0%})" for n in steps.values()]
    return bars(frame, "step", "devices", "Assignments (count)", STEP_COLOURS, list(steps), height, label="label:N")


def dropped(reasons: Sequence[tuple[str, str, int]], height: int = 200) -> Any:
    """Why assignments did not count."""
    frame = pd.DataFrame(
        [
            {"status": status, "reason": plain(reason, 60) or f"{status}, no reason given", "devices": n}
            for status, reason, n in reasons
        ]
    )
    order = list(dict.fromkeys(frame["reason"]))
    return bars(frame, "reason", "devices", "Assignments (count)", STATUS_COLOURS, order, height, color="status")


def histogram(
    bins: Sequence[Bin], title: str, counted: str, line: float | None = None, line_means: str = "", height: int = 200
) -> Any:
    """Bars of a histogram, and a line where a limit lies; `title` has the unit."""
    frame = pd.DataFrame([{"low": b.low, "high": b.high, "count": b.count} for b in bins])
    bars_drawn = (
        alt.Chart(frame)
        .mark_bar(color=BLUE, binSpacing=1)
        .encode(
            x=alt.X("low:Q", bin="binned", title=title, axis=alt.Axis(format="~r", grid=False, tickCount=6)),
            x2="high:Q",
            y=alt.Y("count:Q", title=f"{counted} (count)", axis=alt.Axis(format="d", tickMinStep=1, tickCount=5)),
            tooltip=[
                alt.Tooltip("low:Q", title="From", format=".3f"),
                alt.Tooltip("high:Q", title="To", format=".3f"),
                alt.Tooltip("count:Q", title=counted, format=",d"),
            ],
        )
    )
    if line is None:
        return bars_drawn.properties(height=height)
    return alt.layer(bars_drawn, *_limit(line, line_means)).properties(height=height)


def _limit(at: float, means: str) -> tuple[Any, Any]:
    """An upright line at a value, with what it means beside it."""
    base = alt.Chart(pd.DataFrame({"at": [at], "means": [means]})).encode(x=alt.X("at:Q"))
    rule = base.mark_rule(color=ORANGE, strokeWidth=2, strokeDash=[6, 3]).encode(
        tooltip=[alt.Tooltip("means:N", title="Line"), alt.Tooltip("at:Q", title="At", format=",.3f")]
    )
    text = base.mark_text(align="right", dx=-5, color=ORANGE, fontSize=12).encode(y=alt.value(-6), text="means:N")
    return rule, text


def phases(spans: Sequence[Span], now_s: float | None, height: int = 300) -> Any:
    """A Gantt chart of a round's slowest devices: a bar a device, from offer to end, with the deadline.

    Args:
        now_s: seconds since the round's first offer, where it is under way still: unfinished bars end there.
    """
    lines, names = [], []
    for number, span in enumerate(spans):
        name = plain(span.device, 28) or f"device {number}"
        names.append(row := f"{name}\u200b{number}")  # names may be the same once they are cut
        end = span.ended if span.ended is not None else (now_s if now_s is not None else span.accepted or span.offered)
        begun = span.accepted if span.accepted is not None else (end if span.status != "aggregated" else span.offered)
        working = "ended without counting" if span.status in DROPPED else "at work"
        for phase, start, stop in (("asked, not begun", span.offered, begun), (working, begun, end)):
            if stop > start:
                lines.append(
                    {
                        "row": row, "device": name, "status": span.status, "phase": phase, "start": start, "end": stop,
                        "took": stop - start,
                    }
                )  # fmt: skip
    columns = ["row", "device", "status", "phase", "start", "end", "took"]
    frame = pd.DataFrame(lines, columns=columns)
    base = alt.Chart(frame).encode(
        y=alt.Y("row:N", sort=names, title="Devices, the slowest first", axis=alt.Axis(labels=False, ticks=False)),
        x=alt.X("start:Q", title="Time since the round's first offer (s)", axis=alt.Axis(format="~r", tickCount=8)),
        x2="end:Q",
        color=alt.Color(
            "phase:N", title=None, legend=alt.Legend(orient="top"),
            scale=alt.Scale(domain=list(SPAN_COLOURS), range=list(SPAN_COLOURS.values())),
        ),
        tooltip=[
            alt.Tooltip("device:N", title="Device"), alt.Tooltip("status:N", title="Status"),
            alt.Tooltip("phase:N", title="Phase"), alt.Tooltip("took:Q", title="For (s)", format=",.1f"),
        ],
    )  # fmt: skip
    bars_drawn = base.mark_bar(height={"band": 0.75})
    ends = [span.deadline for span in spans if span.deadline is not None]
    layers = [bars_drawn, *(_limit(max(ends), "deadline") if ends else ())]
    return alt.layer(*layers).properties(height=height)


def staleness(counts: Mapping[int, int], height: int = 200) -> Any:
    """How late the updates were that a buffer took in."""
    frame = pd.DataFrame({"late": [str(k) for k in counts], "updates": list(counts.values())})
    return (
        alt.Chart(frame)
        .mark_bar(color=BLUE, cornerRadiusEnd=3)
        .encode(
            x=alt.X("late:N", sort=None, title="Staleness (rounds)", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("updates:Q", title="Updates (count)", axis=alt.Axis(format="d", tickMinStep=1, tickCount=5)),
            tooltip=[
                alt.Tooltip("late:N", title="Rounds late"),
                alt.Tooltip("updates:Q", title="Updates", format=",d"),
            ],
        )
        .properties(height=height)
    )
