"""A Flower Grid whose nodes are our devices: messages become assignments in the store, updates become replies."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

import numpy as np
import sqlalchemy as sa

from pocketfed.coordinator import flwr_compat

# isort: split
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from sqlalchemy.orm import Session

from pocketfed.coordinator.aggregation import Delta
from pocketfed.coordinator.answers import offer_all
from pocketfed.coordinator.assignments import OPEN, Assignments
from pocketfed.coordinator.forms import Form, read_form
from pocketfed.coordinator.store import Artifact, Assignment, Device, Run, Store, Update, get_blob, now, put_blob
from pocketfed.coordinator.strategy import THETA, DeltaArray
from pocketfed.coordinator.strategy_base import arrays_of
from pocketfed.model.parameters import CONTROL, Vector, decode_vector, encode_start

UNREADABLE = 400  # Error.code of a reply whose update is not what it should be: quarantined
FAILED = 500  # Error.code of a device that gave up
LOOK_S = 1.0  # how often somebody who waits for devices looks whether to stop
RETURN_S = 60.0  # after a restart devices have so long to come back: they ask every 30 s at least
ROWS = 500  # answers read from the store at a time; SQLite takes 999 values in a query
NEVER = datetime(9999, 1, 1, tzinfo=UTC)
ENOUGH = "the round has all the updates it asked for"


class Stopped(RuntimeError):  # noqa: N818 - a request, not a fault
    """The wait for devices was ended from outside."""


def assignment_id(run_id: int, round_number: int, attempt: int, device_id: int, kind: str) -> str:
    return f"{run_id}-{round_number}-{attempt}-{device_id}-{kind}"


@dataclass
class Cohort:
    """Who takes part in a round: node id -> device name, in order of the names.

    enough: updates after which nobody is waited for any more, 0 for all.
    staleness_exponent: None, or the round is a buffer (FedBuff): `enough` updates make it, whatever parameters they are
        of, each weighted by its age.
    """

    round: int = 0
    attempt: int = 1
    devices: Mapping[int, str] = field(default_factory=dict)
    deadline_s: float | None = None
    enough: int = 0
    staleness_exponent: float | None = None

    @property
    def buffered(self) -> bool:
        return self.staleness_exponent is not None

    def staleness_weight(self, round_number: int) -> float:
        """What an update offered in that round counts now (Nguyen et al. 2022, section 5: (1 + age)^-0.5)."""
        return float((1 + self.round - round_number) ** -(self.staleness_exponent or 0.0))


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
        self._theta: Vector = np.zeros(0, np.float32)  # what the newest messages hold
        self._read: tuple[ArrayRecord, Vector] | None = None  # a message's arrays, and the theta in them
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

    def rest(self, failures: int) -> None:
        """After so many failures in a row: do not try again at once where that could fail as fast again."""

    def holds(self, update: Update) -> bool:
        """Whether an update that was counted can still be read: not if only a process that has ended knew it."""
        return False

    def capture(self) -> dict[str, Any]:
        """What devices hold that the store does not know, for a checkpoint; nothing where devices are somewhere else."""
        return {}

    def recall(self, held: Mapping[str, Any]) -> None:
        """Make it what `capture` said at the last commit; before `reopen`."""

    def reopen(self, deadline_s: float) -> None:
        """Devices are not to pay for the coordinator's absence: what is open gets its time anew.

        An update whose bytes are gone is asked for again.
        """
        with self.store.write() as session:
            mine = sa.select(Assignment).where(Assignment.run_id == self.run_id, Assignment.counted_in.is_(None))
            for row in session.scalars(
                mine.where(Assignment.status.in_((*OPEN, "uploaded"))).order_by(Assignment.id).with_for_update()
            ):
                update = session.get(Update, row.id)
                if update is not None:
                    if self.holds(update):
                        continue
                    session.delete(update)
                    row.status, row.error, row.finished_at = "offered", "its update was lost with the spool", None
                row.deadline = now() + timedelta(seconds=deadline_s)
                if self.offer_s is not None:
                    row.lease_until = now() + timedelta(seconds=max(self.offer_s, RETURN_S))

    def begin_again(self, under_way: Collection[str]) -> None:
        """Undo what was not committed, for devices that have gone with their process; `under_way` is asked for still."""
        mine = sa.select(Assignment).where(Assignment.run_id == self.run_id, Assignment.counted_in.is_(None))
        same = (
            "id",
            "run_id",
            "round",
            "attempt",
            "device_id",
            "kind",
            "config",
            "parameters",
            "deadline",
            "offered_at",
        )
        with self.store.write() as session:
            for row in session.scalars(mine).all():
                session.execute(sa.delete(Update).where(Update.assignment_id == row.id))
                session.delete(row)
                if row.id in under_way:
                    session.flush()
                    session.add(Assignment(**{name: getattr(row, name) for name in same}))

    def message_of(self, row_id: str) -> Message:
        """What an assignment asked for, once more."""
        with self.store.read() as session:
            row = session.get_one(Assignment, row_id)
            theta = decode_vector(THETA, get_blob(session, row.parameters), self._size(session))
        content = RecordDict({"arrays": arrays_of(theta), "config": ConfigRecord(dict(row.config))})
        kind = MessageType.TRAIN if row.kind == "train" else MessageType.EVALUATE
        return flwr_compat.name_message(self.create_message(content, kind, row.device_id, ""), row_id)

    def _size(self, session: Session) -> int:
        run = session.get_one(Run, self.run_id)
        manifest = session.get_one(Artifact, run.artifact_version).manifest
        return int(manifest["trainable_sets"][run.trainable_set]["size"])

    def took_part(self) -> set[int]:
        """Devices that have accepted something in a round that is committed."""
        mine = sa.select(Assignment.device_id).where(
            Assignment.run_id == self.run_id, Assignment.accepted_at.is_not(None)
        )
        with self.store.read() as session:
            return set(session.scalars(mine.where(Assignment.counted_in.is_not(None)).distinct()))

    def working(self) -> dict[int, str]:
        """Devices (node id -> name) that have an assignment of the run open."""
        mine = sa.select(Device.id, Device.name).join(Assignment, Assignment.device_id == Device.id)
        mine = mine.where(Assignment.run_id == self.run_id, Assignment.status.in_(OPEN), Assignment.kind == "train")
        with self.store.read() as session:
            return {row.id: row.name for row in session.execute(mine)}

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
        """Offer one assignment a message, all in one transaction; one that was offered before a restart is that one.

        Where rounds are buffered, a device that still works gets nothing new.
        """
        sent: dict[str, Message] = {}
        names = dict(self.cohort.devices or self.available())
        busy = self.working() if self.cohort.buffered else {}
        ordered = sorted(messages, key=lambda m: names[m.metadata.dst_node_id])
        self._read = None  # a strategy may have put other parameters into the same record
        offered: list[dict[str, Any]] = []
        with self.store.write() as session:
            known = self._known(session)
            digests: dict[int, str] = {}
            for message in ordered:
                self._theta = self._start(message)
                row_id = self._row_id(message)
                if row_id not in known:
                    if message.metadata.dst_node_id in busy:
                        continue
                    offered.append(self._offer(session, row_id, message, digests))
                sent[row_id] = flwr_compat.name_message(message, row_id)
            offer_all(session, offered)
        self._sent |= sent
        return list(sent)

    def _start(self, message: Message) -> Vector:
        """What a message asks to start from. Strategies share one record among all messages: its bytes are read once."""
        arrays = message.content["arrays"]
        if self._read is None or arrays is not self._read[0]:
            self._read = (arrays, arrays[THETA].numpy())
        return self._read[1]

    def _known(self, session: Session) -> set[str]:
        mine = sa.select(Assignment.id).where(Assignment.run_id == self.run_id, Assignment.round == self.cohort.round)
        return set(session.scalars(mine.where(Assignment.attempt == self.cohort.attempt)))

    def _row_id(self, message: Message) -> str:
        number, node = int(message.content["config"]["server-round"]), message.metadata.dst_node_id
        return assignment_id(self.run_id, number, self.cohort.attempt, node, _kind(message))

    def _offer(self, session: Session, row_id: str, message: Message, digests: dict[int, str]) -> dict[str, Any]:
        """The row of an assignment; the parameters it names are stored."""
        config = dict(message.content["config"].items())
        arrays = message.content["arrays"]
        if id(arrays) not in digests:  # strategies share one record among all messages
            control = arrays[CONTROL].numpy() if CONTROL in arrays else None
            digests[id(arrays)] = put_blob(session, encode_start(arrays[THETA].numpy(), control))
        at = now()
        return {
            "id": row_id,
            "run_id": self.run_id,
            "round": int(config["server-round"]),
            "attempt": self.cohort.attempt,
            "device_id": message.metadata.dst_node_id,
            "kind": _kind(message),
            "config": config,
            "parameters": digests[id(arrays)],
            "offered_at": at,
            "deadline": None if self.cohort.deadline_s is None else at + timedelta(seconds=self.cohort.deadline_s),
            "lease_until": None if self.offer_s is None else at + timedelta(seconds=self.offer_s),
        }

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return list(self.replies({i: self._sent[i] for i in message_ids}))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Replies as a generator: a strategy that folds them in holds one at a time."""
        if timeout is not None:
            self.cohort.deadline_s = timeout
        ids = list(self.push_messages(messages))
        return self.replies({i: self._sent[i] for i in ids})


def _kind(message: Message) -> str:
    return "train" if message.metadata.message_type == MessageType.TRAIN else "evaluate"


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
        self._forms: dict[Any, Form] = {}

    @cached_property
    def _described(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The run's configuration and its trainable set, as a manifest describes it."""
        with self.store.read() as session:
            run = session.get_one(Run, self.run_id)
            manifest = session.get_one(Artifact, run.artifact_version).manifest
        return run.config, manifest["trainable_sets"][run.trainable_set]

    def _form(self, asked: Mapping[str, Any]) -> Form:
        """What an update is, by its assignment's configuration."""
        key = (tuple(asked.get("update.frozen", ())), asked.get("update.lora_rank", 0))
        if key not in self._forms:
            self._forms[key] = read_form(*self._described, asked)
        return self._forms[key]

    def available(self) -> dict[int, str]:
        return {node: name for node, name in self._online().items() if node not in self.set_aside}

    def wait_available(self, count: int, timeout_s: float, should_stop: Callable[[], bool]) -> dict[int, str]:
        end, watch = _later(timeout_s), self.watch()
        while len(devices := self.available()) < count and now() < end and not should_stop():
            watch.wait(min(LOOK_S, max(0.0, _until(end))))
        return devices

    def watch(self) -> Watch:
        """What waits for devices to do something."""
        return Watch(self.assignments)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = super().push_messages(messages)
        self.assignments.notify_offered()
        return ids

    def announce_release(self) -> None:
        self.assignments.notify_offered()

    def rest(self, failures: int) -> None:
        end = _later(min(30.0, 0.5 * 2**failures))
        with self.assignments.changed:
            while now() < end and not self.should_stop():
                self.assignments.changed.wait(min(LOOK_S, max(0.0, _until(end))))

    def holds(self, update: Update) -> bool:
        return self.assignments.holds(update)

    def replies(self, sent: Mapping[str, Message]) -> Iterator[Message]:
        """Waits until assignments are settled, all or enough of them, then reads the updates from the spool one by one.

        Raises:
            Stopped: while waiting.
        """
        training = not any(_kind(message) == "evaluate" for message in sent.values())
        if training and self.cohort.buffered:
            yield from self._buffered_replies()
            return
        ids = list(sent)
        self._wait(ids, self.cohort.enough if training else 0)
        for low in range(0, len(ids), ROWS):
            asked = ids[low : low + ROWS]
            with self.store.read() as session:
                found = {row.id: row for row in session.execute(_ANSWERS.where(Assignment.id.in_(asked)))}
            for row_id in asked:
                reply = self._reply(found.get(row_id), sent[row_id])
                if reply is not None:
                    yield reply

    def _wait(self, ids: list[str], enough: int) -> None:
        mine = Assignment.id.in_(ids) if len(ids) < 1000 else Assignment.run_id == self.run_id
        wanted, watch = set(ids), self.watch()
        while True:
            if self.should_stop():
                raise Stopped("stopped before all devices had answered")
            rows = [row for row in self._look(mine) if row.id in wanted]
            still_open = [row for row in rows if row.status in OPEN]
            if not still_open:
                return
            missing = (enough or len(ids)) - sum(row.status == "uploaded" for row in rows)
            if missing <= 0:
                self.assignments.expire([row.id for row in still_open], ENOUGH)
                return
            watch.wait(_until_overdue(still_open, watch.look_s), missing)

    def _look(self, mine: sa.ColumnElement[bool]) -> list[Any]:
        """What is open or waits to be aggregated; what is overdue is closed first."""
        columns = (Assignment.id, Assignment.status, Assignment.lease_until, Assignment.deadline, Assignment.device_id)
        statement = sa.select(*columns).where(mine, Assignment.counted_in.is_(None))
        statement = statement.where(Assignment.status.in_((*OPEN, "uploaded")))
        for _ in range(2):
            with self.store.read() as session:
                rows = list(session.execute(statement))
            overdue = [row.id for row in rows if row.status in OPEN and _end(row) < now()]
            if not overdue:
                break
            self.assignments.expire(overdue)
        return rows

    # ---- buffered rounds ---------------------------------------------------------------------------------------------

    def _buffered_replies(self) -> Iterator[Message]:
        """The first `enough` updates that came in, whatever round they were asked for in, in order of device names.

        An update's difference is scaled by its age and laid on the parameters of now, so that any strategy can aggregate
        it (Nguyen et al. 2022, algorithm 1).
        """
        self._wait_buffer()
        first = _ANSWERS.where(Assignment.run_id == self.run_id, Assignment.counted_in.is_(None))
        first = first.where(Assignment.status == "uploaded", Assignment.kind == "train", Update.bytes.is_not(None))
        with self.store.read() as session:
            found = session.execute(first.order_by(Update.received_at, Assignment.id).limit(self.cohort.enough)).all()
        for row in sorted(found, key=lambda row: (row.device, row.round)):
            stub = Message(content=RecordDict(), message_type=MessageType.TRAIN, dst_node_id=row.device_id)
            weight = self.cohort.staleness_weight(row.round)
            reply = self._reply(row, flwr_compat.name_message(stub, row.id), self._theta, weight)
            if reply is not None:
                yield reply

    def _wait_buffer(self) -> None:
        end = NEVER if self.cohort.deadline_s is None else _later(self.cohort.deadline_s)
        watch = self.watch()
        mine = sa.and_(Assignment.run_id == self.run_id, Assignment.kind == "train")
        while True:
            if self.should_stop():
                raise Stopped("stopped before the buffer was full")
            rows = self._look(mine)
            still_open = [row for row in rows if row.status in OPEN]
            missing = self.cohort.enough - (len(rows) - len(still_open))
            if not still_open or missing <= 0 or now() > end:
                return
            watch.wait(_until_overdue(still_open, min(watch.look_s, max(0.01, _until(end)))), missing)

    # ---- one reply ---------------------------------------------------------------------------------------------------

    def _reply(self, row: Any, message: Message, theta: Vector | None = None, weight: float = 1.0) -> Message | None:
        """`row`: of _ANSWERS; `theta`: what the difference is laid on, if not on what the device was sent."""
        if row is None or row.status == "expired":
            return None
        if row.bytes is None:
            return Message(Error(FAILED, row.error or row.status), reply_to=message)
        metrics = MetricRecord({**row.metrics, "num-examples": row.num_examples})  # last: no metric takes its place
        if row.kind == "evaluate":
            return Message(RecordDict({"metrics": metrics}), reply_to=message)
        start = self._start(message) if theta is None else theta
        arrays, path = ArrayRecord(), self.assignments.upload_path(row.id)
        arrays[THETA] = DeltaArray(start, Delta(path, self.size, weight, self._form(row.config)))
        content = {
            "arrays": arrays,
            "metrics": metrics,
            "update": ConfigRecord({"bytes": row.bytes, "digest": row.digest}),
        }
        return Message(RecordDict(content), reply_to=message)


# What a reply is made of, in one query for many; no `bytes` where there is no update. Columns: rows, not objects.
_ANSWERS = (
    sa.select(Assignment.id, Assignment.device_id, Assignment.round, Assignment.kind, Assignment.status)
    .add_columns(Assignment.error, Assignment.config, Device.name.label("device"))
    .add_columns(Update.num_examples, Update.bytes, Update.digest, Update.metrics)
    .join(Device, Device.id == Assignment.device_id)
    .outerjoin(Update, Update.assignment_id == Assignment.id)
)


class Watch:
    """Looking at the database again whenever something has changed, but for at most a fifth of the time.

    Without the latter a cohort of thousands, each of whose answers is a change, would be looked at thousands of times.
    """

    look_s = LOOK_S  # it is looked again after so long whatever happens

    def __init__(self, assignments: Assignments) -> None:
        self._assignments = assignments
        self._begin()

    def _begin(self) -> None:
        self._since, self._began = self._assignments.changes, time.monotonic()

    def wait(self, at_most_s: float, answers: int = 1) -> None:
        """Until something has changed since the last look began. `answers`: fewer than so many do not end the wait for good."""
        rested_at = time.monotonic() + 4 * (time.monotonic() - self._began)
        self._assignments.wait_changed(self._since, at_most_s)
        time.sleep(min(LOOK_S, max(0.0, rested_at - time.monotonic())))
        self._begin()


def _later(seconds: float) -> datetime:
    return now() + timedelta(seconds=seconds)


def _until(moment: datetime) -> float:
    """Seconds."""
    return (moment - now()).total_seconds()


def _until_overdue(still_open: list[Any], at_most_s: float) -> float:
    """Seconds until the next of these is overdue."""
    seconds = _until(min(map(_end, still_open))) + 0.01
    return min(at_most_s, max(0.01, seconds))


def _end(row: Any) -> datetime:
    """When an open assignment is overdue."""
    return min((moment for moment in (row.lease_until, row.deadline) if moment is not None), default=NEVER)
