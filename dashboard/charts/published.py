"""Published models: how large they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from pocketfed.dashboard.charts.base import GREY, NAMES, PRECISION_COLOURS
from pocketfed.dashboard.queries.models import ArtifactLine
from pocketfed.dashboard.words import plain


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
        y=alt.Y("model:N", sort=models, title=None, axis=NAMES, scale=alt.Scale(paddingInner=0.3)),
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
