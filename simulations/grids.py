"""Grids that need no network: virtual devices in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime

from pocketfed.coordinator import flwr_compat  # noqa: F401 - first: it silences flwr before flwr is imported

# isort: split
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from pocketfed.client_sdk.errors import TrainingError
from pocketfed.coordinator.grid import FAILED, RecordedGrid
from pocketfed.coordinator.store import Assignment, Blob, Device, Store, Update, now


class InProcessGrid(RecordedGrid):
    """Virtual devices, one after another, in order of their names; replies stream: memory does not grow with the fleet.

    Args:
        app: what a device does; it finds its name in `context.node_config["device"]`.
        devices: node id -> name.
        artifact_bytes: what a device downloads before its first assignment, for the accounting.
    """

    def __init__(
        self, store: Store, run_id: int, app: ClientApp, devices: Mapping[int, str], artifact_bytes: int
    ) -> None:
        super().__init__(store, run_id)
        self.app, self.devices, self.artifact_bytes = app, dict(devices), artifact_bytes
        self._contexts: dict[int, Context] = {}
        self._hold_artifact: set[int] = set()

    def available(self) -> dict[int, str]:
        return {node: name for node, name in self.devices.items() if node not in self.set_aside}

    def wait_available(self, count: int, timeout_s: float, should_stop: Callable[[], bool]) -> dict[int, str]:
        return self.available()

    def replies(self, sent: Mapping[str, Message]) -> Iterator[Message]:
        for row_id, message in sent.items():
            begun = now()
            reply = self._run_device(message)
            self._record(row_id, reply, begun)
            yield reply

    def _run_device(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if node not in self._contexts:
            self._contexts[node] = Context(self.run_id, node, {"device": self.devices[node]}, RecordDict(), {})
        try:
            return self.app(message, self._contexts[node])
        except TrainingError as error:
            return Message(Error(FAILED, f"{type(error).__name__}: {error}"), reply_to=message)

    def _record(self, row_id: str, reply: Message, begun: datetime) -> None:
        """What the gRPC servicers would have written: the same rows, the same number of bytes."""
        with self.store.write() as session:
            row = session.get_one(Assignment, row_id)
            session.get_one(Device, row.device_id).last_seen_at = now()
            first = row.device_id not in self._hold_artifact
            self._hold_artifact.add(row.device_id)
            row.accepted_at = begun
            row.bytes_down = session.get_one(Blob, row.parameters).bytes + (self.artifact_bytes if first else 0)
            row.finished_at, row.progress = now(), 1.0
            if reply.has_error():
                row.status, row.error = "failed", str(reply.error.reason)[:500]
                return
            row.status = "uploaded"
            metrics = {k: v for k, v in reply.content["metrics"].items() if k != "num-examples"}
            update = reply.content.get("update", {"bytes": 0, "digest": ""})
            session.add(
                Update(
                    assignment_id=row_id,
                    num_examples=reply.content["metrics"]["num-examples"],
                    bytes=update["bytes"],
                    digest=update["digest"],
                    metrics=metrics,
                )
            )
