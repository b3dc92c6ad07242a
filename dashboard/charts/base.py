"""What all charts share: colours that stay apart for colour-blind readers on light and dark, and bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd

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
ON_DEVICES = "evaluation, on the devices"
LEVELS = {"central": "all data in one place", "local": "each device alone", "previous": "the release before"}
# curve -> its dashes, and its colour where one run is shown (else a colour is a run)
DASHES = {
    EVALUATED: [1, 0], ON_DEVICES: [8, 3], TRAINING: [5, 4],
    LEVELS["central"]: [12, 3], LEVELS["local"]: [7, 3, 2, 3], LEVELS["previous"]: [2, 4],
}  # fmt: skip
CURVE_COLOURS = dict(zip(DASHES, (BLUE, CYAN, ORANGE, TEAL, MAGENTA, GREY), strict=True))
NAMES = alt.Axis(labelLimit=230, ticks=False, domain=False)  # an axis of names needs no line
MOST_DRAWN = 250  # rounds of a run; of more, only every so many: a screen has no room for them, and a browser no time
POINTS_UP_TO = 60  # rounds; beyond that, dots are a smear


def bars(
    frame: pd.DataFrame, category: str, value: str, title: str, colours: Mapping[str, str], order: Sequence[str],
    height: int, label: str | None = None, color: str | None = None,
) -> Any:  # fmt: skip
    """Horizontal bars with their values written beside them: readable without the axis, and without colour."""
    color = color or category
    present = [c for c in colours if c in set(frame[color])]
    top = max(int(frame[value].max()), 1)
    tooltip = [alt.Tooltip(f"{name}:N", title=name.capitalize()) for name in dict.fromkeys((category, color))]
    base = alt.Chart(frame).encode(
        y=alt.Y(f"{category}:N", sort=list(order), title=None, axis=NAMES),
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
