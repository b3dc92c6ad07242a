"""A Flower Grid whose nodes are our devices: messages become assignments in the store, updates become replies."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from pocketfed.coordinator import flwr_compat

# isort: split
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from sqlalchemy.orm import Session

from pocketfed.coordinator.aggregation import Delta
from pocketfed.coordinator.assignments import OPEN, Assignments
from pocketfed.coordinator.store import Assignment, Store, Update, now, put_blob
from pocketfed.coordinator.strategy import THETA, DeltaArray
from pocketfed.model.parameters import encode_vector

UNREADABLE = 400  # Error.code of a reply whose update is not what it should be: quarantined
FAILED = 500  # Error.code of a device that gave up
LOOK_S = 1.0  # how often somebody who waits for devices looks whether to stop


class Stopped(RuntimeError):  # noqa: N818 - a request, not a fault
    """The wait for devices was ended from outside."""


def assignment_id(run_id: int, round_number: int, attempt: int, device_id: int, kind: str) -> str:
    return f"{run_id}-{round_number}-{attempt}-{device_id}-{kind}"


@dataclass
class Cohort:
    """Who takes part in a round: node id -> device name, in order of the names."""

    round: int = 0
    attempt: int = 1
    devices: Mapping[int, str] = field(default_factory=dict)
    deadline_s: float | None = None


class RecordedGrid(Grid):  # type: ignore[misc]
    """Writes every message as an assignment. Subclasses get the replies.

    Between `enter()` calls the grid shows exactly the cohort, so that any strategy works on the devices sampled.
    """

    def __init__(self, store: Store, run_id: int) -> None:
        self.store, self.run_id = store, run_id
        self.cohort = Cohort()
        self.set_aside: set[int] = set()  # nodes that are not asked any more
        self.offer_s: float | None = None  # an assignment that nobody accepts within this long expires
        self.should_stop: Callable[[], bool] = lambda: False  # asked while replies are awaited
        self._sent: dict[str, Message] = {}
        flwr_compat.enter_run(run_id)

    @abstractmethod
    def replies(self, sent: Mapping[str, Message]) -> Iterator[Message]:
        """The replies to sent messages (assignment id -> message), in their order, as they become available."""

    @abstractmethod
    def available(self) -> dict[int, str]:
        """Devices (node id -> name) that could take part now."""

    @abstractmethod
    def wait_available(self, count: int, timeout_s: float, should_stop: Callable[[], bool]) -> dict[int, str]:
        """As `available`, once there are `count` of them or the time is up."""

    def enter(self, cohort: Cohort) -> None:
        self.cohort = cohort
        self._sent = {}

    def announce_release(self) -> None:
        """Something new is released: devices may hear of it."""

    # ---- Flower's interface ------------------------------------------------------------------------------------------

    def set_run(self, run: Any) -> None:
        """A run of Flower's servers; ours is in the store."""

    @property
    def run(self) -> Any:
        return self.run_id

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content=content, message_type=message_type, dst_node_id=dst_node_id, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.cohort.devices or self.available())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Offer one assignment a message, all in one transaction."""
        sent: dict[str, Message] = {}
        names = dict(self.cohort.devices or self.available())
        ordered = sorted(messages, key=lambda m: names[m.metadata.dst_node_id])
        with self.store.write() as session:
            digests: dict[int, str] = {}
            for message in ordered:
                row = self._offer(session, message, digests)
                sent[row.id] = flwr_compat.name_message(message, row.id)
        self._sent |= sent
        return list(sent)

    def _offer(self, session: Session, message: Message, digests: dict[int, str]) -> Assignment:
        config = dict(message.content["config"])
        arrays = message.content["arrays"]
        if id(arrays) not in digests:  # strategies share one record among all messages
            digests[id(arrays)] = put_blob(session, encode_vector(THETA, arrays[THETA].numpy()))
        kind = "train" if message.metadata.message_type == MessageType.TRAIN else "evaluate"
        round_number = int(config["server-round"])
        node = message.metadata.dst_node_id
        row = Assignment(
            id=assignment_id(self.run_id, round_number, self.cohort.attempt, node, kind),
            run_id=self.run_id,
            round=round_number,
            attempt=self.cohort.attempt,
            device_id=node,
            kind=kind,
            config=config,
            parameters=digests[id(arrays)],
        )
        if self.cohort.deadline_s is not None:
            row.deadline = now() + timedelta(seconds=self.cohort.deadline_s)
        if self.offer_s is not None:
            row.lease_until = now() + timedelta(seconds=self.offer_s)
        session.add(row)
        return row

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return list(self.replies({i: self._sent[i] for i in message_ids}))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Replies as a generator: a strategy that folds them in holds one at a time."""
        if timeout is not None:
            self.cohort.deadline_s = timeout
        ids = list(self.push_messages(messages))
        return self.replies({i: self._sent[i] for i in ids})


class FleetGrid(RecordedGrid):
    """The devices that check in over gRPC.

    Args:
        online: says which devices there are now (node id -> name).
    """

    def __init__(
        self, assignments: Assignments, run_id: int, online: Callable[[], Mapping[int, str]], size: int, lease_s: float
    ) -> None:
        super().__init__(assignments.store, run_id)
        self.offer_s = lease_s
        self.assignments, self.size, self._online = assignments, size, online

    def available(self) -> dict[int, str]:
        return {node: name for node, name in self._online().items() if node not in self.set_aside}

    def wait_available(self, count: int, timeout_s: float, should_stop: Callable[[], bool]) -> dict[int, str]:
        end = time.monotonic() + timeout_s
        with self.assignments.changed:
            while len(devices := self.available()) < count and time.monotonic() < end and not should_stop():
                self.assignments.changed.wait(min(LOOK_S, max(0.0, end - time.monotonic())))
        return devices

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = super().push_messages(messages)
        self.assignments.notify_offered()
        return ids

    def announce_release(self) -> None:
        self.assignments.notify_offered()

    def replies(self, sent: Mapping[str, Message]) -> Iterator[Message]:
        """Waits until every assignment is settled, then reads the updates from the spool one by one.

        Raises:
            Stopped: while waiting.
        """
        self._wait(list(sent))
        for row_id, message in sent.items():
            reply = self._reply(row_id, message)
            if reply is not None:
                yield reply

    def _wait(self, ids: list[str]) -> None:
        while True:
            if self.should_stop():
                raise Stopped("stopped before all devices had answered")
            with self.assignments.changed:
                self.assignments.expire(ids)
                with self.store.read() as session:
                    rows = session.execute(
                        sa.select(Assignment.lease_until, Assignment.deadline).where(
                            Assignment.id.in_(ids), Assignment.status.in_(OPEN)
                        )
                    ).all()
                if not rows:
                    return
                ends = [moment for row in rows for moment in row if moment is not None]
                seconds = (min(ends) - now()).total_seconds() + 0.01 if ends else LOOK_S
                self.assignments.changed.wait(min(LOOK_S, max(0.01, seconds)))

    def _reply(self, row_id: str, message: Message) -> Message | None:
        with self.store.read() as session:
            row, update = session.get(Assignment, row_id), session.get(Update, row_id)
        if row is None or row.status == "expired":
            return None
        if update is None:
            return Message(Error(FAILED, row.error or row.status), reply_to=message)
        metrics = MetricRecord(
            {**update.metrics, "num-examples": update.num_examples}
        )  # last: no metric takes its place
        if row.kind == "evaluate":
            return Message(RecordDict({"metrics": metrics}), reply_to=message)
        theta = message.content["arrays"][THETA].numpy()
        arrays = ArrayRecord()
        arrays[THETA] = DeltaArray(theta, Delta(self.assignments.upload_path(row_id), self.size))
        content = {
            "arrays": arrays,
            "metrics": metrics,
            "update": ConfigRecord({"bytes": update.bytes, "digest": update.digest}),
        }
        return Message(RecordDict(content), reply_to=message)
