"""The coordinator's own grid, with devices of a fleet in the place of real ones, on a clock that only they move."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from pocketfed.coordinator.arrivals import ended, newly_expired, open_until
from pocketfed.coordinator.assignments import Assignments, portions
from pocketfed.coordinator.config import RunConfig
from pocketfed.coordinator.forms import Form
from pocketfed.coordinator.grid import NEVER, FleetGrid, Stopped, Watch
from pocketfed.coordinator.progress import RoundResult, begin_attempt, find_place
from pocketfed.coordinator.store import Assignment, Blob, Device, Store, Update, now
from pocketfed.coordinator.strategy import THETA
from pocketfed.coordinator.validation import check_form
from pocketfed.model.codecs import parse_codec
from pocketfed.model.parameters import Split, encode_vector
from pocketfed.simulations.books import PRIVATE, attempt_of, book
from pocketfed.simulations.costs import FleetWork
from pocketfed.simulations.fleet import FORWARD, PHASES, Fleet, Journey, Work, travel
from pocketfed.simulations.whereabouts import Whereabouts

START = datetime(2024, 1, 1, tzinfo=UTC)  # a Monday; every fleet begins then, so that all dates are reproducible
DOING = {"download": "downloading", "training": "training", "upload": "uploading"}
UNCOUNTED = -1  # the number of what no round has counted
Messages = Mapping[str, Any]  # assignment id -> what the device is asked


class VirtualClock:
    """`s` seconds of fleet time since START; for `store.by_clock`."""

    def __init__(self) -> None:
        self.s = 0.0

    def now(self) -> datetime:
        return self.at(self.s)

    def at(self, seconds: float) -> datetime:
        return START + timedelta(seconds=seconds)

    def seconds(self, moment: datetime) -> float:
        return (moment - START).total_seconds()


class VirtualWatch(Watch):
    """Who waits moves the clock, to the next thing that a device does."""

    look_s = math.inf

    def __init__(self, advance: Callable[[float, float], None]) -> None:
        self._advance = advance

    def wait(self, at_most_s: float, answers: int = 1) -> None:
        self._advance(at_most_s, answers)


@dataclass(frozen=True)
class Demand:
    """What devices train on, by name: the tokens of an epoch, and the examples."""

    tokens: Mapping[str, int]
    examples: Mapping[str, int]


class Computing(Protocol):
    """A grid that can work for devices: one of those in grids.py."""

    store: Store
    run_id: int
    devices: dict[int, str]  # node id -> name
    artifact_bytes: int
    remembers: bool  # somebody may go on with the run

    def work(self, messages: Sequence[Any]) -> Iterable[Any]:
        """What devices reply to messages, in their order."""

    def capture(self) -> dict[str, Any]: ...

    def recall(self, held: Mapping[str, Any]) -> None: ...


@dataclass(order=True)
class _Event:
    """At `at` a device comes for its assignment, or has done with it."""

    at: float
    device: str
    row_id: str
    comes: bool = field(compare=False)


class VirtualGrid(FleetGrid):
    """Who is there, and when an answer comes, is the fleet's; whom to wait for, and until when, is decided by FleetGrid.

    Only what arrives in time is computed, in order of its arrival. To be used within `by_clock(grid.clock)`.

    Args:
        computing: has the devices, of which the i-th name, in order, is the fleet's i-th device, and does their work.
    """

    def __init__(
        self,
        computing: Computing,
        spool: Path,
        fleet: Fleet,
        size: int,
        demand: Demand,
        clock: VirtualClock,
        run: RunConfig,
    ) -> None:
        super().__init__(Assignments(computing.store, spool), computing.run_id, dict, size, run.lease_s)
        self.computing, self.fleet, self.demand, self.clock = computing, fleet, demand, clock
        self.devices, self.seed, self.lease_s = dict(computing.devices), run.seed, run.lease_s
        ordered = sorted(self.devices, key=lambda node: self.devices[node])
        self._profiles = dict(zip(ordered, fleet.devices, strict=True))
        self._where = Whereabouts(self._profiles, fleet.rules)
        self._hold_artifact: set[int] = set()
        self._asked: dict[str, Any] = {}  # messages under way
        self._journeys: dict[str, Journey] = {}
        self._events: list[_Event] = []
        self._bytes: dict[str, int] = {}  # of parameters by digest
        self._books: dict[int, dict[str, Any]] = {}  # of rounds that have ended: what `told` says

    def _form(self, asked: Mapping[str, Any]) -> Form:
        """What lies in the spool: differences as a coordinator has decoded them, whatever form they travel in."""
        return Form(parse_codec("float32"), Split(self.size))

    # ---- who is there ------------------------------------------------------------------------------------------------

    def available(self) -> dict[int, str]:
        there = (node for node in self.devices if node not in self.set_aside and self._next_there(node) <= self.clock.s)
        return {node: self.devices[node] for node in there}

    def wait_available(self, count: int, timeout_s: float, should_stop: Callable[[], bool]) -> dict[int, str]:
        """Time goes on to the first moment at which so many are there at once."""
        end = self.clock.s + timeout_s
        while len(devices := self.available()) < count and self.clock.s < end and not should_stop():
            coming = sorted(self._next_there(node) for node in self.devices if node not in self.set_aside)
            # Before the last of so many has come there cannot be so many; then some may have gone again.
            moment = coming[count - 1] if count <= len(coming) else math.inf
            self.advance(min(moment, end) - self.clock.s, math.inf)
        return devices

    def _next_there(self, node: int) -> float:
        return self._where.next_there(node, self.clock.s)

    # ---- asking ------------------------------------------------------------------------------------------------------

    def push_messages(self, messages: Iterable[Any]) -> Iterable[str]:
        ids = list(super().push_messages(messages))
        nodes = {row_id: self._sent[row_id].metadata.dst_node_id for row_id in ids}
        for row_id in ids:
            if row_id in self._asked or row_id in self._journeys:
                continue
            node = nodes[row_id]
            self._asked[row_id] = self._sent[row_id]
            if self._dice(row_id)[0] < self.fleet.rules.dropout.download:  # it never comes for its assignment
                lost = dict.fromkeys(PHASES, 0.0)
                self._journeys[row_id] = Journey(self.clock.s, self.clock.s, lost, "download", True)
                self._where.lose(node, self.clock.s)
                continue
            at = self._next_there(node)
            if at < math.inf:
                heapq.heappush(self._events, _Event(at, self.devices[node], row_id, comes=True))
        return ids

    def _dice(self, row_id: str) -> Sequence[float]:
        """Four uniform numbers that the run's seed, the round, the attempt and the device's name decide, and nothing else."""
        message = self._asked[row_id]
        place = (message.content["config"]["server-round"], attempt_of(row_id), message.metadata.message_type)
        text = f"{self.seed} {place} {self.devices[message.metadata.dst_node_id]}"
        digest = sha256(text.encode()).digest()
        return [int.from_bytes(digest[i : i + 8], "little") / 2**64 for i in range(0, 32, 8)]

    def _come(self, events: Sequence[_Event]) -> None:
        """Devices take their assignments, as over gRPC; how each fares from here on is settled now."""
        nodes = {self._asked[e.row_id].metadata.dst_node_id for e in events if e.row_id in self._asked}
        with self.store.write() as session:
            taken: dict[int, Assignment] = {}
            for some in portions(sorted(nodes), 500):
                taken |= self.assignments.take(session, some, self.lease_s, self.run_id)
            for node, row in taken.items():
                journey = self._set_out(session, node, row)
                self._journeys[row.id] = journey
                session.get_one(Device, node).last_seen_at = now()
                row.bytes_down = journey.downloaded(journey.end)
                # Heartbeats come until the end, whatever it is.
                row.lease_until = self.clock.at(journey.end + self.lease_s)
                if not journey.silent:
                    heapq.heappush(self._events, _Event(journey.end, self.devices[node], row.id, comes=False))

    def _set_out(self, session: Any, node: int, row: Assignment) -> Journey:
        profile, name, at = self._profiles[node], self.devices[node], self.clock.s
        if row.parameters not in self._bytes:
            self._bytes[row.parameters] = session.get_one(Blob, row.parameters).bytes
        artifact = 0 if node in self._hold_artifact else self.computing.artifact_bytes
        trains = row.kind == "train"
        up = super()._form(row.config).most_bytes if trains else 0
        work = Work(artifact + self._bytes[row.parameters], self._tokens(name, row.config, trains), up, artifact)
        journey = self._where.set_out(node, travel(profile, work, at, self.fleet.rules.dropout, self._dice(row.id)[1:]))
        if journey.downloaded(journey.end) >= artifact:
            self._hold_artifact.add(node)
        return journey

    def _tokens(self, name: str, config: Mapping[str, Any], trains: bool) -> float:
        """How many go through the model, in units of training."""
        if not trains:
            return self.demand.tokens[name] * FORWARD
        steps = max(1, math.ceil(self.demand.examples[name] / int(config["batch_size"])) * int(config["epochs"]))
        share = min(1.0, int(config["max_steps"]) / steps) if config.get("max_steps") else 1.0
        return self.demand.tokens[name] * int(config["epochs"]) * share

    # ---- waiting -----------------------------------------------------------------------------------------------------

    def watch(self) -> Watch:
        return VirtualWatch(self.advance)

    def rest(self, failures: int) -> None:
        self.advance(min(30.0, 0.5 * 2**failures), math.inf)

    def advance(self, at_most_s: float, answers: float) -> None:
        """Time goes on by so much; but where answers are waited for, only to the moment at which they, or all that can come,
        have come, or a device has given up: then whoever waits has something to look at.

        Raises:
            Stopped: on the way.
        """
        end, waited_for = self.clock.s + at_most_s, answers < math.inf
        happened = gone = False
        while answers > 0 and self._events and self._events[0].at <= end and not (waited_for and gone):
            if self.should_stop():
                raise Stopped("stopped before all devices had answered")
            happened, gone = True, False
            if self._events[0].comes:
                self.clock.s = max(self.clock.s, self._events[0].at)
                self._come(self._pop(lambda event: event.comes and event.at <= self.clock.s))
            else:
                came, gone = self._end(end, answers)
                answers -= came
        if end < math.inf and not (happened and waited_for):
            self.clock.s = max(self.clock.s, end)

    def _pop(self, wanted: Callable[[_Event], bool]) -> list[_Event]:
        popped: list[_Event] = []
        while self._events and wanted(self._events[0]):
            popped.append(heapq.heappop(self._events))
        return popped

    def _end(self, end: float, answers: float) -> tuple[int, bool]:
        """Devices are done with their assignments: at most so many answers. How many have come, and whether one gave up."""
        due: list[_Event] = []
        coming = 0
        while self._events and not self._events[0].comes and self._events[0].at <= end and coming < answers:
            event = heapq.heappop(self._events)
            if event.row_id in self._journeys:  # else its round is over and done with
                due.append(event)
                coming += not self._journeys[event.row_id].lost
        due = self._in_time(due)
        arriving = [event.row_id for event in due if not self._journeys[event.row_id].lost]
        arrived = self._compute(arriving)
        with self.store.write() as session:
            for event in due:
                self.clock.s = max(self.clock.s, event.at)
                row = session.get_one(Assignment, event.row_id)
                session.get_one(Device, row.device_id).last_seen_at = row.finished_at = now()
                told = arrived.get(event.row_id) or _gone(self._journeys[event.row_id])
                if isinstance(told, str):
                    row.status, row.error = "failed", told
                else:
                    row.status, row.progress = "uploaded", 1.0
                    session.add(told)
                session.flush()  # its history is of this moment
        came = sum(isinstance(told, Update) for told in arrived.values())
        return came, came < len(due)

    def _in_time(self, due: Sequence[_Event]) -> list[_Event]:
        """Those that are still waited for; what comes after the deadline is not, also before anybody has closed it."""
        ends = open_until(self.store, [event.row_id for event in due])
        return [e for e in due if e.row_id in ends and self.clock.at(e.at) <= (ends[e.row_id] or NEVER)]

    def _compute(self, row_ids: Sequence[str]) -> dict[str, Update | str]:
        """What devices have made of their assignments: updates in the spool and rows for them, or why there is none."""
        made: dict[str, Update | str] = {}
        messages = [self._asked.pop(row_id) for row_id in row_ids]
        for row_id, message, reply in zip(row_ids, messages, self.computing.work(messages), strict=True):
            if self.should_stop():
                raise Stopped("stopped before all devices had answered")
            if reply.has_error():
                made[row_id] = str(reply.error.reason)[:500]
                continue
            metrics = dict(reply.content["metrics"])
            update = reply.content.get("update", {"bytes": 0, "digest": ""})
            if "arrays" in reply.content:
                self.assignments.upload_path(row_id).write_bytes(self._spooled(message, reply))
            examples = metrics.pop("num-examples")
            made[row_id] = Update(
                assignment_id=row_id,
                num_examples=examples,
                bytes=update["bytes"],
                digest=update["digest"],
                metrics=metrics,
            )
        return made

    def _spooled(self, message: Any, reply: Any) -> bytes:
        """The difference; nothing, which the screen refuses, where the reply has no such form."""
        trained = reply.content["arrays"]
        if check_form({name: array.numpy() for name, array in trained.items()}, THETA, self.size) is not None:
            return b""
        exact = getattr(trained[THETA], "delta", None)
        return encode_vector("delta", trained[THETA].numpy() - self._start(message) if exact is None else exact)

    # ---- the books ---------------------------------------------------------------------------------------------------

    def replies(self, sent: Messages) -> Iterator[Any]:
        yield from super().replies(sent)
        self._stop_told()

    def _stop_told(self) -> None:
        """Assignments that were closed while devices were at them end there."""
        with self.store.write() as session:
            for row in newly_expired(session, self.run_id):
                self._cut(row)

    def _cut(self, row: Assignment) -> None:
        """A device that was told to stop has done, and downloaded, only so much; then it is there as before."""
        journey = self._journeys.get(row.id)
        if journey is None or row.finished_at is None or row.accepted_at is None:
            return
        at = self.clock.seconds(row.finished_at)
        journey = self._journeys[row.id] = self._where.stop(row.device_id, journey, at)
        row.phase, row.bytes_down = DOING[journey.phase(at)], journey.downloaded(at)
        if row.bytes_down < journey.artifact_bytes:
            self._hold_artifact.discard(row.device_id)

    @property
    def worked(self) -> FleetWork:
        """What the run has cost so far; once it has ended (`finish`), all of it."""
        training_s, device_s, joules = (
            float(sum(booked.get(name, 0.0) for booked in self._books.values()))
            for name in ("training_s", "device_s", "joules")
        )
        watts = {device.tier: device.watts for device in self._profiles.values()}
        return FleetWork(training_s, device_s, joules, self.clock.s, dict(sorted(watts.items())))

    def told(self, result: RoundResult) -> RoundResult:
        """With what a round took on the clock, cost the devices, and lost of their work."""
        self._book(result.number, result.number)
        told = {name: value for name, value in self._books[result.number].items() if name not in PRIVATE}
        return dataclasses.replace(result, **told)

    def finish(self) -> None:
        """The run has ended: what was still under way cost something, too."""
        self._stop_told()
        self._book(UNCOUNTED, None)

    def _book(self, name: int, counted_in: int | None) -> None:
        if name in self._books:
            return
        rows = ended(self.store, self.run_id, counted_in)
        passed = self.clock.s - sum(booked["virtual_s"] for booked in self._books.values())
        self._books[name] = {"virtual_s": round(passed, 6), **book(rows, self._journeys, self._profiles)}
        for row in rows:
            self._asked.pop(row.id, None)
            self._journeys.pop(row.id, None)

    # ---- going on where another process was left ---------------------------------------------------------------------

    def capture(self) -> dict[str, Any]:
        self._where.forget(self.clock.s)
        if not self.computing.remembers:
            return {}
        state = {
            **self._where.capture(),
            "s": self.clock.s,
            "holds": sorted(self._hold_artifact),
            "journeys": {row_id: dataclasses.asdict(journey) for row_id, journey in self._journeys.items()},
            "coming": [[event.at, event.device, event.row_id] for event in self._events if event.comes],
            "books": self._books,
        }
        return {**self.computing.capture(), "virtual": state}

    def recall(self, held: Mapping[str, Any]) -> None:
        self.computing.recall(held)
        state = held.get("virtual")
        if state is None:
            return
        self._where.recall(state)
        self.clock.s, self._books, self._hold_artifact = state["s"], state["books"], set(state["holds"])
        self._journeys = {row_id: Journey(**journey) for row_id, journey in state["journeys"].items()}
        self._events = [_Event(at, device, row_id, comes=True) for at, device, row_id in state["coming"]]

    def reopen(self, deadline_s: float) -> None:
        """All is as it was when the last attempt had been committed; what came after it happens again."""
        self.begin_again({*self._journeys, *(event.row_id for event in self._events)})
        under_way = open_until(self.store, [*self._journeys, *(event.row_id for event in self._events)])
        with self.store.write() as session:
            for row_id in under_way:
                row = session.get_one(Assignment, row_id)
                self._asked[row_id] = self.message_of(row_id)
                row.lease_until = row.offered_at + timedelta(seconds=self.lease_s)
                journey = self._journeys.get(row_id)
                if journey is None or (journey.lost == "download" and journey.silent):
                    continue
                row.status, row.accepted_at = "accepted", self.clock.at(journey.begin)
                row.bytes_down = journey.downloaded(journey.end)
                row.lease_until = self.clock.at(journey.end + self.lease_s)
                if not journey.silent:
                    self._events.append(_Event(journey.end, self.devices[row.device_id], row_id, comes=False))
        self._events = [event for event in self._events if event.row_id in under_way]
        heapq.heapify(self._events)
        place = find_place(self.store, self.run_id)
        if place.cohort is not None:  # sampled, but when time had gone on: it is sampled again, the same
            begin_attempt(self.store, self.run_id, place.number, [])
        failures = place.attempt - 1 or place.failed_in_a_row
        if failures:
            self.rest(failures)
        if place.number > 0 and place.attempt == 1:
            self._book(place.number - 1, place.number - 1)


def _gone(journey: Journey) -> str:
    return f"the device's conditions ended while it was {DOING[journey.lost]}"
