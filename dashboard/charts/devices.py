"""The fleet's devices, counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from pocketfed.dashboard.charts.base import STATE_COLOURS, bars


def states(counts: Mapping[str, int], height: int = 220) -> Any:
    """Devices by what they are doing."""
    frame = pd.DataFrame({"state": list(counts), "devices": list(counts.values())})
    return bars(frame, "state", "devices", "Devices (count)", STATE_COLOURS, list(counts), height)
