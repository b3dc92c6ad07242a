"""Heartbeats: while a device works on an assignment the coordinator hears of it, and says when to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pocketfed.client_sdk.errors import PocketfedError, TrainingStopped
from pocketfed.client_sdk.link import Cancelled, Link, Unreachable, log
from pocketfed.client_sdk.status import Progress
from pocketfed.protos import fleet_pb2 as fleet

LONGEST_WAIT_S = 3600.0  # whatever the coordinator says
SHORTEST_BEAT_S = 0.1


def bounded(seconds: float, low: float, high: float) -> float:
    """What a coordinator says, as a time that can be waited for; `low` for NaN."""
    return min(high, max(low, seconds))


class Alive:
    """Sends heartbeats for an assignment while the device works on it, and knows when to stop.

    Args:
        may_compute, may_transfer: whether the device's conditions hold, asked before every step and every piece of a transfer.
        listener: told how far the work is.
    """

    def __init__(
        self,
        link: Link,
        assignment: fleet.Assignment,
        stopping: threading.Event,
        may_compute: Callable[[], bool],
        may_transfer: Callable[[], bool],
        listener: Callable[[Progress], None],
    ) -> None:
        self.phase = fleet.HeartbeatRequest.DOWNLOADING
        self.cancelled = False
        self._link, self._assignment, self._stopping = link, assignment, stopping
        self._may_compute, self._may_transfer, self._listener = may_compute, may_transfer, listener
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
        phase = fleet.HeartbeatRequest.Phase.Name(self.phase).lower()
        self._listener(Progress(self._assignment.round, phase, progress))

    def go_on(self, progress: float) -> None:
        """As `tell`, for what is fetched."""
        self.tell(progress)
        if not self.may_transfer():
            raise TrainingStopped("stopped while the model was fetched; the download goes on where it was")

    def ended(self) -> bool:
        """By the coordinator or by the app."""
        return self.cancelled or self._stopping.is_set()

    def should_stop(self) -> bool:
        return self.ended() or not self._may_compute()

    def may_transfer(self) -> bool:
        return not self.ended() and self._may_transfer()

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
