"""Grids that need no network: virtual devices in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from typing import Any

import numpy as np

from pocketfed.coordinator import flwr_compat  # noqa: F401 - first: it silences flwr before flwr is imported

# isort: split
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from pocketfed.client_sdk.errors import TrainingError
from pocketfed.client_sdk.flower_app import KEPT
from pocketfed.coordinator.aggregation import Delta
from pocketfed.coordinator.grid import ENOUGH, FAILED, RecordedGrid
from pocketfed.coordinator.store import Assignment, Blob, Device, Store, Update, now
from pocketfed.coordinator.strategy import THETA, DeltaArray
from pocketfed.coordinator.validation import check_form
from pocketfed.model.parameters import Vector

KINDS: Mapping[str, Any] = {kind.__name__: kind for kind in (ConfigRecord, MetricRecord)}


def random_duration(device: str, round_number: int) -> float:
    """Exponential with mean 1, the same whenever it is asked for."""
    seed = int.from_bytes(sha256(f"{device} {round_number}".encode()).digest()[:8], "little")
    return float(np.random.default_rng(seed).exponential())


class InProcessGrid(RecordedGrid):
    """Virtual devices, one after another, in order of their names; replies stream: memory does not grow with the fleet.

    Args:
        app: what a device does; it finds its name in `context.node_config["device"]`.
        devices: node id -> name.
        artifact_bytes: what a device downloads before its first assignment, for the accounting.
        duration: how long (device, round) takes where rounds are buffered, in any unit.
    """

    def __init__(
        self,
        store: Store,
        run_id: int,
        app: ClientApp,
        devices: Mapping[int, str],
        artifact_bytes: int,
        duration: Callable[[str, int], float] = random_duration,
    ) -> None:
        super().__init__(store, run_id)
        self.duration, self._clock = duration, 0.0
        self._ends: dict[str, tuple[float, Message, int]] = {}  # buffered: what is under way, and when it ends
        self.app, self.devices, self.artifact_bytes = app, dict(devices), artifact_bytes
        self._contexts: dict[int, Context] = {}
        self._hold_artifact: set[int] = set()
        self.remembers = True  # what stays on devices goes into every checkpoint: for nothing where nobody comes back

    def available(self) -> dict[int, str]:
        return {node: name for node, name in self.devices.items() if node not in self.set_aside}

    def wait_available(self, count: int, timeout_s: float, should_stop: Callable[[], bool]) -> dict[int, str]:
        return self.available()

    def replies(self, sent: Mapping[str, Message]) -> Iterator[Message]:
        if self.cohort.buffered and all(m.metadata.message_type == MessageType.TRAIN for m in sent.values()):
            yield from self._buffered_replies(sent)
            return
        enough, answered = self.cohort.enough or len(sent), 0
        for place, (row_id, message) in enumerate(sent.items()):
            if answered == enough:
                self._close(list(sent)[place:])
                return
            begun = now()
            reply = self._run_device(message)
            self._record(row_id, reply, begun)
            answered += not reply.has_error()
            yield reply

    def work(self, messages: Sequence[Message]) -> Iterator[Message]:
        """What devices answer, in the order asked. A backend says here where the work is done."""
        for message in messages:
            yield self._run_device(message)

    def _buffered_replies(self, sent: Mapping[str, Message]) -> Iterator[Message]:
        """The `enough` devices that are done first on a clock of our own, in order of their names (FedBuff)."""
        for row_id, message in sent.items():
            if row_id not in self._ends:
                name = self.devices[message.metadata.dst_node_id]
                self._ends[row_id] = (self._clock + self.duration(name, self.cohort.round), message, self.cohort.round)
        first = sorted(self._ends, key=lambda row_id: (self._ends[row_id][0], row_id))[: self.cohort.enough]
        for row_id in sorted(first, key=lambda row_id: self.devices[self._ends[row_id][1].metadata.dst_node_id]):
            end, message, asked_in = self._ends.pop(row_id)
            self._clock = max(self._clock, end)
            begun = now()
            reply = self._run_device(message)
            self._record(row_id, reply, begun)
            if not reply.has_error() and asked_in != self.cohort.round:
                weight = self.cohort.staleness_weight(asked_in)
                reply.content["arrays"] = _laid_on(self._theta, message, reply.content["arrays"], weight)
            yield reply

    # ---- going on where another process was left ---------------------------------------------------------------------------

    def capture(self) -> dict[str, Any]:
        """What stays on the devices (residuals, private values), and where rounds are buffered, what is under way."""
        states = {str(node): _filled(context.state) for node, context in self._contexts.items() if self.remembers}
        held = {node: state for node, state in states.items() if state}
        ends = {row_id: [end, asked_in] for row_id, (end, _, asked_in) in self._ends.items()}
        return ({"states": held} if held else {}) | ({"clock": self._clock, "ends": ends} if ends else {})

    def recall(self, held: Mapping[str, Any]) -> None:
        for node, records in held.get("states", {}).items():
            self._context(int(node)).state = RecordDict(
                {name: v if isinstance(v, ArrayRecord) else KINDS[kind](v) for name, (kind, v) in records.items()}
            )
        self._clock = held.get("clock", 0.0)
        for row_id, (end, asked_in) in held.get("ends", {}).items():
            self._ends[row_id] = (end, self.message_of(row_id), asked_in)
        self._hold_artifact = self.took_part()

    def reopen(self, deadline_s: float) -> None:
        self.begin_again(self._ends)

    def private_of(self, node: int) -> Vector:
        """The values that a device keeps to itself, as it left them; none where all is shared."""
        if node not in self._contexts or KEPT not in self._contexts[node].state:
            return np.zeros(0, np.float32)
        values: Vector = self._contexts[node].state[KEPT]["private"].numpy()
        return values

    def _close(self, row_ids: Sequence[str]) -> None:
        with self.store.write() as session:
            for row_id in row_ids:
                row = session.get_one(Assignment, row_id)
                row.status, row.error, row.finished_at = "expired", ENOUGH, now()

    def _run_device(self, message: Message) -> Message:
        try:
            return self.app(message, self._context(message.metadata.dst_node_id))
        except TrainingError as error:
            return Message(Error(FAILED, f"{type(error).__name__}: {error}"), reply_to=message)

    def _context(self, node: int) -> Context:
        if node not in self._contexts:
            self._contexts[node] = Context(self.run_id, node, {"device": self.devices[node]}, RecordDict(), {})
        return self._contexts[node]

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


def _filled(state: RecordDict) -> dict[str, tuple[str, Any]]:
    """A device's records, but those without a value: name -> kind and values."""
    found: dict[str, tuple[str, Any]] = {}
    for name, record in state.items():
        is_arrays = isinstance(record, ArrayRecord)
        if any(array.numpy().size for array in record.values()) if is_arrays else len(record):
            found[name] = (type(record).__name__, record if is_arrays else dict(record))
    return found


def _laid_on(theta: Vector, asked: Message, trained: ArrayRecord, weight: float) -> ArrayRecord:
    """The difference of an older round's update, weighted, on the parameters of now; unchanged where it has no such form."""
    if check_form({name: array.numpy() for name, array in trained.items()}, THETA, theta.size) is not None:
        return trained  # for the screen to refuse
    exact = getattr(trained[THETA], "delta", None)
    delta = trained[THETA].numpy() - asked.content["arrays"][THETA].numpy() if exact is None else exact
    record = ArrayRecord()
    record[THETA] = DeltaArray(theta, Delta(delta, theta.size, weight))
    return record
