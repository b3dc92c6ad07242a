"""Charts from rows: units on every axis, colours that stay apart for colour-blind readers, light or dark."""

from pocketfed.dashboard.charts.base import AXES, BLUE, GREY, ORANGE, RED, TEAL
from pocketfed.dashboard.charts.curves import learning, learning_frame, metric, run_label, spreads
from pocketfed.dashboard.charts.devices import counted, heat, states
from pocketfed.dashboard.charts.guards import scatter
from pocketfed.dashboard.charts.published import artifact_label, lineage, nodes, sizes
from pocketfed.dashboard.charts.vital import series
from pocketfed.dashboard.charts.work import dropped, funnel, histogram, phases, staleness

__all__ = [
    "AXES", "BLUE", "GREY", "ORANGE", "RED", "TEAL", "artifact_label", "counted", "dropped", "funnel", "heat",
    "histogram", "learning", "learning_frame", "lineage", "metric", "nodes", "phases", "run_label", "scatter", "series",
    "sizes", "spreads", "staleness", "states",
]  # fmt: skip
