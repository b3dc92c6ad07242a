"""Heartbeats: while a device works on an assignment the coordinator hears of it, and says when to stop."""

from __future__ import annotations

import threading

from pocketfed.client_sdk.errors import PocketfedError, TrainingStopped
from pocketfed.client_sdk.link import Cancelled, Link, Unreachable, log
from pocketfed.protos import fleet_pb2 as fleet

LONGEST_WAIT_S = 3600.0  # whatever the coordinator says
SHORTEST_BEAT_S = 0.1


def bounded(seconds: float, low: float, high: float) -> float:
    """What a coordinator says, as a time that can be waited for; `low` for NaN."""
    return min(high, max(low, seconds))


class Alive:
    """Sends heartbeats for an assignment while the device works on it, and hears when to stop."""

    def __init__(self, link: Link, assignment: fleet.Assignment, stopping: threading.Event) -> None:
        self.phase = fleet.HeartbeatRequest.DOWNLOADING
        self.cancelled = False
        self._link, self._assignment, self._stopping = link, assignment, stopping
        self._progress = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pocketfed-heartbeat", daemon=True)

    def __enter__(self) -> Alive:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def tell(self, progress: float) -> None:
        self._progress = progress

    def go_on(self, progress: float) -> None:
        """As `tell`, for what has no `should_stop` of its own."""
        self.tell(progress)
        if self.should_stop():
            raise TrainingStopped("stopped while the model was fetched; the download goes on where it was")

    def should_stop(self) -> bool:
        return self.cancelled or self._stopping.is_set()

    def _beat(self) -> None:
        while not self._done.wait(bounded(self._assignment.lease_s / 3, SHORTEST_BEAT_S, LONGEST_WAIT_S)):
            try:
                if not self._link.heartbeat(self._assignment.id, self.phase, self._progress):
                    self.cancelled = True
                    return
            except (Unreachable, Cancelled):
                continue  # the lease decides
            except PocketfedError as error:
                log.info("heartbeat refused: %s", error)
                self.cancelled = True
                return
