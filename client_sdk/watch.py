"""Watching a device's conditions: a reading is never older than a second where it decides."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from pocketfed.client_sdk.clock import Clock
from pocketfed.client_sdk.conditions import Conditions, Readings, Unmet, Used, unmet
from pocketfed.client_sdk.link import log
from pocketfed.client_sdk.linux import LinuxReader
from pocketfed.client_sdk.usage import Usage

FRESH_S = 1.0
FRESH_SIZE_S = 10.0  # of home: to add up its files takes longer
Source = Callable[[], Readings]


def default_source() -> Source:
    """The machine's own sensors where we can read them; elsewhere nothing is known."""
    return LinuxReader() if sys.platform == "linux" else Readings


class Watch:
    """Says what is missing now. It has no thread: whoever works asks it, before every step and every piece of a transfer.

    Args:
        source: gives the readings; one that fails holds the device back, since nothing is known then.
        home: whose size is limited.
    """

    def __init__(self, asked: Conditions, source: Source | None, usage: Usage, home: Path, clock: Clock) -> None:
        self.asked = asked
        self._needs_readings = source is not None or asked != Conditions()
        self._source = source or default_source()
        self._usage, self._home, self._clock = usage, home, clock
        self._lock = threading.Lock()
        self._readings, self._read_at = Readings(), -math.inf
        self._home_bytes, self._sized_at = 0, -math.inf
        self._failed = ""

    def look(self) -> Unmet:
        """What is missing."""
        used = Used(
            self._usage.bytes_today(),
            self._size() if self.asked.max_disk_mb < math.inf else 0,
            self._usage.since_round_s() if self.asked.min_separation_s else math.inf,
        )
        return unmet(self.asked, self._fresh(), used, self._clock.now())

    def may_compute(self) -> bool:
        return not self.look().compute

    def may_transfer(self) -> bool:
        return not self.look().transfer

    def forget_reading(self) -> None:
        """The app says that something has changed: the next look reads anew."""
        self._read_at = self._sized_at = -math.inf

    def _size(self) -> int:
        with self._lock:
            if self._clock.passed() - self._sized_at >= FRESH_SIZE_S:
                self._home_bytes, self._sized_at = home_bytes(self._home), self._clock.passed()
            return self._home_bytes

    def _fresh(self) -> Readings:
        with self._lock:
            due = self._needs_readings and self._clock.passed() - self._read_at >= FRESH_S
        if not due:
            return self._readings
        readings = self._read()  # without the lock: it is the app's code
        with self._lock:
            self._readings, self._read_at = readings, self._clock.passed()
        return readings

    def _read(self) -> Readings:
        try:
            readings = self._source()
            if not isinstance(readings, Readings):
                raise TypeError(f"it gave {type(readings).__name__}, not Readings")
        except Exception as error:
            if self._failed != repr(error):
                self._failed = repr(error)
                log.exception("the app's readings callback failed")
            return Readings(hold=f"the app's readings callback to work again ({type(error).__name__})")
        self._failed = ""
        return readings


def home_bytes(home: Path) -> int:
    """Of all files in it, as far as they can be seen."""
    total = 0
    for path in home.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() and not path.is_symlink() else 0
        except OSError:
            continue  # gone meanwhile
    return total
