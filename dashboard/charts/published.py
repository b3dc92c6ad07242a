"""Published models: how large they are, and what came of what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import pandas as pd

from pocketfed.dashboard.charts.base import BLUE, GREY, NAMES, ORANGE, PRECISION_COLOURS, TEAL
from pocketfed.dashboard.queries.models import ArtifactLine, ReleaseLine
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


@dataclass(frozen=True)
class Node:
    """A box of the lineage; `parent` is another's key, "" for none. column: how many steps from the beginning."""

    key: str
    label: str
    kind: str
    column: int
    parent: str


def nodes(artifacts: Sequence[ArtifactLine], releases: Sequence[ReleaseLine]) -> list[Node]:
    """Artifacts by what they were made from, then the runs that trained them, then the releases that came of it."""
    known, found = {a.version: a for a in artifacts}, list[Node]()
    columns: dict[str, int] = {}

    def column(version: str, seen: frozenset[str] = frozenset()) -> int:
        parent = known[version].parent if version in known else None
        if parent is None or parent in seen or version in seen:  # a manifest may claim to be its own parent
            return 0
        return 1 + column(parent, seen | {version})

    for a in artifacts:
        columns[a.version] = column(a.version)
        if a.parent and a.parent not in known and f"m {a.parent}" not in {n.key for n in found}:
            found.append(Node(f"m {a.parent}", f"model {plain(a.parent, 8)}", "model", 0, ""))
        kind = "quantized artifact" if a.quantization else "artifact"
        parent = f"m {a.parent}" if a.parent and a.parent != a.version else ""
        found.append(Node(f"m {a.version}", artifact_label(a), kind, columns[a.version], parent))
    last = max((n.column for n in found), default=0)
    for r in releases:
        source, key = f"m {r.artifact_version}", f"run {r.run_id}"
        if r.run_id is not None:
            if key not in {n.key for n in found}:
                found.append(Node(key, f"run {r.run_id} {plain(r.run, 20)}", "run", last + 1, source))
            source = key
        name = f"release {r.id}, {r.state}" + (f" {r.percent:g} %" if r.state in ("staged", "paused") else "")
        found.append(Node(f"release {r.id}", name, "release", last + 2, source))
    return found


def lineage(found: Sequence[Node]) -> Any:
    """Boxes from left to right with lines between them."""
    rows: dict[int, int] = {}
    places = dict[str, tuple[int, float]]()
    for node in found:
        rows[node.column] = rows.get(node.column, 0) + 1
        # half a row lower, so that no line runs through a model that it has nothing to do with
        places[node.key] = (node.column, rows[node.column] + 0.5 * (node.kind in ("run", "release")))
    boxes = pd.DataFrame(
        [{"x": places[n.key][0], "y": places[n.key][1], "label": n.label, "kind": n.kind} for n in found]
    )
    edges = pd.DataFrame(
        [
            dict(zip(("x", "y", "x2", "y2"), (*places[n.parent], *places[n.key]), strict=True))
            for n in found
            if n.parent in places
        ],
        columns=["x", "y", "x2", "y2"],
    )
    colours = {"model": GREY, "artifact": GREY, "quantized artifact": BLUE, "run": ORANGE, "release": TEAL}
    kinds = {kind: colour for kind, colour in colours.items() if any(n.kind == kind for n in found)}
    wide = alt.Scale(domain=[-0.2, max(c for c, _ in places.values()) + 0.8], nice=False)
    x, y = alt.X("x:Q", axis=None, scale=wide), alt.Y("y:Q", axis=None, scale=alt.Scale(reverse=True, zero=False))
    lines = alt.Chart(edges).mark_rule(color=GREY, opacity=0.6).encode(x=x, y=y, x2="x2:Q", y2="y2:Q")
    base = alt.Chart(boxes).encode(x=x, y=y)
    dots = base.mark_point(filled=True, size=130, opacity=1).encode(
        color=alt.Color(
            "kind:N", title=None, legend=alt.Legend(orient="top"),
            scale=alt.Scale(domain=list(kinds), range=list(kinds.values())),
        ),
        tooltip=[alt.Tooltip("label:N", title="What"), alt.Tooltip("kind:N", title="Kind")],
    )  # fmt: skip
    text = base.mark_text(align="left", dx=9, dy=-9, fontSize=12, color=GREY).encode(text="label:N")
    return alt.layer(lines, dots, text).properties(height=44 * max(rows.values()) + 60)
