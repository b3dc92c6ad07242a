"""Ending in good order: Ctrl-C and SIGTERM, for commands that run until told to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable


def wait(stopping: threading.Event) -> None:
    """Until it is set. In short waits: a signal that comes just before a long one would be heard only when that ends."""
    while not stopping.wait(0.5):
        pass


def on_termination(stop: Callable[[], object]) -> None:
    """Ctrl-C and SIGTERM end the command in good order."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop())
