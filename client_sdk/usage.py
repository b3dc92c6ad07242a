"""What a device has used up: bytes over the network today, and when its last round ended. It outlives the process."""

from __future__ import annotations

import math
import threading
from pathlib import Path

from pocketfed.client_sdk.clock import Clock
from pocketfed.client_sdk.home import read_json, write_json
from pocketfed.client_sdk.link import log

SAVE_EVERY_BYTES = 1 << 20  # what a kill may make it forget


class Usage:
    """Counts messages as they are sent and received, without the network's own framing. Safe to use from several threads."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path, self._clock, self._lock = path, clock, threading.Lock()
        told = read_json(path)
        self._day = str(told.get("day", ""))
        self._bytes = _whole(told.get("bytes"))
        self._round_at = float(_whole(told.get("round_at")))
        self._unsaved = 0

    def add(self, count: int) -> None:
        with self._lock:
            self._turn_the_day()
            self._bytes += count
            self._unsaved += count
            if self._unsaved >= SAVE_EVERY_BYTES:
                self._save()

    def bytes_today(self) -> int:
        with self._lock:
            self._turn_the_day()
            return self._bytes

    def end_round(self) -> None:
        with self._lock:
            self._round_at = self._clock.now().timestamp()
            self._save()

    def since_round_s(self) -> float:
        """Seconds; endless before the first round. A clock that was set back counts from now."""
        with self._lock:
            now = self._clock.now().timestamp()
            if self._round_at > now:
                self._round_at = now
            return now - self._round_at if self._round_at else math.inf

    def save(self) -> None:
        with self._lock:
            self._save()

    def _turn_the_day(self) -> None:
        today = self._clock.now().date().isoformat()
        if today != self._day:
            self._day, self._bytes = today, 0

    def _save(self) -> None:
        self._unsaved = 0
        try:
            write_json(self._path, {"day": self._day, "bytes": self._bytes, "round_at": int(self._round_at)})
        except OSError as error:  # a full disk: it counts on in memory
            log.info("cannot note what was used: %s", error)


def _whole(value: object) -> int:
    return value if isinstance(value, int) and value >= 0 else 0
