"""Updates as screening sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from pocketfed.dashboard.charts.base import BLUE, MAGENTA
from pocketfed.dashboard.queries.security import Point


def scatter(points: Sequence[Point], height: int = 300) -> Any:
    """Norm against the cosine to the mean where that was written down, else against the weight; a shape a fate."""
    cosine = any(p.cosine is not None for p in points)
    frame = pd.DataFrame(
        [
            {
                "round": p.round, "norm": p.norm, "other": p.cosine if cosine else p.examples,
                "fate": "quarantined" if p.status == "quarantined" else "counted or waiting",
            }
            for p in points
        ]
    )  # fmt: skip
    fates, title = ["counted or waiting", "quarantined"], "Cosine to the mean update (no unit)"
    x = alt.X("other:Q", title=title if cosine else "Weight (examples)", scale=alt.Scale(zero=False))
    return (
        alt.Chart(frame)
        .mark_point(filled=True, size=45, opacity=0.7)
        .encode(
            x=x,
            y=alt.Y("norm:Q", title="Norm of the update (L2, no unit)", scale=alt.Scale(type="symlog")),
            color=alt.Color(
                "fate:N", title=None, legend=alt.Legend(orient="top"),
                scale=alt.Scale(domain=fates, range=[BLUE, MAGENTA]),
            ),
            shape=alt.Shape("fate:N", title=None, scale=alt.Scale(domain=fates, range=["circle", "triangle-up"])),
            tooltip=[
                alt.Tooltip("round:Q", title="Round", format="d"),
                alt.Tooltip("norm:Q", title="Norm", format=",.4f"),
                alt.Tooltip("other:Q", title="Cosine" if cosine else "Examples", format=",.3f" if cosine else ",d"),
                alt.Tooltip("fate:N", title="What became of it"),
            ],
        )
        .properties(height=height)
    )  # fmt: skip
