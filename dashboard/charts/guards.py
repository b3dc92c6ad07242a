"""Updates as screening sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from pocketfed.dashboard.charts.base import BLUE, MAGENTA
from pocketfed.dashboard.queries.security import Point


def scatter(points: Sequence[Point], height: int = 300) -> Any:
    """Norm against where an update pointed, or against its weight where no cosine is known; a shape a fate."""
    pointed = any(p.cosine is not None for p in points)
    frame = pd.DataFrame(
        [
            {
                "round": p.round, "norm": p.norm, "examples": p.examples, "cosine": p.cosine,
                "fate": "quarantined" if p.status == "quarantined" else "counted or waiting",
            }
            for p in points
            if not pointed or p.cosine is not None
        ]
    )  # fmt: skip
    along = (
        alt.X("cosine:Q", title="Cosine to the step of the round before (no unit)", scale=alt.Scale(domain=[-1, 1]))
        if pointed
        else alt.X("examples:Q", title="Weight (examples)", scale=alt.Scale(zero=False, nice=True))
    )
    fates = ["counted or waiting", "quarantined"]
    return (
        alt.Chart(frame)
        .mark_point(filled=True, size=45, opacity=0.7)
        .encode(
            x=along,
            y=alt.Y("norm:Q", title="Norm of the update (L2, no unit)", scale=alt.Scale(type="symlog")),
            color=alt.Color(
                "fate:N", title=None, legend=alt.Legend(orient="top"),
                scale=alt.Scale(domain=fates, range=[BLUE, MAGENTA]),
            ),
            shape=alt.Shape("fate:N", title=None, scale=alt.Scale(domain=fates, range=["circle", "triangle-up"])),
            tooltip=[
                alt.Tooltip("round:Q", title="Round", format="d"),
                alt.Tooltip("norm:Q", title="Norm", format=",.4f"),
                *([alt.Tooltip("cosine:Q", title="Cosine", format=".3f")] if pointed else []),
                alt.Tooltip("examples:Q", title="Examples", format=",d"),
                alt.Tooltip("fate:N", title="What became of it"),
            ],
        )
        .properties(height=height)
    )  # fmt: skip
