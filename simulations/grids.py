"""Grids that need no network: virtual devices in this process, and which grid a simulation's backend is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from pocketfed.coordinator import flwr_compat  # noqa: F401 - first: it silences flwr before flwr is imported

# isort: split
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from pocketfed.client_sdk.errors import TrainingError
from pocketfed.client_sdk.flower_app import KEPT, make_client_app
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples
from pocketfed.coordinator.aggregation import Delta
from pocketfed.coordinator.answers import Answer, write_answers
from pocketfed.coordinator.grid import ENOUGH, FAILED, RecordedGrid
from pocketfed.coordinator.store import Assignment, Store, now
from pocketfed.coordinator.strategy import THETA, DeltaArray
from pocketfed.coordinator.validation import check_form
from pocketfed.model.parameters import Vector
from pocketfed.simulations.backends import parse_backend
from pocketfed.simulations.device_states import DeviceStates
from pocketfed.simulations.resuming import Stopwatch

KINDS: Mapping[str, Any] = {kind.__name__: kind for kind in (ConfigRecord, MetricRecord)}
BUNCH = 256  # answers written in one transaction
BUNCH_BYTES = 16 << 20  # that they may hold meanwhile
BUNCH_S = 1.0  # or what has come in so long: the dashboard shows a round while it happens


@dataclass(frozen=True)
class DeviceMaterial:
    """What virtual devices are made of.

    Args:
        trainer: of the artifact and trainable set; its cache holds what the frozen part made of a text, for all devices.
        examples: of all devices together. parts: device's name -> which of them are its own.
        scratch: a folder for what a backend has to put down; it may be deleted after the run.
    """

    trainer: PlanTrainer
    examples: Examples
    parts: Mapping[str, Sequence[int]]
    scratch: Path

    def local(self, context: Context) -> tuple[str, Examples]:
        """A device's name and examples, made when they are asked for: ten thousand devices hold nothing while they wait."""
        name = str(context.node_config["device"])
        return name, self.examples.take(self.parts[name])

    def app(self) -> ClientApp:
        """What every device runs."""
        return make_client_app(lambda: self.trainer, self.local, seeded_noise=True)

    @property
    def artifact_bytes(self) -> int:
        return self.trainer.artifact.manifest.bytes


def make_grid(
    backend: str, store: Store, run_id: int, devices: Mapping[int, str], material: DeviceMaterial
) -> InProcessGrid:
    """The grid of one of `backends.BACKENDS`; whoever asked for it closes it.

    Raises:
        BackendError: no such backend, or something that it needs is not installed.
    """
    kind, count = parse_backend(backend)
    if kind == "batched":
        from pocketfed.simulations.batched import BatchedGrid

        return BatchedGrid(store, run_id, devices, material)
    if kind == "processes":
        from pocketfed.simulations.processes import PoolGrid

        return PoolGrid(store, run_id, devices, material, count)
    if kind == "ray":
        from pocketfed.simulations.flower_ray import RayGrid

        return RayGrid(store, run_id, devices, material, count)
    return InProcessGrid(store, run_id, material.app(), devices, material.artifact_bytes)


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
        self._touched: set[int] = set()  # nodes that were given something since the last checkpoint
        self.remembers = (
            True  # what stays on devices is kept with every checkpoint: for nothing where nobody comes back
        )
        self.states: DeviceStates | None = None  # where; if nowhere, within the checkpoint
        self.stopwatch: Stopwatch | None = None  # kept with every checkpoint, where rounds' own seconds are a fleet's

    def available(self) -> dict[int, str]:
        return {node: name for node, name in self.devices.items() if node not in self.set_aside}

    def wait_available(self, count: int, timeout_s: float, should_stop: Callable[[], bool]) -> dict[int, str]:
        return self.available()

    def replies(self, sent: Mapping[str, Message]) -> Iterator[Message]:
        if self.cohort.buffered and all(m.metadata.message_type == MessageType.TRAIN for m in sent.values()):
            yield from self._buffered_replies(sent)
            return
        left, missing = list(sent.items()), self.cohort.enough or len(sent)
        while left and missing:  # so many are surely needed: whoever is asked one by one gives no other result
            asked, left = left[:missing], left[missing:]
            for reply in self._recorded(asked):
                missing -= not reply.has_error()
                yield reply
        self._close([row_id for row_id, _ in left])

    def work(self, messages: Sequence[Message]) -> Iterator[Message]:
        """What devices answer, in the order asked. A backend says here where the work is done."""
        for message in messages:
            yield self._run_device(message)

    def close(self) -> None:
        """Let go of what the devices ran in."""
        if self.states is not None:
            self.states.close()

    def _recorded(self, asked: Sequence[tuple[str, Message]]) -> Iterator[Message]:
        """The replies, each in the store before it is given; many in one transaction."""
        most = max(1, min(BUNCH, BUNCH_BYTES // max(1, self._theta.nbytes)))
        bunch: list[tuple[Answer, Message]] = []
        begun, written = now(), time.monotonic()
        answering = self.work([message for _, message in asked])
        try:
            for (row_id, message), reply in zip(asked, answering, strict=True):
                bunch.append((self._answer(row_id, message, reply, begun), reply))
                if len(bunch) >= most or time.monotonic() - written > BUNCH_S:
                    full, bunch = bunch, []
                    yield from self._write(full)
                    written = time.monotonic()
                begun = now()
        finally:  # also what was answered before something broke
            rest = self._write(bunch)
        yield from rest

    def _write(self, bunch: Sequence[tuple[Answer, Message]]) -> list[Message]:
        if bunch:
            with self.store.write() as session:
                write_answers(session, [answer for answer, _ in bunch])
        return [reply for _, reply in bunch]

    def _buffered_replies(self, sent: Mapping[str, Message]) -> Iterator[Message]:
        """The `enough` devices that are done first on a clock of our own, in order of their names (FedBuff)."""
        for row_id, message in sent.items():
            if row_id not in self._ends:
                name = self.devices[message.metadata.dst_node_id]
                self._ends[row_id] = (self._clock + self.duration(name, self.cohort.round), message, self.cohort.round)
        first = sorted(self._ends, key=lambda row_id: (self._ends[row_id][0], row_id))[: self.cohort.enough]
        first.sort(key=lambda row_id: self.devices[self._ends[row_id][1].metadata.dst_node_id])
        due = {row_id: self._ends.pop(row_id) for row_id in first}
        self._clock = max([self._clock, *(end for end, _, _ in due.values())])
        asked = [(row_id, message) for row_id, (_, message, _) in due.items()]
        for (_, message, asked_in), reply in zip(due.values(), self._recorded(asked), strict=True):
            if not reply.has_error() and asked_in != self.cohort.round:
                weight = self.cohort.staleness_weight(asked_in)
                reply.content["arrays"] = _laid_on(self._theta, message, reply.content["arrays"], weight)
            yield reply

    # ---- going on where another process was left ---------------------------------------------------------------------------

    def capture(self) -> dict[str, Any]:
        """What stays on the devices (residuals, private values), and where rounds are buffered, what is under way."""
        held: dict[str, Any] = {}
        if self.remembers and self.states is not None:
            self.states.write({node: _filled(self._contexts[node].state) for node in sorted(self._touched)})
            held = {"kept": dict(self.states.named)} if self.states.named else {}
        elif self.remembers:
            states = {str(node): _filled(context.state) for node, context in self._contexts.items()}
            filled = {node: state for node, state in states.items() if state}
            held = {"states": filled} if filled else {}
        self._touched = set()
        held |= {"wall_s": self.stopwatch.seconds} if self.stopwatch is not None else {}
        ends = {row_id: [end, asked_in] for row_id, (end, _, asked_in) in self._ends.items()}
        return held | ({"clock": self._clock, "ends": ends} if ends else {})

    def recall(self, held: Mapping[str, Any]) -> None:
        beside = self.states.recall(held.get("kept", {})) if self.states is not None else ()
        within = {int(node): records for node, records in held.get("states", {}).items()}
        self._touched = set(within)
        for node, records in (*beside, *within.items()):
            self._context(node).state = RecordDict(
                {name: v if isinstance(v, ArrayRecord) else KINDS[kind](v) for name, (kind, v) in records.items()}
            )
        self._clock = held.get("clock", 0.0)
        if self.stopwatch is not None:
            self.stopwatch.before = held.get("wall_s", 0.0)
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
        if not row_ids:
            return
        with self.store.write() as session:
            for row_id in row_ids:
                row = session.get_one(Assignment, row_id)
                row.status, row.error, row.finished_at = "expired", ENOUGH, now()

    def _run_device(self, message: Message) -> Message:
        return answer_of(self.app, message, self.context_of(message))

    def context_of(self, message: Message) -> Context:
        """Of the device that a message is for: what stays there from round to round."""
        self._touched.add(message.metadata.dst_node_id)
        return self._context(message.metadata.dst_node_id)

    def _context(self, node: int) -> Context:
        if node not in self._contexts:
            self._contexts[node] = Context(self.run_id, node, {"device": self.devices[node]}, RecordDict(), {})
        return self._contexts[node]

    def _answer(self, row_id: str, message: Message, reply: Message, begun: datetime) -> Answer:
        node = message.metadata.dst_node_id
        artifact = 0 if node in self._hold_artifact else self.artifact_bytes
        self._hold_artifact.add(node)
        if reply.has_error():
            return Answer(row_id, node, begun, now(), artifact, str(reply.error.reason)[:500])
        metrics = dict(reply.content["metrics"].items())
        told = {"num_examples": metrics.pop("num-examples"), "metrics": metrics}
        update = reply.content.get("update", {"bytes": 0, "digest": ""})
        told |= {"bytes": update["bytes"], "digest": update["digest"]}
        return Answer(row_id, node, begun, now(), artifact, None, told)


def answer_of(app: Callable[[Message, Context], Message], message: Message, context: Context) -> Message:
    """What an app answers; a device that cannot do its part says so."""
    try:
        return app(message, context)
    except TrainingError as error:
        return failed(message, error)


def failed(message: Message, error: TrainingError) -> Message:
    return Message(Error(FAILED, f"{type(error).__name__}: {error}"), reply_to=message)


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
