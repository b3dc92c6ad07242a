"""The device's clock. The time of day is for its owner's own rules alone: no message holds one, no deadline follows it."""

from __future__ import annotations

import threading
import time
from datetime import datetime


class Clock:
    """The machine's. poll_s: how long a long poll stays open."""

    poll_s = 20.0

    def passed(self) -> float:
        """Seconds; they only grow."""
        return time.monotonic()

    def now(self) -> datetime:
        """The local time of day."""
        return datetime.now()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Until the event is set, or so long. Whether it is set."""
        return event.wait(seconds)
