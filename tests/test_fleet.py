"""A real coordinator and real devices over loopback gRPC, in one process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import sqlalchemy as sa

from pocketfed.client_sdk import Device
from pocketfed.client_sdk.alive import LONGEST_WAIT_S, bounded
from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.errors import ArtifactError, LinkError
from pocketfed.client_sdk.flower_app import make_client_app
from pocketfed.client_sdk.link import Link, Refused, Unreachable
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.coordinator.artifacts import BuiltArtifact, publish_artifact
from pocketfed.coordinator.config import LocalTraining, RunConfig
from pocketfed.coordinator.grid import FleetGrid
from pocketfed.coordinator.rounds import RoundResult, RunError, create_run, drive_run
from pocketfed.coordinator.server import CoordinatorServer, ServeError, ServerConfig
from pocketfed.coordinator.store import Assignment, Round, Run, Store, Update, device_named, latest_release, put_blob
from pocketfed.coordinator.store import Device as DeviceRow
from pocketfed.model.parameters import Vector, encode_vector
from pocketfed.model.tasks import Dataset
from pocketfed.protos import distribution_pb2, distribution_pb2_grpc, fleet_pb2, fleet_pb2_grpc
from pocketfed.simulations.grids import InProcessGrid
from pocketfed.simulations.run import encode_examples

PATIENCE_S = 20.0  # for an event that comes within milliseconds on an idle machine
LOCAL = LocalTraining(batch_size=4, learning_rate=0.01, max_length=32)


class Heard:
    """What a device says, and waiting for it to say something."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self._news = threading.Condition()

    def __call__(self, status: str) -> None:
        with self._news:
            self.said.append(status)
            self._news.notify_all()

    def wait(self, prefix: str, after: int = 0) -> None:
        with self._news:
            heard = self._news.wait_for(lambda: any(s.startswith(prefix) for s in self.said[after:]), PATIENCE_S)
        assert heard, f"never said {prefix!r}: {self.said}"


class Coordinator:
    """A store with the nano artifact released, and a server on it."""

    def __init__(self, database: str, folder: Path, built: BuiltArtifact, dataset: Dataset) -> None:
        self.folder, self.dataset = folder, dataset
        self.store = Store(database)
        with self.store.write() as session:
            publish_artifact(session, built, "stable", "head")
        self.server = CoordinatorServer(self.store, ServerConfig("127.0.0.1:0", lease_s=5.0), folder / "spool")
        self.address = f"127.0.0.1:{self.server.start()}"
        self.size = int(built.manifest["trainable_sets"]["head"]["size"])
        self.devices: list[Device] = []
        self.results: list[RoundResult] = []

    def device(self, index: int, **options: Any) -> tuple[Device, Heard]:
        """A device with 12 examples, not started."""
        heard = Heard()
        made = Device(self.address, self.folder / f"home-{index}", name=f"device-{index}", on_status=heard, **options)
        self.devices.append(made)
        if not made.examples.count():
            made.add_examples((e.text, e.label) for e in self.dataset.train[12 * index : 12 * index + 12])
        return made, heard

    def drive(self, should_stop: Callable[[], bool] = lambda: False, offer_s: float = 5.0, **settings: Any) -> Vector:
        config = RunConfig(
            **({"min_devices": 2, "rounds": 2, "seed": 3, "wait_s": PATIENCE_S, "local": LOCAL} | settings)
        )
        self.run_id = create_run(self.store, config)
        grid = FleetGrid(self.server.assignments, self.run_id, lambda: self.server.online("stable"), self.size, offer_s)
        self.results = []
        return drive_run(
            self.store,
            self.run_id,
            grid,
            config,
            None,
            self.results.append,
            self.server.assignments.forget,
            should_stop,
        )

    def restart(self, lease_s: float = 5.0) -> None:
        self.server.stop()
        self.server = CoordinatorServer(self.store, ServerConfig(self.address, lease_s), self.folder / "spool")
        self.server.start()

    def close(self) -> None:
        for device in self.devices:
            device.close()
        self.server.stop()
        self.store.close()


TOKEN = "A" * 43  # what `secrets.token_urlsafe(32)` makes looks like


@pytest.fixture
def coordinator(
    database: str, tmp_path: Path, nano_built: BuiltArtifact, tiny_dataset: Dataset
) -> Iterator[Coordinator]:
    made = Coordinator(database, tmp_path, nano_built, tiny_dataset)
    yield made
    made.close()


@pytest.fixture
def channel(coordinator: Coordinator) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(coordinator.address) as opened:
        yield opened


class RawDevice:
    """The bare calls, for a device that does not behave."""

    def __init__(self, channel: grpc.Channel, name: str = "raw") -> None:
        self.fleet = fleet_pb2_grpc.FleetStub(channel)
        self.distribution = distribution_pb2_grpc.DistributionStub(channel)
        token = name.ljust(43, "-")
        self.fleet.Enrol(fleet_pb2.EnrolRequest(name=name, protocol=1, token=token))
        self.metadata = (("authorization", f"Bearer {token}"),)

    def check_in(self, wait_s: float = PATIENCE_S, **values: Any) -> Any:
        request = fleet_pb2.CheckInRequest(
            **({"protocol": 1, "examples": 5, "wait_s": wait_s, "release_id": 1} | values)
        )
        return self.fleet.CheckIn.future(request, metadata=self.metadata)


# ---- the whole way ---------------------------------------------------------------------------------------------------


def in_process(folder: Path, built: BuiltArtifact, artifact: Artifact, dataset: Dataset, **settings: Any) -> Vector:
    """The run of `Coordinator.drive` with virtual devices instead."""
    store = Store(str(folder / "simulated.db"))
    trainer = PlanTrainer(artifact, "head")
    everything = encode_examples(trainer, dataset.train, 32)
    local = {f"device-{i}": everything.take(range(12 * i, 12 * i + 12)) for i in range(2)}
    with store.write() as session:
        publish_artifact(session, built, "stable", "head")
        nodes = {device_named(session, name).id: name for name in reversed(local)}  # other ids than in the fleet
    config = RunConfig(min_devices=2, rounds=2, seed=3, local=LOCAL, **settings)
    run_id = create_run(store, config)
    app = make_client_app(
        lambda: trainer, lambda c: (str(c.node_config["device"]), local[str(c.node_config["device"])])
    )
    theta = drive_run(store, run_id, InProcessGrid(store, run_id, app, nodes, 0), config)
    store.close()
    return theta


@pytest.mark.parametrize("strategy", ["StreamingFedAvg", "FedAdam"])
def test_two_rounds_over_grpc_give_the_bits_of_the_simulation(
    coordinator: Coordinator,
    nano_built: BuiltArtifact,
    nano_artifact: Artifact,
    tiny_dataset: Dataset,
    tmp_path: Path,
    strategy: str,
) -> None:
    for index in range(2):
        coordinator.device(index)[0].start()
    theta = coordinator.drive(strategy=strategy)
    assert theta.tobytes() == in_process(tmp_path, nano_built, nano_artifact, tiny_dataset, strategy=strategy).tobytes()
    assert [(r.status, r.devices, r.failed) for r in coordinator.results[1:]] == [("finished", 2, 0)] * 2
    with coordinator.store.read() as session:
        assert set(session.scalars(sa.select(Assignment.status))) == {"aggregated"}
        assert session.scalar(sa.select(sa.func.count()).select_from(Update)) == 4
        assert set(session.scalars(sa.select(DeviceRow.examples))) == {12}
    assert not any(coordinator.server.assignments.spool.iterdir())
    last = coordinator.results[-1]  # by now the artifact is there: only parameters go down
    assert 0 < last.bytes_down - 2 * 4 * coordinator.size < 400
    assert 0 < last.bytes_up - 2 * 4 * coordinator.size < 400


def test_a_new_release_is_adopted_by_itself_and_predicted_with(
    coordinator: Coordinator, nano_artifact: Artifact
) -> None:
    devices = [coordinator.device(index) for index in range(2)]
    for device, heard in devices:
        device.start()
        heard.wait("fetching a new model")
    before = devices[0][0].predict("play some jazz")
    marks = [len(heard.said) for _, heard in devices]
    theta = coordinator.drive(rounds=1)
    for (device, heard), mark in zip(devices, marks, strict=True):
        heard.wait("fetching a new model", mark)
        heard.wait("waiting for work", heard.said.index("fetching a new model", mark))
        with coordinator.store.read() as session:
            release = latest_release(session, "stable")
            assert release is not None
        assert json.loads((device.home / "release.json").read_text())["id"] == release.id == 2
    after = devices[0][0].predict("play some jazz")
    trainer = PlanTrainer(nano_artifact, "head")
    (row,) = trainer.encode(["play some jazz"])
    logits = trainer.logits(theta, row[None], np.ones_like(row[None]))[0].astype(np.float64)
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert list(after.probabilities.values()) == pytest.approx(shares, rel=1e-5)
    assert after.probabilities != before.probabilities
    assert after.label == nano_artifact.manifest.labels[int(shares.argmax())]


def test_predicting_right_after_starting_works_on_a_new_device(coordinator: Coordinator) -> None:
    """Both threads want to enrol and to fetch the model at that moment."""
    for index in range(4):
        device, _ = coordinator.device(index)
        device.start()
        assert device.predict("turn on the lamp").label in coordinator.dataset.labels


def test_devices_measure_on_their_own_examples(coordinator: Coordinator) -> None:
    for index in range(2):
        coordinator.device(index)[0].start()
    coordinator.drive(rounds=1, evaluate_on_devices=True)
    last = coordinator.results[-1]
    assert last.accuracy is not None
    assert 0 <= last.accuracy <= 1
    with coordinator.store.read() as session:
        assert set(session.execute(sa.select(Assignment.kind, Assignment.status))) == {
            ("train", "aggregated"),
            ("evaluate", "aggregated"),
        }


# ---- devices that leave ----------------------------------------------------------------------------------------------


def test_a_device_that_falls_silent_costs_its_lease_and_not_the_round(
    coordinator: Coordinator, channel: grpc.Channel
) -> None:
    coordinator.restart(lease_s=6.0)  # long enough for the other device on a machine that is busy
    raw = RawDevice(channel)
    asked, assignments = raw.check_in(), coordinator.server.assignments
    asked.add_done_callback(lambda call: assignments._part(call.result().assignment.id).write_bytes(b"half an update"))
    coordinator.device(0)[0].start()
    coordinator.drive(rounds=1, offer_s=6.0)
    assert not any(assignments.spool.iterdir())
    assert asked.result().assignment.kind == fleet_pb2.Assignment.TRAIN
    assert [(r.status, r.devices, r.failed) for r in coordinator.results[1:]] == [("finished", 1, 1)]
    with coordinator.store.read() as session:
        lost = session.scalars(sa.select(Assignment).where(Assignment.status == "expired")).one()
        assert lost.error == "no heartbeat within the lease"
    late = raw.fleet.GetUploadStatus(fleet_pb2.UploadStatusRequest(assignment_id=lost.id), metadata=raw.metadata)
    assert (late.receipt.accepted, late.receipt.reason) == (
        False,
        "the assignment has ended: no heartbeat within the lease",
    )
    beat = raw.fleet.Heartbeat(fleet_pb2.HeartbeatRequest(assignment_id=lost.id), metadata=raw.metadata)
    assert beat.cancelled


def test_a_declined_assignment_fails_and_the_round_goes_on_at_once(
    coordinator: Coordinator, channel: grpc.Channel
) -> None:
    raw = RawDevice(channel)
    asked = raw.check_in()
    asked.add_done_callback(
        lambda call: raw.fleet.Decline(
            fleet_pb2.DeclineRequest(assignment_id=call.result().assignment.id, reason="low battery"),
            metadata=raw.metadata,
        )
    )
    coordinator.device(0)[0].start()
    coordinator.drive(rounds=1)
    assert [(r.status, r.devices, r.failed) for r in coordinator.results[1:]] == [("finished", 1, 1)]
    with coordinator.store.read() as session:
        assert session.scalars(sa.select(Assignment.error).where(Assignment.status == "failed")).one() == "low battery"


def test_a_run_can_be_stopped_while_a_device_works_and_the_device_works_on(
    coordinator: Coordinator, channel: grpc.Channel
) -> None:
    raw = RawDevice(channel)
    asked = raw.check_in()
    began = time.monotonic()
    with pytest.raises(RunError, match="stopped before all devices had answered"):
        coordinator.drive(should_stop=asked.done, min_devices=1, offer_s=60.0)
    assert time.monotonic() - began < 10
    with coordinator.store.read() as session:
        assert session.scalars(sa.select(Assignment.status)).all() == ["accepted"]
        assert session.get_one(Round, (coordinator.run_id, 1)).status == "running"
        assert session.get_one(Run, coordinator.run_id).status == "waiting"
    beat = raw.fleet.Heartbeat(
        fleet_pb2.HeartbeatRequest(assignment_id=asked.result().assignment.id), metadata=raw.metadata
    )
    assert not beat.cancelled


def test_stopping_a_device_gives_its_assignment_back(coordinator: Coordinator) -> None:
    first, _ = coordinator.device(0)
    leaving, heard = coordinator.device(1)
    first.start()
    leaving.start()
    stopper = threading.Thread(target=lambda: (heard.wait("training in round 1"), leaving.stop()))
    stopper.start()
    coordinator.drive(rounds=1, local=LocalTraining(epochs=1000, batch_size=1, max_length=32, max_steps=600))
    stopper.join()
    assert [(r.status, r.devices, r.failed) for r in coordinator.results[1:]] == [("finished", 1, 1)]
    with coordinator.store.read() as session:
        assert (
            session.scalars(sa.select(Assignment.error).where(Assignment.status == "failed")).one()
            == "the app stopped the device"
        )


# ---- refusals --------------------------------------------------------------------------------------------------------


def expect(code: grpc.StatusCode, says: str, call: Callable[[], Any]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is code
    assert says in caught.value.details()


@pytest.mark.parametrize(
    "metadata", [(), (("authorization", ""),), (("authorization", "Bearer wrong"),), (("authorization", "Bearer "),)]
)
def test_every_call_but_enrolment_needs_a_known_token(
    coordinator: Coordinator, channel: grpc.Channel, metadata: Any
) -> None:
    with coordinator.store.write() as session:
        device_named(session, "made by a simulation")  # it has no token: nobody can be it
    fleet, distribution = fleet_pb2_grpc.FleetStub(channel), distribution_pb2_grpc.DistributionStub(channel)
    for call in (
        lambda: fleet.CheckIn(fleet_pb2.CheckInRequest(protocol=1), metadata=metadata),
        lambda: fleet.Heartbeat(fleet_pb2.HeartbeatRequest(), metadata=metadata),
        lambda: fleet.GetUploadStatus(fleet_pb2.UploadStatusRequest(), metadata=metadata),
        lambda: fleet.Upload(iter([fleet_pb2.UploadPart()]), metadata=metadata),
        lambda: fleet.Decline(fleet_pb2.DeclineRequest(), metadata=metadata),
        lambda: distribution.GetManifest(distribution_pb2.GetManifestRequest(channel="stable"), metadata=metadata),
        lambda: list(distribution.Download(distribution_pb2.DownloadRequest(digest="0" * 64), metadata=metadata)),
    ):
        expect(grpc.StatusCode.UNAUTHENTICATED, "this device is not known here", call)


def test_another_protocol_is_refused_by_number(coordinator: Coordinator, channel: grpc.Channel) -> None:
    raw = RawDevice(channel)
    says = "protocol 2 is not spoken here, only 1; update the app"
    expect(grpc.StatusCode.FAILED_PRECONDITION, says, lambda: raw.check_in(protocol=2).result())
    expect(
        grpc.StatusCode.FAILED_PRECONDITION, says, lambda: raw.fleet.Enrol(fleet_pb2.EnrolRequest(name="x", protocol=2))
    )


def test_names_are_taken_once_and_must_be_usable(coordinator: Coordinator) -> None:
    link = Link(coordinator.address)
    link.enrol("phone", "stable", TOKEN)
    link.enrol("phone", "stable", TOKEN)  # the reply was lost: asked again, it counts once
    with pytest.raises(
        Refused, match="a device named 'phone' is enrolled already; use its home folder, or another name"
    ) as caught:
        Link(coordinator.address).enrol("phone", "stable", "B" * 43)
    assert caught.value.code == "ALREADY_EXISTS"
    for name in ("", "x" * 101, "new\nline"):
        with pytest.raises(Refused, match="must have 1 to 100 printable characters") as caught:
            Link(coordinator.address).enrol(name, "stable", TOKEN)
        assert caught.value.code == "INVALID_ARGUMENT"


def test_a_short_secret_is_refused_and_a_lost_reply_locks_nobody_out(coordinator: Coordinator, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="the token must have 32 to 200 printable ASCII characters"):
        Link(coordinator.address).enrol("phone", "stable", "short")
    first = Device(coordinator.address, tmp_path / "home", name="tablet")
    first.predict("x")
    first.close()
    identity = tmp_path / "home" / "identity.json"
    kept = json.loads(identity.read_text())
    identity.write_text(json.dumps(kept | {"enrolled": False}))  # as it is when the reply never came
    with Device(coordinator.address, tmp_path / "home") as again:
        assert again.name == "tablet"
        again.start()
        again.stop()
        again.enrol()
    assert json.loads(identity.read_text()) == kept


def test_an_app_may_enrol_and_fetch_when_it_suits_it(coordinator: Coordinator, tmp_path: Path) -> None:
    with Device(coordinator.address, tmp_path / "home", name="tablet") as device:
        device.enrol()
        with coordinator.store.read() as session:
            assert session.scalars(sa.select(DeviceRow.name)).all() == ["tablet"]
        assert device.fetch()
        assert not device.fetch()  # it is the newest already
        assert len(list((tmp_path / "home" / "artifacts").iterdir())) == 1


def test_the_enrolment_key_is_asked_for(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "keyed.db"))
    with CoordinatorServer(store, ServerConfig("127.0.0.1:0", enrolment_key="sésame")) as server:
        link = Link(f"127.0.0.1:{server.port}")
        for key in ("", "wrong", "Sésame"):
            with pytest.raises(Refused, match="the enrolment key is wrong") as caught:
                link.enrol("phone", "stable", TOKEN, key)
            assert caught.value.code == "PERMISSION_DENIED"
        link.enrol("phone", "stable", TOKEN, "sésame")
        link.close()
    with store.read() as session:
        held = session.scalars(sa.select(DeviceRow)).one()
        assert link.token not in (held.token_hash, held.name)
    store.close()


def test_a_channel_without_release_and_unknown_bytes_are_not_found(
    coordinator: Coordinator, channel: grpc.Channel
) -> None:
    raw = RawDevice(channel)
    ask = raw.distribution.GetManifest
    expect(
        grpc.StatusCode.NOT_FOUND,
        "there is no release on channel 'beta'; publish one",
        lambda: ask(distribution_pb2.GetManifestRequest(channel="beta"), metadata=raw.metadata),
    )
    expect(
        grpc.StatusCode.NOT_FOUND,
        "there is no version 'nope'",
        lambda: ask(distribution_pb2.GetManifestRequest(version="nope"), metadata=raw.metadata),
    )
    expect(
        grpc.StatusCode.INVALID_ARGUMENT,
        "give a version or a channel",
        lambda: ask(distribution_pb2.GetManifestRequest(), metadata=raw.metadata),
    )
    expect(
        grpc.StatusCode.NOT_FOUND,
        "there are no bytes with SHA-256 '0000",
        lambda: list(
            raw.distribution.Download(distribution_pb2.DownloadRequest(digest="0" * 64), metadata=raw.metadata)
        ),
    )


def test_a_device_hears_at_its_next_check_in_why_its_update_did_not_count(
    coordinator: Coordinator, channel: grpc.Channel
) -> None:
    """It sends NaN twice, is told so politely, and is not asked a third time."""
    raw = RawDevice(channel)
    data = encode_vector("delta", np.full(coordinator.size, np.nan, np.float32))

    def send(assignment_id: str) -> fleet_pb2.Receipt:
        header = fleet_pb2.UploadHeader(
            assignment_id=assignment_id, total_bytes=len(data), digest=hashlib.sha256(data).hexdigest(), num_examples=5
        )
        parts = iter([fleet_pb2.UploadPart(header=header), fleet_pb2.UploadPart(data=data)])
        return raw.fleet.Upload(parts, metadata=raw.metadata)

    ended: list[Exception] = []

    def drive() -> None:
        try:
            coordinator.drive(min_devices=1, rounds=3, max_attempts=1, max_offences=2, max_failed_rounds=9, wait_s=0.5)
        except RunError as error:
            ended.append(error)

    run = threading.Thread(target=drive)
    asking = raw.check_in()
    run.start()
    for _ in range(2):
        assert send(asking.result().assignment.id).accepted
        asking = raw.check_in(wait_s=2.0)
    told = asking.result()
    run.join(PATIENCE_S)
    assert told.WhichOneof("what") == "wait"
    assert told.wait.reason == (
        f"there is no work for this device now; the update for round 2 was not used: not_finite: {coordinator.size} of "
        f"the update's {coordinator.size} values are not finite; after 2 such updates this run asks the device no more"
    )
    assert str(ended[0]).startswith("0 of at least 1 devices came within 0.5 s")


def test_hostile_uploads_get_their_status_codes(coordinator: Coordinator, channel: grpc.Channel) -> None:
    raw = RawDevice(channel)
    asked = raw.check_in()
    stop = threading.Event()
    ended: list[RunError] = []

    def drive() -> None:
        with pytest.raises(RunError) as caught:
            coordinator.drive(stop.is_set, min_devices=1, offer_s=60.0)
        ended.append(caught.value)

    driving = threading.Thread(target=drive)
    driving.start()
    name = asked.result().assignment.id

    def upload(*parts: Any) -> Any:
        return raw.fleet.Upload(iter(parts), metadata=raw.metadata)

    def header(**values: Any) -> Any:
        return fleet_pb2.UploadPart(
            header=fleet_pb2.UploadHeader(**({"assignment_id": name, "num_examples": 1, "digest": "0" * 64} | values))
        )

    limit = 4 * coordinator.size + 4096
    data = fleet_pb2.UploadPart(data=b"x" * 10)
    expect(grpc.StatusCode.INVALID_ARGUMENT, "an upload begins with a header", lambda: upload(data))
    expect(grpc.StatusCode.INVALID_ARGUMENT, "an upload begins with a header", lambda: upload())
    expect(
        grpc.StatusCode.RESOURCE_EXHAUSTED, f"larger than the {limit}", lambda: upload(header(total_bytes=limit + 1))
    )
    expect(grpc.StatusCode.NOT_FOUND, "there is no assignment 'other'", lambda: upload(header(assignment_id="other")))
    expect(
        grpc.StatusCode.OUT_OF_RANGE, "goes on at byte 0, not 4", lambda: upload(header(total_bytes=10, offset=4), data)
    )
    expect(grpc.StatusCode.DATA_LOSS, "start again at byte 0", lambda: upload(header(total_bytes=10), data))
    expect(
        grpc.StatusCode.INVALID_ARGUMENT,
        "10 of 11 bytes have arrived; send the rest",
        lambda: upload(header(total_bytes=11), data),
    )
    status = raw.fleet.GetUploadStatus(fleet_pb2.UploadStatusRequest(assignment_id=name), metadata=raw.metadata)
    assert status.received_bytes == 10
    stop.set()
    driving.join(PATIENCE_S)
    assert [str(error) for error in ended] == ["stopped before all devices had answered"]


# ---- servers that come and go ----------------------------------------------------------------------------------------


def test_a_busy_port_is_told_in_a_sentence(coordinator: Coordinator) -> None:
    second = CoordinatorServer(coordinator.store, ServerConfig(coordinator.address), coordinator.folder)
    with pytest.raises(
        ServeError,
        match=f"cannot listen on {coordinator.address}: the address is taken or .*; choose another port",
    ):
        second.start()


@pytest.mark.parametrize("listen", ["8765", "localhost:", ":8765", "localhost:http", "localhost:70000", ""])
def test_what_is_not_an_address_is_refused(coordinator: Coordinator, listen: str) -> None:
    with pytest.raises(ServeError, match="is not HOST:PORT"):
        CoordinatorServer(coordinator.store, ServerConfig(listen), coordinator.folder).start()


def test_a_coordinator_that_is_not_there_is_told_in_a_sentence(coordinator: Coordinator) -> None:
    coordinator.server.stop()
    device, _ = coordinator.device(0)
    with pytest.raises(
        LinkError,
        match=f"the coordinator at {coordinator.address} cannot be reached; is it running, and is the address",
    ):
        device.predict("play some jazz")


def test_stopping_does_not_wait_for_long_polls(coordinator: Coordinator, channel: grpc.Channel) -> None:
    asked = RawDevice(channel).check_in(wait_s=60.0)
    with coordinator.server.assignments.changed:  # it has said that it has examples: its poll is open
        assert coordinator.server.assignments.changed.wait_for(lambda: coordinator.server.online("stable"), PATIENCE_S)
    began = time.monotonic()
    coordinator.server.stop()
    assert time.monotonic() - began < 30.0
    assert asked.result().wait.reason == "the coordinator is stopping"


def test_stopping_a_device_does_not_wait_for_its_long_poll(coordinator: Coordinator) -> None:
    device, heard = coordinator.device(0)
    device.start()
    heard.wait("fetching a new model")
    heard.wait("waiting for work", heard.said.index("fetching a new model"))
    began = time.monotonic()
    device.stop()
    assert time.monotonic() - began < 10.0
    assert device.status() == "stopped"


def test_a_device_finds_a_coordinator_that_was_started_anew_and_takes_part(coordinator: Coordinator) -> None:
    device, heard = coordinator.device(0)
    device.start()
    coordinator.drive(min_devices=1, rounds=1)
    mark = len(heard.said)
    coordinator.server.stop()
    heard.wait("will try again: the coordinator at", mark)
    coordinator.server = CoordinatorServer(
        coordinator.store, ServerConfig(coordinator.address, lease_s=5.0), coordinator.folder
    )
    coordinator.server.start()
    coordinator.drive(min_devices=1, rounds=1)
    assert [(r.status, r.devices) for r in coordinator.results[1:]] == [("finished", 1)]
    with coordinator.store.read() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(DeviceRow)) == 1


def test_work_left_open_by_a_killed_coordinator_does_not_starve_the_device(coordinator: Coordinator) -> None:
    """An accepted assignment of a run that nobody drives any more."""
    coordinator.device(0)[0].start()
    coordinator.drive(min_devices=1, rounds=1)
    with coordinator.store.write() as session:
        session.execute(sa.update(Assignment).values(status="accepted", deadline=Assignment.offered_at))
    coordinator.restart()
    coordinator.drive(min_devices=1, rounds=1)
    assert [(r.status, r.devices) for r in coordinator.results[1:]] == [("finished", 1)]


def test_a_download_goes_on_at_another_server_where_it_broke_off(coordinator: Coordinator) -> None:
    data = np.random.default_rng(0).bytes((3 << 20) + 5)
    with coordinator.store.write() as session:
        digest = put_blob(session, data)
    link = Link(coordinator.address)
    link.enrol("phone", "stable", TOKEN)
    chunks = link.download(digest)
    received = [next(chunks), next(chunks)]
    coordinator.server.stop()
    with contextlib.suppress(Unreachable, Refused):  # what was under way may still arrive, even all of it
        received.extend(chunks)
    coordinator.server = CoordinatorServer(
        coordinator.store, ServerConfig(coordinator.address), coordinator.folder / "spool"
    )
    coordinator.server.start()
    received += link.download(digest, first_chunk=len(received))
    assert b"".join(received) == data
    assert list(link.download(digest, first_chunk=4)) == []
    with pytest.raises(Refused, match="first_chunk is 5; there are 4 chunks") as caught:
        list(link.download(digest, first_chunk=5))
    assert caught.value.code == "OUT_OF_RANGE"
    link.close()


def test_fault_18_parameters_longer_than_they_can_be_are_not_kept(coordinator: Coordinator) -> None:
    device, _ = coordinator.device(0)
    taken = []

    def endless(digest: str, first_chunk: int = 0) -> Iterator[bytes]:
        while True:
            taken.append(digest)
            yield bytes(1 << 20)

    device._link.download = endless  # type: ignore[method-assign]
    with pytest.raises(ArtifactError, match="more bytes than 10 values"):
        device._models.parameters("0" * 64, 10)
    assert len(taken) == 1


@pytest.mark.parametrize("said", [math.nan, math.inf, -1.0, 1e300])
def test_times_that_cannot_be_waited_for_do_not_end_a_devices_thread(said: float) -> None:
    assert 0.0 <= bounded(said, 0.0, LONGEST_WAIT_S) <= LONGEST_WAIT_S


def test_an_unexpected_fault_gives_the_assignment_back_without_a_word_of_text(coordinator: Coordinator) -> None:
    device, _ = coordinator.device(0)

    def broken(*_: object) -> None:
        raise ZeroDivisionError("play SECRET jazz")

    device._participation._perform = broken  # type: ignore[method-assign, assignment]
    device.start()
    coordinator.drive(rounds=1, min_devices=1, max_failed_rounds=2, max_attempts=1)
    with coordinator.store.read() as session:
        (assignment,) = session.scalars(sa.select(Assignment)).all()
    assert (assignment.status, assignment.error) == ("failed", "ZeroDivisionError")


# ---- the database and the disk ---------------------------------------------------------------------------------------


def test_fault_23_while_nothing_can_be_stored_devices_are_told_to_try_again_and_lose_nothing(
    coordinator: Coordinator,
) -> None:
    """The disk is full from the first upload on, until the device has been told three times."""
    device, heard = coordinator.device(0)
    refused = threading.Semaphore(0)
    assignments = coordinator.server.assignments
    count, left = assignments.count, iter(range(3))

    def full(*arguments: Any) -> Any:
        if next(left, None) is not None:
            refused.release()
            raise OSError(28, "No space left on device")
        return count(*arguments)

    assignments.count = full  # type: ignore[method-assign]
    device.start()
    coordinator.drive(rounds=1, min_devices=1)
    assert [refused.acquire(blocking=False) for _ in range(4)] == [True, True, True, False]
    assert [(r.status, r.devices) for r in coordinator.results[1:]] == [("finished", 1)]
    assert sum(s.startswith("training in") for s in heard.said) == 1  # it trained once, and sent it until it was taken


def test_fault_23_a_database_that_is_read_only_is_unavailable_and_not_unknown(
    coordinator: Coordinator, channel: grpc.Channel
) -> None:
    raw = RawDevice(channel)

    def read_only(session: Any) -> None:
        raise sa.exc.OperationalError("UPDATE", {}, Exception("attempt to write a readonly database"))

    coordinator.store.fence = read_only
    says = "the coordinator cannot store anything now; try again later"
    expect(grpc.StatusCode.UNAVAILABLE, says, lambda: raw.check_in(0.0).result())
    coordinator.store.fence = None
    assert raw.check_in(0.0).result().HasField("wait")


def test_a_device_whose_connection_ends_is_gone_at_once(coordinator: Coordinator) -> None:
    with grpc.insecure_channel(coordinator.address) as opened:
        asked = RawDevice(opened).check_in(60.0)
        grid = FleetGrid(coordinator.server.assignments, 1, lambda: coordinator.server.online("stable"), 1, 5.0)
        assert list(grid.wait_available(1, PATIENCE_S, lambda: False).values()) == ["raw"]
        asked.cancel()
    end = time.monotonic() + PATIENCE_S
    while coordinator.server.online("stable") and time.monotonic() < end:
        time.sleep(0.01)
    assert coordinator.server.online("stable") == {}
