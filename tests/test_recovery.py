"""What a run survives, fault by fault: whoever goes on with it from its store ends with the bits of a run undisturbed."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.flower_app import make_client_app
from pocketfed.client_sdk.plan_trainer import PlanTrainer

# isort: split
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict

from pocketfed.coordinator.artifacts import BuiltArtifact, publish_artifact
from pocketfed.coordinator.assignments import Assignments, Header, Receipt, UploadError
from pocketfed.coordinator.config import LocalTraining, RunConfig, RunConfigError
from pocketfed.coordinator.grid import Cohort, FleetGrid
from pocketfed.coordinator.leadership import Deposed, Leadership
from pocketfed.coordinator.progress import (
    RoundResult,
    RunError,
    begin_attempt,
    create_run,
    results_of,
    unfinished_runs,
)
from pocketfed.coordinator.rounds import drive_run, local_config
from pocketfed.coordinator.screening import Tally, screen
from pocketfed.coordinator.standing import recall
from pocketfed.coordinator.store import (
    Assignment,
    Blob,
    Checkpoint,
    Device,
    History,
    Round,
    Run,
    Store,
    StoreError,
    Update,
    device_named,
    now,
)
from pocketfed.coordinator.strategy import make_strategy, strategy_names
from pocketfed.coordinator.validation import Limits
from pocketfed.model.parameters import Vector, encode_vector
from pocketfed.model.tasks import Dataset
from pocketfed.simulations.grids import InProcessGrid
from pocketfed.simulations.run import encode_examples

LOCAL = LocalTraining(batch_size=4, learning_rate=0.01, max_length=32)
OPTIONS: dict[str, dict[str, Any]] = {
    "QFedAvg": {"client_learning_rate": 0.01, "train_loss_key": "loss"},
    "FedAvgM": {"server_momentum": 0.9, "server_learning_rate": 0.5},
    "FedAdam": {"eta": 0.01, "beta_1": 0.9, "beta_2": 0.99},
    "FedYogi": {"eta": 0.01, "beta_1": 0.9, "beta_2": 0.99},
    "FedAdagrad": {"eta": 0.01},
    "FedProx": {"proximal_mu": 0.1},
}


class Killed(BaseException):
    """As a signal that nobody catches: not even the run hears of it."""


class Fleet:
    """Virtual devices of 12 examples each, training the head of the nano student, or another set."""

    def __init__(
        self,
        database: str,
        built: BuiltArtifact,
        artifact: Artifact,
        dataset: Dataset,
        count: int,
        trainable_set: str = "head",
    ) -> None:
        self.store, self.trainer = Store(database), PlanTrainer(artifact, trainable_set)
        everything = encode_examples(self.trainer, dataset.train, 32)
        self.local = {f"device-{i}": everything.take(range(8 * i, 8 * i + 8)) for i in range(count)}
        with self.store.write() as session:
            publish_artifact(session, built, "stable", trainable_set)
            self.nodes = {device_named(session, name).id: name for name in self.local}
        self.inner = make_client_app(lambda: self.trainer, self.examples_of)
        self.on_call: Callable[[str, Message], Message | None] = lambda name, reply: None

    def examples_of(self, context: Context) -> Any:
        name = str(context.node_config["device"])
        return name, self.local[name]

    def call(self, message: Message, context: Context) -> Message:
        reply = self.inner(message, context)
        return self.on_call(self.nodes[message.metadata.dst_node_id], reply) or reply

    def create(self, **settings: Any) -> int:
        given = {"min_devices": 1, "rounds": 3, "seed": 3, "release": False, "local": LOCAL}
        self.config = RunConfig(**(given | settings))
        return create_run(self.store, self.config)

    def go_on(self, run_id: int, on_round: Callable[[RoundResult], None] = lambda result: None) -> Vector:
        """As a coordinator that has just been started: nothing but the store is known."""
        grid = InProcessGrid(self.store, run_id, self.call, self.nodes, 0)
        return drive_run(self.store, run_id, grid, self.config, on_round=on_round)

    def rows(self, table: Any, run_id: int) -> list[Any]:
        with self.store.read() as session:
            return list(
                session.scalars(sa.select(table).where(table.run_id == run_id).order_by(*sa.inspect(table).primary_key))
            )


@pytest.fixture
def fleet(database: str, nano_built: BuiltArtifact, nano_artifact: Artifact, tiny_dataset: Dataset) -> Iterator[Fleet]:
    made = Fleet(database, nano_built, nano_artifact, tiny_dataset, count=6)
    yield made
    made.store.close()


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed writes nothing of its end."""
    monkeypatch.setattr("pocketfed.coordinator.rounds.give_up", lambda *_: [])
    monkeypatch.setattr("pocketfed.coordinator.rounds.interrupt_run", lambda *_: None)


# ---- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in strategy_names() if "LoRA" not in name and name != "Scaffold"])
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_fault_01_every_strategy_goes_on_as_if_it_had_never_stopped(fleet: Fleet, killed: None, name: str) -> None:
    """Killed in the middle of every round, each time to be resumed by a new strategy object."""
    goes_on(fleet, {"strategy": name, "strategy_options": OPTIONS.get(name, {})})


@pytest.mark.parametrize("name", ["FFALoRA", "RoLoRA", "ExactLoRA"])
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_fault_01_every_federation_of_lora_goes_on_as_if_it_had_never_stopped(
    database: str,
    nano_built: BuiltArtifact,
    nano_artifact: Artifact,
    tiny_dataset: Dataset,
    killed: None,
    name: str,
) -> None:
    fleet = Fleet(database, nano_built, nano_artifact, tiny_dataset, 6, "lora:4")
    goes_on(fleet, {"strategy": name})
    fleet.store.close()


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_fault_01_a_control_variate_survives_the_coordinator(fleet: Fleet, killed: None) -> None:
    """Devices keep their own as real ones do (test_scaffold.py): what they make of it counts once their update was taken."""
    before: dict[tuple[int, int], Any] = {}  # (node, round) -> what was kept when that round was first asked for
    last: dict[int, Any] = {}
    inner = fleet.inner

    def keeping(message: Message, context: Context) -> Message:
        node, number = message.metadata.dst_node_id, int(message.content["config"]["server-round"])
        kept = before.setdefault((node, number), last.get(node))
        context.state = RecordDict({"kept": kept} if kept is not None else {})
        reply = inner(message, context)
        last[node] = context.state["kept"]
        return reply

    def as_new() -> None:
        before.clear()
        last.clear()

    fleet.inner = keeping
    goes_on(fleet, {"strategy": "Scaffold", "local": SGD}, as_new)
    assert all(record["control"].numpy().any() for record in last.values())


SGD = LocalTraining(batch_size=4, learning_rate=0.05, max_length=32, optimizer="sgd")


def goes_on(fleet: Fleet, settings: dict[str, Any], new_devices: Callable[[], Any] = lambda: None) -> None:
    """Killed in the middle of every round; ends with the bits of a run undisturbed. new_devices: for each of the runs."""
    undisturbed = fleet.go_on(fleet.create(**settings))
    new_devices()
    run_id = fleet.create(**settings)
    calls = []

    def kill(name: str, reply: Message) -> None:
        calls.append(name)
        if len(calls) in (3, 12, 20):
            raise Killed

    fleet.on_call = kill
    for _ in range(3):
        with pytest.raises(Killed):
            fleet.go_on(run_id)
        assert unfinished_runs(fleet.store) == [run_id]
    assert fleet.go_on(run_id).tobytes() == undisturbed.tobytes()
    assert [(r.number, r.status, r.devices) for r in results_of(fleet.store, run_id)][1:] == [
        (n, "finished", 6) for n in (1, 2, 3)
    ]


def test_the_checkpoint_is_one_blob_however_many_rounds(fleet: Fleet) -> None:
    run_id = fleet.create(strategy="FedAdam", rounds=4)
    held = []

    def count(_: RoundResult) -> None:
        with fleet.store.read() as session:
            held.append(session.scalar(sa.select(sa.func.count()).select_from(Blob)))

    fleet.go_on(run_id, count)
    (kept,) = fleet.rows(Checkpoint, run_id)
    assert kept.round == 4
    assert np.diff(held[1:]).tolist() == [1, 1, 1]  # the round's parameters; the checkpoint takes the last one's place


def test_a_failed_attempt_leaves_the_strategys_state_as_it_was(fleet: Fleet) -> None:
    """Without a trace of the failed attempt the result is that of the rounds that went well."""
    settings = {"strategy": "FedAdam", "strategy_options": OPTIONS["FedAdam"], "quorum": 6}
    undisturbed = fleet.go_on(fleet.create(**settings))
    broken = iter([True])

    def lose_one(name: str, reply: Message) -> Message | None:
        if name == "device-3" and next(broken, False):
            reply.content["arrays"] = ArrayRecord({"theta": Array(np.full(fleet.trainer.size, np.nan, np.float32))})
            return reply
        return None

    fleet.on_call = lose_one
    run_id = fleet.create(**settings)
    assert fleet.go_on(run_id).tobytes() == undisturbed.tobytes()
    first = fleet.rows(Round, run_id)[1]
    assert (first.status, first.attempt, first.devices, first.failed) == ("finished", 2, 6, 1)
    statuses = [(a.attempt, a.status) for a in fleet.rows(Assignment, run_id) if a.round == 1]
    assert sorted(set(statuses)) == [(1, "discarded"), (1, "quarantined"), (2, "aggregated")]
    said = [
        (h.attempt, h.status, h.reason) for h in fleet.rows(History, run_id) if h.round == 1 and not h.assignment_id
    ]
    assert said == [
        (1, "running", None),
        (2, "running", "attempt 1 failed: 5 of at least 6 updates were usable"),
        (2, "finished", None),
    ]


def test_the_history_tells_every_step_in_order(fleet: Fleet) -> None:
    run_id = fleet.create(rounds=1)
    fleet.go_on(run_id)
    entries = fleet.rows(History, run_id)
    assert [(e.round, e.status) for e in entries if not e.assignment_id] == [
        (None, "waiting"),
        (None, "running"),
        (0, "finished"),
        (1, "running"),
        (1, "finished"),
        (None, "finished"),
    ]
    one = [e.status for e in entries if e.assignment_id == f"{run_id}-1-1-1-train"]
    assert one == ["offered", "uploaded", "aggregated"]


def test_what_cannot_follow_is_refused(fleet: Fleet) -> None:
    run_id = fleet.create(rounds=1)
    fleet.go_on(run_id)
    with pytest.raises(StoreError, match=rf"run {run_id} is finished and cannot become running"):
        fleet.go_on(run_id)
    with pytest.raises(StoreError, match=r"is aggregated and cannot become offered"), fleet.store.write() as session:
        session.scalars(sa.select(Assignment).limit(1)).one().status = "offered"


# ---- uploads ---------------------------------------------------------------------------------------------------------


class Inbox:
    """A round open for all devices, and what hands in for them."""

    def __init__(self, fleet: Fleet, spool: Path, number: int = 1, seed: int = 0) -> None:
        self.store, self.assignments = fleet.store, Assignments(fleet.store, spool)
        self.run_id = fleet.create()
        self.offer(fleet, number, seed)

    def offer(self, fleet: Fleet, number: int, seed: int) -> None:
        theta = encode_vector("theta", np.full(fleet.trainer.size, seed, np.float32))
        from pocketfed.coordinator.store import put_blob

        with self.store.write() as session:
            digest = put_blob(session, theta)
            for node in fleet.nodes:
                row = Assignment(run_id=self.run_id, round=number, device_id=node, kind="train", config={})
                row.id, row.parameters, row.deadline = self.name(number, node), digest, now() + timedelta(seconds=60)
                session.add(row)

    def name(self, number: int, node: int) -> str:
        return f"{self.run_id}-{number}-1-{node}-train"

    def hand_in(self, number: int, node: int, data: bytes, speaker: int | None = None) -> Receipt:
        header = Header(self.name(number, node), len(data), hashlib.sha256(data).hexdigest(), 0, 5, {})
        known = self.assignments.check_header(speaker or node, header, 1 << 20)
        if known is not None:
            return known
        self.assignments.append(header, data)
        return self.assignments.finish(speaker or node, header)

    def count(self) -> int:
        with self.store.read() as session:
            return session.scalar(sa.select(sa.func.count()).select_from(Update)) or 0


def test_fault_03_an_update_sent_twice_is_one_row_and_the_same_receipt(fleet: Fleet, tmp_path: Path) -> None:
    inbox = Inbox(fleet, tmp_path / "spool")
    assert [inbox.hand_in(1, 1, b"delta") for _ in range(3)] == [Receipt(True)] * 3
    assert inbox.count() == 1
    assert inbox.assignments.received(1, inbox.name(1, 1)) == (0, Receipt(True))


def test_fault_04_an_update_replayed_in_a_later_round_or_by_another_device_is_stale_or_foreign(
    fleet: Fleet, tmp_path: Path
) -> None:
    inbox = Inbox(fleet, tmp_path / "spool")
    assert inbox.hand_in(1, 1, b"delta of round 1").accepted
    inbox.offer(fleet, number=2, seed=1)
    for node in (1, 2):  # of the same device, and copied by another
        receipt = inbox.hand_in(2, node, b"delta of round 1")
        assert not receipt.accepted
        assert receipt.reason.startswith("STALE_OR_FOREIGN")
    for _ in range(3):
        with pytest.raises(UploadError, match="this device holds no assignment"):
            inbox.hand_in(2, 3, b"another delta", speaker=4)
    assert inbox.count() == 1
    with fleet.store.read() as session:
        audited = session.execute(
            sa.select(History.assignment_id, History.status, History.reason)
            .where(History.reason.startswith("STALE_OR_FOREIGN"))
            .order_by(History.id)
        ).all()
    digest = hashlib.sha256(b"delta of round 1").hexdigest()
    assert [tuple(row) for row in audited] == [
        (inbox.name(2, 1), "failed", f"STALE_OR_FOREIGN: {digest}"),
        (inbox.name(2, 2), "failed", f"STALE_OR_FOREIGN: {digest}"),
        (inbox.name(2, 3), "refused", "STALE_OR_FOREIGN: device 4 spoke for another one"),
    ]


def test_the_same_bytes_of_the_same_parameters_are_no_replay(fleet: Fleet, tmp_path: Path) -> None:
    """A round that is tried again, or a run repeated, makes honest devices send what they sent before."""
    first, again = Inbox(fleet, tmp_path / "a"), Inbox(fleet, tmp_path / "b")
    assert first.hand_in(1, 1, b"delta").accepted
    assert again.hand_in(1, 1, b"delta").accepted


def test_fault_05_a_late_update_is_refused_with_what_to_do(fleet: Fleet, tmp_path: Path) -> None:
    inbox = Inbox(fleet, tmp_path / "spool")
    with fleet.store.write() as session:
        session.execute(sa.update(Assignment).values(deadline=now() - timedelta(seconds=1)))
    receipt = inbox.hand_in(1, 1, b"delta")
    assert receipt == Receipt(False, "too late: the round's deadline has passed; check in for the next")
    assert inbox.count() == 0


# ---- rounds that go wrong --------------------------------------------------------------------------------------------


def test_fault_11_when_all_devices_drop_the_run_ends_with_its_reason_after_bounded_tries(
    fleet: Fleet, tmp_path: Path
) -> None:
    """2 attempts at each of 2 rounds: four times every device is asked, and nobody answers in time."""
    assignments = Assignments(fleet.store, tmp_path / "spool")
    run_id = fleet.create(rounds=9, max_attempts=2, max_failed_rounds=2, deadline_s=0.2)
    grid = FleetGrid(assignments, run_id, lambda: fleet.nodes, fleet.trainer.size, lease_s=60.0)
    rests: list[int] = []
    grid.rest = rests.append  # type: ignore[method-assign]
    with pytest.raises(
        RunError, match="2 rounds failed in a row, the last because 0 of at least 1 updates were usable"
    ):
        drive_run(fleet.store, run_id, grid, fleet.config)
    with fleet.store.read() as session:
        run = session.get_one(Run, run_id)
        assert (run.status, run.reason) == (
            "failed",
            "2 rounds failed in a row, the last because 0 of at least 1 updates were usable",
        )
    parts = fleet.rows(Assignment, run_id)
    assert len(parts) == 4 * 6
    assert {(a.status, a.error) for a in parts} == {("expired", "the round's deadline has passed")}
    assert rests == [1, 1, 1, 2]  # it pauses after every failure: no busy loop


@pytest.mark.parametrize("kind", ["sync", "fedbuff"])
def test_fault_12_thirty_percent_dropout_at_every_phase_and_a_slow_tail_do_not_hold_up_the_round(
    fleet: Fleet, tmp_path: Path, kind: str
) -> None:
    """Of 60 devices asked for 30 updates a round, some never come, some leave in training or half way through their upload,
    and some would need ten times as long as the round may take."""
    with fleet.store.write() as session:
        nodes = {device_named(session, f"phone-{i:02d}", examples=5).id: f"phone-{i:02d}" for i in range(60)}
    assignments = Assignments(fleet.store, tmp_path / "spool")
    settings: dict[str, Any] = {"cohort": 30, "over_selection": 1.0}
    if kind == "fedbuff":
        settings = {"mode": "fedbuff", "cohort": 60, "buffer": 30}
    run_id = fleet.create(rounds=3, min_devices=60, deadline_s=20.0, **settings)
    grid = FleetGrid(assignments, run_id, lambda: nodes, fleet.trainer.size, lease_s=20.0)
    asked = threading.Semaphore(0)
    assignments.on_offer.append(asked.release)
    done = threading.Event()

    def work() -> None:
        """What the phones do with each offer, drawn for each: gone, leaves, breaks off, slow, or well."""
        draw = random.Random(1)
        while True:
            asked.acquire()
            if done.is_set():
                return
            for node in nodes:
                found = assignments.next_for(node, 20.0) if draw.random() > 0.1 else None
                if found is None:
                    continue
                fate = draw.random()
                if fate < 0.1:
                    assignments.decline(node, found.id, "left while training")
                elif fate < 0.2:
                    assignments.append(Header(found.id, 100, "0" * 64, 0, 5, {}), b"half")
                elif fate > 0.3:  # else it is slow, and is asked by nobody for more
                    value = draw.random()  # the same bytes twice would be a replay
                    data = encode_vector("delta", np.full(fleet.trainer.size, value, np.float32))
                    header = Header(found.id, len(data), hashlib.sha256(data).hexdigest(), 0, 5, {})
                    if assignments.received(node, found.id)[1] is None:
                        assignments._part(found.id).unlink(missing_ok=True)
                        assignments.append(header, data)
                        assignments.finish(node, header)

    phones = threading.Thread(target=work)
    phones.start()
    try:
        drive_run(fleet.store, run_id, grid, fleet.config, on_settled=assignments.forget)
    finally:
        done.set()
        asked.release()
        phones.join()
    ended = results_of(fleet.store, run_id)[1:]
    assert [r.status for r in ended] == ["finished"] * 3
    assert all(r.devices >= 30 and r.seconds < 20.0 for r in ended)
    if kind == "sync":
        assert "the round has all the updates it asked for" in {a.error for a in fleet.rows(Assignment, run_id)}


def test_over_selection_asks_more_and_counts_the_first(fleet: Fleet) -> None:
    run_id = fleet.create(rounds=2, cohort=4, over_selection=0.5)
    fleet.go_on(run_id)
    statuses = [[a.status for a in fleet.rows(Assignment, run_id) if a.round == n] for n in (1, 2)]
    assert [sorted(s) for s in statuses] == [["aggregated"] * 4 + ["expired"] * 2] * 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"over_selection": 0.5}, "over_selection is 0.5, of nothing; set cohort"),
        ({"mode": "async"}, "mode is 'async'; choose sync or fedbuff"),
        ({"mode": "fedbuff", "buffer": 5, "min_devices": 4}, "a buffer of 5 with a quorum of 1 may never fill with 4"),
        ({"mode": "fedbuff", "buffer": 2, "evaluate_on_devices": True}, "give test_data instead"),
        ({"mode": "fedbuff", "buffer": 2, "min_devices": 4, "quorum": 3}, "quorum 3 can never be met by a buffer of 2"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(RunConfigError, match=says):
        RunConfig(**settings)


# ---- buffered rounds -------------------------------------------------------------------------------------------------


def test_a_buffer_that_everybody_fills_is_a_synchronous_round(fleet: Fleet) -> None:
    """Nobody is ever late then, so the bits are those of FedAvg."""
    buffered = fleet.go_on(fleet.create(mode="fedbuff", buffer=6, min_devices=6))
    assert buffered.tobytes() == fleet.go_on(fleet.create()).tobytes()


def test_fault_05_in_buffered_rounds_a_late_update_counts_less(fleet: Fleet) -> None:
    """Two fast devices and one that takes two rounds: its difference counts (1 + 1) ** -0.5 in round 2."""
    fleet.nodes = dict(list(fleet.nodes.items())[:3])
    run_id = fleet.create(rounds=2, mode="fedbuff", buffer=2, min_devices=3)
    sent: dict[tuple[str, int], Vector] = {}
    versions: list[Vector] = []

    def remember(name: str, reply: Message) -> None:
        sent[name, len(versions)] = reply.content["arrays"]["theta"].numpy().copy()

    def note(result: RoundResult) -> None:
        from pocketfed.coordinator.progress import starting_theta

        versions.append(starting_theta(fleet.store, run_id)[0])

    fleet.on_call = remember
    slow = {("device-2", 1): 1.5, ("device-0", 2): 1.0, ("device-1", 2): 9.0}
    grid = InProcessGrid(
        fleet.store, run_id, fleet.call, fleet.nodes, 0, duration=lambda name, number: slow.get((name, number), 1.0)
    )
    theta = drive_run(fleet.store, run_id, grid, fleet.config, on_round=note)
    start, first, second = versions
    assert np.array_equal(second, theta)
    expected = (sent["device-0", 1].astype(np.float64) + sent["device-1", 1]) / 2
    assert np.allclose(first, expected, atol=1e-7)
    late = (sent["device-2", 2].astype(np.float64) - start) * 2**-0.5
    fresh = sent["device-0", 2].astype(np.float64) - first
    assert np.allclose(second - first, (late + fresh) / 2, atol=1e-7)
    folded = {(a.round, a.counted_in) for a in fleet.rows(Assignment, run_id) if a.status == "aggregated"}
    assert folded == {(1, 1), (1, 2), (2, 2)}
    assert [len(recall(fleet.store, run_id, n).norms) for n in (1, 2, 3)] == [0, 2, 4]  # each once it has counted


def test_fault_05_a_late_update_in_the_spool_is_judged_as_sent_and_lowered_by_its_age(
    fleet: Fleet, tmp_path: Path
) -> None:
    """Asked for in round 1, counted in round 2: theta + (1 + 1) ** -0.5 of what was sent; its norm is that of what was sent."""
    assignments, (node, *_) = Assignments(fleet.store, tmp_path / "spool"), fleet.nodes
    size = fleet.trainer.size
    grid = FleetGrid(assignments, fleet.create(mode="fedbuff", buffer=1), lambda: fleet.nodes, size, lease_s=60.0)
    delta = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    strategy, theta = make_strategy("StreamingFedAvg", {}), np.zeros(size, np.float32)
    for number in (1, 2):
        begin_attempt(fleet.store, grid.run_id, number, [node])
        grid.enter(Cohort(number, 1, {node: fleet.nodes[node]}, 60.0, enough=1, staleness_exponent=0.5))
        theta = np.full(size, number, np.float32)
        asked = strategy.configure_train(
            number, ArrayRecord({"theta": Array(theta)}), local_config(fleet.config, number), grid
        )
        grid.push_messages(asked)  # in round 2 the device is busy still
        found = assignments.next_for(node, 60.0)
    assert found is not None
    data = encode_vector("delta", delta)
    header = Header(found.id, len(data), hashlib.sha256(data).hexdigest(), 0, 5, {})
    assignments.append(header, data)
    assert assignments.finish(node, header).accepted
    tally = Tally()
    (reply,) = screen(grid.replies({}), theta, Limits.of(size, fleet.config), tally)
    assert np.allclose(reply.content["arrays"]["theta"].numpy(), 2 + delta * 2**-0.5, atol=1e-6)
    ((status, _, norm),) = tally.statuses.values()
    assert (status, norm) == ("aggregated", pytest.approx(np.linalg.norm(delta)))


def test_buffered_rounds_learn_though_devices_are_late(fleet: Fleet) -> None:
    run_id = fleet.create(rounds=12, mode="fedbuff", buffer=2, min_devices=6)
    fleet.go_on(run_id)
    losses = [r.train_loss for r in results_of(fleet.store, run_id)[1:]]
    assert losses[-1] < losses[0]  # type: ignore[operator]
    ages = [a.counted_in - a.round for a in fleet.rows(Assignment, run_id) if a.status == "aggregated"]
    assert max(ages) >= 2


# ---- the database and the disk ---------------------------------------------------------------------------------------


def test_fault_23_a_full_disk_fails_nothing_and_the_run_goes_on_when_there_is_space(fleet: Fleet) -> None:
    undisturbed = fleet.go_on(fleet.create())
    run_id = fleet.create()

    def full(name: str, reply: Message) -> None:
        if name == "device-3":
            raise OSError(28, "No space left on device")

    fleet.on_call = full
    with pytest.raises(OSError, match="No space left"):
        fleet.go_on(run_id)
    with fleet.store.read() as session:
        run = session.get_one(Run, run_id)
        assert (run.status, run.reason) == ("waiting", "OSError: [Errno 28] No space left on device")
    fleet.on_call = lambda name, reply: None
    assert fleet.go_on(run_id).tobytes() == undisturbed.tobytes()


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_fault_23_a_database_that_is_full_or_locked_keeps_what_was_committed(fleet: Fleet) -> None:
    undisturbed = fleet.go_on(fleet.create())
    run_id = fleet.create()
    assert fleet.store.file is not None

    def limit(connection: Any, *_: Any) -> None:
        connection.execute(f"PRAGMA max_page_count={pages}")

    with fleet.store.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one() + 4
    fleet.store.engine.dispose()
    sa.event.listen(fleet.store.engine, "connect", limit)
    with pytest.raises(sa.exc.OperationalError, match="database or disk is full"):
        fleet.go_on(run_id)
    fleet.store.engine.dispose()
    sa.event.remove(fleet.store.engine, "connect", limit)

    other = sqlite3.connect(fleet.store.file, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    sa.event.listen(fleet.store.engine, "connect", lambda c, _: c.execute("PRAGMA busy_timeout=50"))
    with pytest.raises(sa.exc.OperationalError, match="database is locked"):
        fleet.go_on(run_id)
    other.execute("ROLLBACK")
    other.close()
    assert fleet.go_on(run_id).tobytes() == undisturbed.tobytes()


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_fault_23_a_database_restored_from_an_older_copy_ends_with_the_same_bits(
    fleet: Fleet, tmp_path: Path, killed: None
) -> None:
    """Yesterday's copy is of round 1; devices and spool know more, and it changes nothing."""
    run_id = fleet.create(strategy="FedAdam", strategy_options=OPTIONS["FedAdam"])
    copy = str(tmp_path / "yesterday.db")

    def back_up(result: RoundResult) -> None:
        if result.number == 1:
            with fleet.store.engine.connect() as connection:
                connection.exec_driver_sql(f"VACUUM INTO '{copy}'")

    today = fleet.go_on(run_id, back_up)
    fleet.store.close()
    fleet.store = Store(copy)
    spool = Assignments(fleet.store, tmp_path / "spool")
    orphan = spool.upload_path(f"{run_id}-2-1-1-train")
    orphan.write_bytes(b"what a device sent after the copy was made")
    assert spool.sweep() == 1
    assert not orphan.exists()
    assert fleet.go_on(run_id).tobytes() == today.tobytes()


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_fault_23_without_its_wal_a_database_is_an_older_copy_of_itself(fleet: Fleet, killed: None) -> None:
    undisturbed = fleet.go_on(fleet.create(rounds=2))
    run_id = fleet.create(rounds=2)
    assert fleet.store.file is not None
    with fleet.store.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    lost = fleet.store.file.with_name("lost.db")

    def lose(result: RoundResult) -> None:
        if result.number == 1:
            shutil.copy(fleet.store.file, lost)  # type: ignore[arg-type] - the file alone, without its -wal

    fleet.go_on(run_id, lose)
    fleet.store.close()
    fleet.store = Store(str(lost))
    assert fleet.go_on(run_id).tobytes() == undisturbed.tobytes()


def test_an_update_whose_bytes_are_gone_is_asked_for_again(fleet: Fleet, tmp_path: Path) -> None:
    inbox = Inbox(fleet, tmp_path / "spool")
    assert inbox.hand_in(1, 1, b"delta").accepted
    assert inbox.hand_in(1, 2, b"gamma").accepted
    inbox.assignments.upload_path(inbox.name(1, 1)).unlink()
    FleetGrid(inbox.assignments, inbox.run_id, dict, 1, lease_s=60.0).reopen(deadline_s=60.0)
    assert inbox.assignments.received(1, inbox.name(1, 1)) == (0, None)
    assert inbox.assignments.received(2, inbox.name(1, 2)) == (0, Receipt(True))
    found = inbox.assignments.next_for(1, 30.0)
    assert found is not None
    assert found.id == inbox.name(1, 1)
    assert inbox.hand_in(1, 1, b"delta").accepted


# ---- two coordinators ------------------------------------------------------------------------------------------------


def lead(fleet: Fleet, spool: Path, lease_s: float = 30.0) -> tuple[Store, Leadership]:
    store = Store(fleet.store.engine.url.render_as_string(hide_password=False))
    return store, Leadership(store, spool, lease_s)


def test_fault_24_the_second_coordinator_waits_and_the_old_ones_late_commit_is_refused(
    fleet: Fleet, tmp_path: Path
) -> None:
    """The first one hangs: it renews nothing, its lease runs out, another takes over, and then it wakes up."""
    store, first = lead(fleet, tmp_path / "one", lease_s=0.3)
    other_store, second = lead(fleet, tmp_path / "two", lease_s=0.3)
    waited: list[str] = []
    try:
        assert first.acquire(waited.append, lambda: False)
        run_id = fleet.create()
        fleet.store, own = store, fleet.store
        first._done.set()  # its thread renews no more, as if the machine had been suspended
        assert second.acquire(waited.append, lambda: False)
        assert waited == [first.holder]
        assert second.token == first.token + 1
        with pytest.raises(Deposed, match=r"another coordinator has taken over .*this one writes nothing more"):
            fleet.go_on(run_id)
        fleet.store = own
        assert fleet.rows(Round, run_id) == []
        with own.read() as session:
            assert session.get_one(Run, run_id).status == "waiting"
    finally:
        for leadership, opened in ((second, other_store), (first, store)):
            leadership.release()
            opened.close()


def test_fault_24_while_the_first_lives_the_second_never_writes(fleet: Fleet, tmp_path: Path) -> None:
    store, first = lead(fleet, tmp_path / "one", lease_s=3.0)  # longer than a busy machine holds up who renews it
    other_store, second = lead(fleet, tmp_path / "two")
    assert first.acquire(print, lambda: False)
    ended = threading.Event()
    timer = threading.Timer(4.0, ended.set)  # after the lease would have run out, were it not renewed
    timer.start()
    assert not second.acquire(print, ended.is_set)
    first.release()
    assert second.acquire(print, lambda: False)  # at once: it was given back
    for leadership, opened in ((second, other_store), (first, store)):
        leadership.release()
        opened.close()


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_fault_33_the_order_of_arrival_does_not_matter(fleet: Fleet, tmp_path: Path, seed: int) -> None:
    assignments = Assignments(fleet.store, tmp_path / "spool")
    results = []
    for order in (sorted(fleet.nodes), random.Random(seed).sample(sorted(fleet.nodes), len(fleet.nodes))):
        run_id = fleet.create(rounds=1)
        grid = FleetGrid(assignments, run_id, lambda: fleet.nodes, fleet.trainer.size, lease_s=60.0)

        def arrive(order: list[int] = order) -> None:
            for node in order:
                found = assignments.next_for(node, 60.0)
                assert found is not None
                delta = np.random.default_rng(node).standard_normal(fleet.trainer.size).astype(np.float32)
                data = encode_vector("delta", delta)
                header = Header(found.id, len(data), hashlib.sha256(data).hexdigest(), 0, 5 + node, {})
                assignments.append(header, data)
                assert assignments.finish(node, header).accepted

        threads: list[threading.Thread] = []

        def start(arrive: Callable[[], None] = arrive, threads: list[threading.Thread] = threads) -> None:
            if not threads:
                threads.append(threading.Thread(target=arrive))
                threads[0].start()

        assignments.on_offer[:] = [start]
        results.append(drive_run(fleet.store, run_id, grid, fleet.config, on_settled=assignments.forget))
        threads[0].join()
    assert results[0].tobytes() == results[1].tobytes()


def test_retained_updates_survive_the_sweep_and_others_do_not(fleet: Fleet, tmp_path: Path) -> None:
    for retain in (True, False):
        inbox = Inbox(fleet, tmp_path / f"spool-{retain}")
        inbox.run_id = fleet.create(retain_updates=retain)
        inbox.offer(fleet, number=1, seed=int(retain))
        assert inbox.hand_in(1, 1, b"delta" + bytes([retain])).accepted
        with fleet.store.write() as session:
            session.get_one(Assignment, inbox.name(1, 1)).status = "aggregated"
        assert inbox.assignments.sweep() == (0 if retain else 1)
        assert inbox.assignments.upload_path(inbox.name(1, 1)).exists() == retain


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_details_of_old_rounds_go_and_their_numbers_stay(fleet: Fleet) -> None:
    run_id = fleet.create(rounds=6, retain_rounds=2)
    kept = fleet.go_on(run_id)
    assert {a.round for a in fleet.rows(Assignment, run_id)} == {5, 6}
    assert {h.round for h in fleet.rows(History, run_id)} == {None, 5, 6}
    assert [r.number for r in fleet.rows(Round, run_id)] == list(range(7))
    assert [bool(r.parameters) for r in fleet.rows(Round, run_id)] == [True, False, False, False, False, True, True]
    assert fleet.go_on(fleet.create(rounds=6)).tobytes() == kept.tobytes()


def test_settings_of_a_run_come_back_from_the_store_as_they_were(fleet: Fleet) -> None:
    run_id = fleet.create(strategy="FedAdam", strategy_options={"eta": 0.5}, mode="fedbuff", buffer=1)
    with fleet.store.read() as session:
        assert RunConfig.from_dict(session.get_one(Run, run_id).config) == fleet.config
        assert dataclasses.replace(fleet.config, seed=4) != fleet.config
        assert session.scalar(sa.select(sa.func.count()).select_from(Device)) == 6


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_fault_34_many_rounds_leave_files_open_and_rows_as_they_were(fleet: Fleet) -> None:
    """`benchmarks/soak.py` does it by the thousand, and looks at memory too."""
    run_id = fleet.create(rounds=30, retain_rounds=3, strategy="FedAdam", local=dataclasses.replace(LOCAL, max_steps=1))
    seen: dict[int, tuple[int, ...]] = {}

    def look(result: RoundResult) -> None:
        with fleet.store.read() as session:
            counts = [
                session.scalar(sa.select(sa.func.count()).select_from(t)) for t in (Assignment, Update, Blob, History)
            ]
        seen[result.number] = (len(list(Path("/proc/self/fd").iterdir())), *counts)

    fleet.go_on(run_id, look)
    files, *rows = zip(*(seen[number] for number in (10, 20, 30)), strict=True)
    assert max(files) - min(files) <= 1
    assert [len(set(counts)) for counts in rows] == [1, 1, 1, 1]


# ---- what `serve` does with them -------------------------------------------------------------------------------------


def test_runs_that_were_left_are_gone_on_with_or_given_up(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    from pocketfed.cli.driving import unfinished
    from pocketfed.coordinator.logs import logging_as

    first, second = fleet.create(rounds=2), fleet.create(rounds=3)
    fleet.go_on(first)
    assert unfinished(fleet.store, resume=True) == [(second, fleet.config)]
    with logging_as("text"):
        assert unfinished(fleet.store, resume=False) == []
    assert capsys.readouterr().out == f"run {second}: given up\n"
    with fleet.store.read() as session:
        given_up = session.get_one(Run, second)
        assert (given_up.status, given_up.reason) == ("failed", "given up by the operator")
    assert unfinished_runs(fleet.store) == []


def test_fault_23_serve_waits_for_space_and_for_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    from pocketfed.cli.driving import _patiently
    from pocketfed.coordinator.logs import logging_as

    troubles = iter([OSError(28, "No space left on device")])

    def drive() -> str:
        for trouble in troubles:
            raise trouble
        return "done"

    with logging_as("text"):
        assert _patiently(drive, lambda: False) == "done"
    assert capsys.readouterr().out == "cannot go on: [Errno 28] No space left on device; trying again in 1 s\n"
    troubles = iter([FileNotFoundError(2, "No such file")])
    with pytest.raises(FileNotFoundError):
        _patiently(drive, lambda: False)
