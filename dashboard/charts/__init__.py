"""Charts from rows: units on every axis, colours that stay apart for colour-blind readers, light or dark."""

from pocketfed.dashboard.charts.base import AXES, BLUE, GREY, ORANGE, RED, TEAL
from pocketfed.dashboard.charts.curves import learning, learning_frame, run_label
from pocketfed.dashboard.charts.devices import states
from pocketfed.dashboard.charts.published import artifact_label, sizes
from pocketfed.dashboard.charts.work import dropped, funnel, histogram

__all__ = [
    "AXES",
    "BLUE",
    "GREY",
    "ORANGE",
    "RED",
    "TEAL",
    "artifact_label",
    "dropped",
    "funnel",
    "histogram",
    "learning",
    "learning_frame",
    "run_label",
    "sizes",
    "states",
]
