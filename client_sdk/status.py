"""What a device says of itself: words for people, and a state for apps. A callback that fails is the app's business alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pocketfed.client_sdk.link import log

OFTEN_S = 0.1  # progress is told at most so often, and always at the end


@dataclass(frozen=True)
class Progress:
    """How far the device is in a round. phase: downloading, training or uploading; fraction: 0 to 1 within it."""

    round: int
    phase: str
    fraction: float


@dataclass(frozen=True)
class State:
    """A device at one moment. waits_for: what is missing before it works, in words; release: the one in use, 0 for none."""

    status: str
    waits_for: tuple[str, ...]
    progress: Progress | None
    release: int
    artifact: str
    examples: int
    bytes_today: int
    last_error: str


class Voice:
    """Keeps the newest status and tells the app. Its callbacks may call anything of the device, `stop()` too."""

    def __init__(
        self, name: str, on_status: Callable[[str], None] | None, on_progress: Callable[[Progress], None] | None
    ) -> None:
        self._name, self._on_status, self._on_progress = name, on_status, on_progress
        self.status = "not started"
        self.waits_for: tuple[str, ...] = ()
        self.progress: Progress | None = None
        self.last_error = ""
        self._failed: set[str] = set()
        self._told_at = float("-inf")

    def say(self, status: str, waits_for: Iterable[str] = (), error: bool = False) -> None:
        status = "".join(c if c.isprintable() else " " for c in status)  # some of it the coordinator wrote
        self.waits_for = tuple(waits_for)
        if error:
            self.last_error = status
        if status != self.status:
            self.status = status
            log.info("%s: %s", self._name, status)
            self._call("on_status", self._on_status, status)

    def wait_for(self, words: Iterable[str], meanwhile: str = "") -> None:
        """
        >>> Voice("phone", print, None).wait_for(["a charger (it is not plugged in)"], "training is interrupted")
        training is interrupted; waits for a charger (it is not plugged in)
        """
        words = tuple(words)
        self.say(f"{meanwhile}; waits for {', '.join(words)}".removeprefix("; "), words)

    def tell(self, progress: Progress | None) -> None:
        last, self.progress = self.progress, progress
        if progress is None or self._on_progress is None:
            return
        another = last is None or (last.round, last.phase) != (progress.round, progress.phase)
        if another or progress.fraction >= 1 or time.monotonic() - self._told_at >= OFTEN_S:
            self._told_at = time.monotonic()
            self._call("on_progress", self._on_progress, progress)

    def _call(self, name: str, callback: Callable[[Any], None] | None, value: Any) -> None:
        if callback is None:
            return
        try:
            callback(value)
        except Exception as error:
            if name not in self._failed:  # once: it may fail at every step
                log.exception("the app's %s callback failed; it is called again, but that is not logged again", name)
            self._failed.add(name)
            self.last_error = f"the app's {name} callback failed: {type(error).__name__}"
