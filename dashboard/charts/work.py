"""What became of a round's assignments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from pocketfed.dashboard.charts.base import BLUE, CYAN, GREY, STATUS_COLOURS, TEAL, bars
from pocketfed.dashboard.queries.rounds import Bin, Funnel
from pocketfed.dashboard.words import plain


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
    return bars(frame, "step", "devices", "Assignments (count)", colours, list(steps), height, label="label:N")


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
