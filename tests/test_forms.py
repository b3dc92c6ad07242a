"""Forms of an update over the wire: real devices, a real coordinator, and every byte that goes between them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import sqlalchemy as sa

from pocketfed.client_sdk import Device, RunDescription
from pocketfed.client_sdk import link as sdk_link
from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.errors import ConfigurationError
from pocketfed.client_sdk.flower_app import make_client_app
from pocketfed.client_sdk.outgoing import UpdateForm as DeviceForm
from pocketfed.client_sdk.participation import _form
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.coordinator.artifacts import BuiltArtifact, publish_artifact
from pocketfed.coordinator.config import LocalTraining, RunConfig, UpdateForm
from pocketfed.coordinator.forms import form_of, knows_forms
from pocketfed.coordinator.grid import FleetGrid
from pocketfed.coordinator.progress import RunError
from pocketfed.coordinator.rounds import RoundResult, create_run, drive_run
from pocketfed.coordinator.server import CoordinatorServer, ServerConfig
from pocketfed.coordinator.store import Assignment, Blob, Store, device_named
from pocketfed.model.codecs import HEADER_BYTES, encode, parse_codec
from pocketfed.model.parameters import Vector
from pocketfed.model.tasks import Dataset, Example
from pocketfed.protos import distribution_pb2, fleet_pb2
from pocketfed.simulations.grids import InProcessGrid
from pocketfed.simulations.run import encode_examples

PATIENCE_S = 60.0  # for what takes seconds on an idle machine; leases, too: nobody is to be given up for being slow
LOCAL = LocalTraining(batch_size=4, learning_rate=0.01, max_length=32)
ROUNDS = 3


@pytest.fixture(autouse=True)
def devices_know_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a tree whose SDK has an older number still."""
    if not knows_forms(sdk_link.SDK_VERSION):
        monkeypatch.setattr(sdk_link, "SDK_VERSION", "0.3.0")


class Fleet:
    """A coordinator and two devices with 12 examples each."""

    def __init__(self, folder: Path, built: BuiltArtifact, dataset: Dataset, trainable_set: str = "head") -> None:
        self.folder, self.built, self.set = folder, built, trainable_set
        self.parts: list[list[Example]] = [list(dataset.train[12 * i : 12 * i + 12]) for i in range(2)]
        self.store = Store(str(folder / "fleet.db"))
        with self.store.write() as session:
            publish_artifact(session, built, "stable", trainable_set)
        self.server = CoordinatorServer(self.store, ServerConfig("127.0.0.1:0", lease_s=PATIENCE_S), folder / "spool")
        self.address = f"127.0.0.1:{self.server.start()}"
        self.size = int(built.manifest["trainable_sets"][trainable_set]["size"])
        self.devices: list[Device] = []
        self.results: list[RoundResult] = []

    def device(self, index: int, address: str = "", **options: Any) -> Device:
        made = Device(address or self.address, self.folder / f"home-{index}", name=f"device-{index}", **options)
        self.devices.append(made)
        if not made.examples.count():
            made.add_examples((e.text, e.label) for e in self.parts[index])
        return made

    def config(self, update: UpdateForm, **settings: Any) -> RunConfig:
        standard = {"min_devices": 2, "rounds": ROUNDS, "seed": 3, "wait_s": PATIENCE_S, "local": LOCAL}
        return RunConfig(**(standard | settings), update=update)

    def drive(self, update: UpdateForm, **settings: Any) -> Vector:
        config = self.config(update, **settings)
        self.run_id = create_run(self.store, config)
        forms = not config.update.plain
        grid = FleetGrid(
            self.server.assignments, self.run_id, lambda: self.server.online("stable", forms), self.size, PATIENCE_S
        )
        self.results = []
        forget = self.server.assignments.forget
        return drive_run(self.store, self.run_id, grid, config, None, self.results.append, forget)

    def simulate(self, artifact: Artifact, update: UpdateForm, **settings: Any) -> tuple[Vector, list[RoundResult]]:
        """The same run with virtual devices."""
        store, results = Store(str(self.folder / "simulated.db")), list[RoundResult]()
        trainer = PlanTrainer(artifact, self.set)
        local = {f"device-{i}": encode_examples(trainer, part, 32) for i, part in enumerate(self.parts)}
        with store.write() as session:
            publish_artifact(session, self.built, "stable", self.set)
            nodes = {device_named(session, name).id: name for name in local}
        config = self.config(update, **settings)
        run_id = create_run(store, config)
        app = make_client_app(
            lambda: trainer,
            lambda c: (str(c.node_config["device"]), local[str(c.node_config["device"])]),
            seeded_noise=True,
        )
        theta = drive_run(store, run_id, InProcessGrid(store, run_id, app, nodes, 0), config, None, results.append)
        store.close()
        return theta, results

    def statuses(self) -> set[tuple[str, str | None]]:
        with self.store.read() as session:
            rows = session.execute(sa.select(Assignment.status, Assignment.error)).all()
        return {(row.status, row.error) for row in rows}

    def close(self) -> None:
        for device in self.devices:
            device.close()
        self.server.stop()
        self.store.close()


@pytest.fixture
def fleet(tmp_path: Path, nano_built: BuiltArtifact, tiny_dataset: Dataset) -> Iterator[Fleet]:
    made = Fleet(tmp_path, nano_built, tiny_dataset)
    yield made
    made.close()


FORMS = {
    "float16": UpdateForm("float16"),
    "int8": UpdateForm("int8"),
    "topk": UpdateForm("topk:0.1"),
    "clipped topk": UpdateForm("topk:0.1", clip_norm=0.05),
    "a private bias and int8": UpdateForm("int8", private=("classifier.bias",)),
}


@pytest.mark.parametrize("name", FORMS)
def test_devices_over_grpc_end_with_the_bits_of_the_simulation_in_every_form(
    fleet: Fleet, nano_artifact: Artifact, name: str
) -> None:
    update = FORMS[name]
    for index in range(2):
        fleet.device(index).start()
    theta = fleet.drive(update, evaluate_on_devices=True)
    simulated, results = fleet.simulate(nano_artifact, update, evaluate_on_devices=True)
    assert theta.tobytes() == simulated.tobytes()
    assert [r.bytes_up for r in fleet.results] == [r.bytes_up for r in results]
    assert [(r.accuracy, r.loss) for r in fleet.results] == [(r.accuracy, r.loss) for r in results]
    assert fleet.statuses() == {("aggregated", None)}
    form = form_of(update, fleet.built.manifest["trainable_sets"]["head"])
    for result in fleet.results[1:]:
        assert 0 < result.bytes_up - 2 * (form.most_bytes - HEADER_BYTES) < 2 * 400
    start = PlanTrainer(nano_artifact, "head").initial_theta()
    private = form.split.private(start)
    assert form.split.private(theta).tobytes() == private.tobytes(), "what is private stays as it was published"
    assert (form.split.shared(theta) != form.split.shared(start)).any()


SGD = LocalTraining(batch_size=4, learning_rate=0.05, max_length=32, optimizer="sgd")
ASKING: dict[str, tuple[UpdateForm, dict[str, Any]]] = {
    "A frozen": (UpdateForm(), {"strategy": "FFALoRA"}),
    "B and A in turn, what int8 leaves out of each sent later": (UpdateForm("int8"), {"strategy": "RoLoRA"}),
    "unequal ranks": (UpdateForm(), {"strategy": "ExactLoRA", "strategy_options": {"ranks": {"*-0": 1}}}),
    "a control variate": (UpdateForm(), {"strategy": "Scaffold", "local": SGD}),
}


@pytest.mark.parametrize("name", ASKING)
def test_devices_over_grpc_end_with_the_bits_of_the_simulation_whatever_a_strategy_asks(
    tmp_path: Path, nano_built: BuiltArtifact, nano_artifact: Artifact, tiny_dataset: Dataset, name: str
) -> None:
    update, settings = ASKING[name]
    fleet = Fleet(tmp_path, nano_built, tiny_dataset, "lora:4")
    try:
        for index in range(2):
            fleet.device(index).start()
        theta = fleet.drive(update, **settings)
        simulated, results = fleet.simulate(nano_artifact, update, **settings)
        assert fleet.statuses() == {("aggregated", None)}
        with fleet.store.read() as session:
            rows = session.scalars(sa.select(Assignment).order_by(Assignment.round, Assignment.device_id)).all()
            asked = [(a.round, a.config["update.frozen"], a.config["update.lora_rank"]) for a in rows]
            sent = [session.get_one(Blob, a.parameters).bytes for a in rows]
    finally:
        fleet.close()
    assert theta.tobytes() == simulated.tobytes()
    assert [r.bytes_up for r in fleet.results] == [r.bytes_up for r in results]
    layout = PlanTrainer(nano_artifact, "lora:4").layout
    sizes = {half: sum(p.size for p in layout if half in p.name) for half in ("lora_A", "lora_B", "classifier")}
    a, b, head = sizes.values()
    assert a + b + head == fleet.size
    values = {  # of a device's update in the first two rounds
        "FFALoRA": ([b + head] * 2, [b + head] * 2),
        "RoLoRA": ([b + head] * 2, [a + head] * 2),
        "ExactLoRA": ([(a + b) // 4 + head, fleet.size],) * 2,  # rank 1 of 4, and all of it
        "Scaffold": ([fleet.size] * 2,) * 2,
    }[settings["strategy"]]
    for result, counts in zip(fleet.results[1:], values, strict=False):
        each = (lambda n: n + 4 * -(-n // 256)) if update.codec == "int8" else (lambda n: 4 * n)
        assert 0 < result.bytes_up - sum(map(each, counts)) < 2 * 400
    tensors = 2 if settings["strategy"] == "Scaffold" else 1
    assert all(0 < count - 4 * tensors * fleet.size < 400 for count in sent), "theta goes down whole, and c beside it"
    expected = {
        "FFALoRA": [(n, ["lora_A"], 0) for n in (1, 1, 2, 2, 3, 3)],
        "RoLoRA": [(n, ["lora_A" if n % 2 else "lora_B"], 0) for n in (1, 1, 2, 2, 3, 3)],
        "ExactLoRA": [(n, [], rank) for n in (1, 2, 3) for rank in (1, 0)],
        "Scaffold": [(n, [], 0) for n in (1, 1, 2, 2, 3, 3)],
    }
    assert asked == expected[settings["strategy"]]


def test_the_proximal_term_of_fedprox_reaches_real_devices(fleet: Fleet, nano_artifact: Artifact) -> None:
    for index in range(2):
        fleet.device(index).start()
    start = PlanTrainer(nano_artifact, "head").initial_theta()
    pulled = {"strategy": "FedProx", "strategy_options": {"proximal_mu": 1000.0}, "rounds": 1, "release": False}
    held = fleet.drive(UpdateForm(), **pulled)
    free = fleet.drive(UpdateForm(), **pulled | {"strategy": "FedAvg", "strategy_options": {}})
    simulated, _ = fleet.simulate(nano_artifact, UpdateForm(), **pulled)
    assert held.tobytes() == simulated.tobytes()
    assert 0 < np.linalg.norm(held - start) < np.linalg.norm(free - start)


def test_a_base_that_is_held_is_never_sent_again(fleet: Fleet) -> None:
    for index in range(2):
        fleet.device(index).start()
    fleet.drive(UpdateForm("int8"))
    with fleet.store.read() as session:
        rows = session.execute(sa.select(Assignment.round, Assignment.bytes_down).order_by(Assignment.round)).all()
    later = [row.bytes_down for row in rows if row.round > 1]
    assert all(0 < count - 4 * fleet.size < 400 for count in later), (
        "the round's parameters, and no byte of the artifact"
    )


# ---- every byte ---------------------------------------------------------------------------------------------------------


class Tap:
    """A gRPC proxy that writes down, byte by byte, what a device says."""

    def __init__(self, target: str) -> None:
        self.said: list[tuple[str, bytes]] = []
        self.metadata: set[str] = set()
        self._channel = grpc.insecure_channel(target)
        self._server = grpc.server(ThreadPoolExecutor(16))
        self._server.add_generic_rpc_handlers((_Every(self._pass_on),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _pass_on(self, method: str, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        def recorded() -> Iterator[bytes]:
            for data in requests:
                self.said.append((method, data))
                yield data

        told = [(k, v) for k, v in context.invocation_metadata() if k != "user-agent"]
        self.metadata |= {k for k, _ in told}
        call = self._channel.stream_stream(method)(recorded(), metadata=told)
        context.add_callback(call.cancel)
        try:
            yield from call
        except grpc.RpcError as error:
            context.abort(error.code(), error.details() or "")

    def close(self) -> None:
        self._server.stop(0).wait()
        self._channel.close()


class _Every(grpc.GenericRpcHandler):
    def __init__(self, behaviour: Callable[..., Any]) -> None:
        self._behaviour = behaviour

    def service(self, details: Any) -> Any:
        return grpc.stream_stream_rpc_method_handler(lambda r, c: self._behaviour(details.method, r, c))


@pytest.fixture
def tap(fleet: Fleet) -> Iterator[Tap]:
    made = Tap(fleet.address)
    yield made
    for device in fleet.devices:
        device.close()
    made.close()


# Every field that a device may ever set, by message; what is not here must not be sent.
DECLARED = {
    "EnrolRequest": {"name", "channel", "protocol", "sdk_version", "token"},
    "CheckInRequest": {
        "protocol",
        "sdk_version",
        "examples",
        "wait_s",
        "release_id",
    },  # a tier only where the app gave one
    "HeartbeatRequest": {"assignment_id", "phase", "progress"},
    "UploadStatusRequest": {"assignment_id"},
    "UploadHeader": {"assignment_id", "total_bytes", "digest", "offset", "num_examples", "metrics"},
    "DeclineRequest": {"assignment_id", "reason"},
    "GetManifestRequest": {"version", "channel"},
    "DownloadRequest": {"digest", "first_chunk"},
}
REQUESTS = {
    f"/pocketfed.v1.{service}/{method.name}": (module, method.input_type.name)
    for module, service in ((fleet_pb2, "Fleet"), (distribution_pb2, "Distribution"))
    for method in module.DESCRIPTOR.services_by_name[service].methods
}
SECRET_TEXT, SECRET_LABEL = "xylophone quartz", "music"


def test_no_byte_leaves_a_device_that_the_run_did_not_declare(fleet: Fleet, tap: Tap, nano_artifact: Artifact) -> None:
    """A whole life, from enrolment to the third round, read on its way: known fields only, and an update that is, to the
    byte, what a simulation of the same device makes. No text, no label and no token of the tokenizer is in it."""
    fleet.parts[0] = [Example(f"{e.text} {SECRET_TEXT}", e.label) for e in fleet.parts[0]]
    update = UpdateForm("int8", private=("classifier.bias",), metrics=("loss", "steps"))
    seen = fleet.device(0, tap.address)
    other = fleet.device(1)
    for device in (seen, other):
        device.start()
    theta = fleet.drive(update)
    seen.stop()

    uploads: list[bytes] = []
    for method, data in tap.said:
        module, name = REQUESTS[method]
        message = getattr(module, name)()
        assert message.ParseFromString(data) == len(data)
        if name == "UploadPart":
            part = message.WhichOneof("part")
            if part == "data":
                assert message.SerializeToString() == fleet_pb2.UploadPart(data=message.data).SerializeToString()
                uploads[-1] += message.data
                continue
            message, name = message.header, "UploadHeader"
            assert set(message.metrics) == {"loss", "steps"}
            assert message.num_examples == 12
            uploads.append(b"")
        message.DiscardUnknownFields()
        assert {f.name for f, _ in message.ListFields()} <= DECLARED[name], name
        if method.endswith(("Enrol", "CheckIn", "Heartbeat", "Decline")):
            assert len(data) < 200
    assert tap.metadata <= {"authorization", "pocketfed-instance", "grpc-accept-encoding", "accept-encoding"}
    assert {m.rsplit("/", 1)[1] for m, _ in tap.said} >= {"Enrol", "CheckIn", "GetManifest", "Download", "Upload"}

    form = form_of(update, fleet.built.manifest["trainable_sets"]["head"])
    assert len(uploads) == ROUNDS
    digests = {hashlib.sha256(data).hexdigest() for data in uploads}
    for data in uploads:
        assert data == encode(form.codec, form.split.shared(form.read(data))), "nothing but the values"
    simulated, _ = fleet.simulate(nano_artifact, update)
    assert theta.tobytes() == simulated.tobytes()
    store = Store(str(fleet.folder / "simulated.db"))
    with store.read() as session:
        made = set(session.scalars(sa.text("SELECT digest FROM updates")))
    store.close()
    assert digests <= made, "to the byte what the declared arithmetic makes"

    # The coordinator's own names for assignments end so, and "rain" is a word of the texts.
    everything = b"\n".join(data for _, data in tap.said).replace(b"-train", b"")
    for e in fleet.parts[0]:
        for word in (*e.text.split(), e.label or ""):
            assert word.encode() not in everything or len(word) < 4, word
    for word in (SECRET_TEXT, *SECRET_TEXT.split(), SECRET_LABEL):
        assert word.encode() not in everything
        assert word.encode("utf-16-le") not in everything
    private = (fleet.folder / "home-0" / "kept.safetensors").read_bytes()[-16:]
    assert np.frombuffer(private, np.float32).any()
    assert private not in everything


# ---- refusing -----------------------------------------------------------------------------------------------------------


def test_an_app_may_refuse_a_run_by_what_it_declares_and_is_asked_once(fleet: Fleet) -> None:
    asked: list[RunDescription] = []

    def accept(run: RunDescription) -> bool | str:
        asked.append(run)
        return "it wants to know the loss" if "loss" in run.form.metrics else True

    _, picky = (fleet.device(0), fleet.device(1, accept=accept))
    for device in fleet.devices:
        device.start()
    with fleet.server.assignments.changed:
        assert fleet.server.assignments.changed.wait_for(lambda: len(fleet.server.online("stable")) == 2, PATIENCE_S)
    fleet.drive(UpdateForm("int8"), min_devices=1)
    assert len(asked) == 1
    assert asked[0].form == DeviceForm("int8")
    assert (asked[0].run, asked[0].trainable_set) == (fleet.run_id, "head")
    refused = [why for status, why in fleet.statuses() if status == "failed"]
    assert refused == ["RunRefused: the app takes no part in run 1: it wants to know the loss"]
    assert [r.devices for r in fleet.results[1:]] == [1, 1, 1]
    assert sum(r.failed for r in fleet.results[1:]) == 1, "asked in one round only"
    picky.close()
    again = fleet.device(1, accept=accept)  # a new process gives the same answer without asking the app
    again.start()
    fleet.drive(UpdateForm("int8", metrics=("steps",)))
    assert [run.run for run in asked] == [1, 2]
    assert picky.name == again.name
    assert {r.devices for r in fleet.results[1:]} == {2}


def test_a_form_of_a_newer_coordinator_is_declined_and_not_guessed() -> None:
    newer = fleet_pb2.Assignment(form=fleet_pb2.UpdateForm(codec="int8"))
    assert _form(newer) == DeviceForm("int8", metrics=())
    assert _form(fleet_pb2.Assignment()) == DeviceForm()
    newer.form.MergeFromString(b"\x98\x06\x01")  # field 99
    with pytest.raises(ConfigurationError, match="a form that this version does not know; update the app"):
        _form(newer)


def test_an_accept_callback_that_fails_has_not_agreed(fleet: Fleet) -> None:
    def accept(run: RunDescription) -> bool:
        raise KeyError("secret words")

    fleet.device(0).start()
    fleet.device(1, accept=accept).start()
    fleet.drive(UpdateForm(), rounds=1, quorum=1)
    refused = [why for status, why in fleet.statuses() if status == "failed"]
    assert refused == ["RunRefused: the app takes no part in run 1: its callback failed with KeyError"]


def test_devices_of_an_older_sdk_are_not_asked_for_a_form_they_do_not_know(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdk_link, "SDK_VERSION", "0.2.0")
    waiting = threading.Event()
    fleet.device(0, on_status=lambda status: waiting.set() if status == "waiting for work" else None).start()
    assert waiting.wait(PATIENCE_S)
    with pytest.raises(RunError, match=r"0 of at least 1 devices came within 0\.2 s"):
        fleet.drive(UpdateForm("int8"), min_devices=1, wait_s=0.2)
    fleet.drive(UpdateForm(), min_devices=1, rounds=1)
    assert fleet.statuses() == {("aggregated", None)}


def test_a_run_with_private_parameters_that_the_set_lacks_is_not_created(fleet: Fleet) -> None:
    with pytest.raises(RunError, match=r"update: no parameter of the trainable set is named 'pooler'"):
        fleet.drive(UpdateForm(private=("pooler",)))


def test_an_update_in_another_form_is_quarantined(fleet: Fleet) -> None:
    form = form_of(UpdateForm("topk:0.1"), fleet.built.manifest["trainable_sets"]["head"])
    values = np.ones(fleet.size, np.float32)
    assert len(encode(parse_codec("float32"), values)) < form.most_bytes, "so small a set: only its content tells"
    seen = fleet.device(0)
    fleet.device(1).start()
    honest = seen._link.upload

    def other_form(assignment: str, data: bytes, digest: str, *rest: Any) -> Any:
        wrong = encode(parse_codec("float16"), values)
        return honest(assignment, wrong, hashlib.sha256(wrong).hexdigest(), *rest)

    seen._link.upload = other_form  # type: ignore[method-assign]
    seen.start()
    fleet.drive(UpdateForm("topk:0.1"), rounds=1)
    quarantined = [why or "" for status, why in fleet.statuses() if status == "quarantined"]
    assert len(quarantined) == 1
    assert quarantined[0].startswith("unreadable: expected tensors ['high', 'low', 'scale', 'values'], found ['delta']")


def test_more_bytes_than_the_form_can_have_are_never_spooled(fleet: Fleet) -> None:
    update = UpdateForm("int8", private=("classifier.bias",))
    form = form_of(update, fleet.built.manifest["trainable_sets"]["head"])
    link = sdk_link.Link(fleet.address)
    link.enrol("raw", "stable", "A" * 43)
    done: list[Vector] = []
    driver = threading.Thread(target=lambda: done.append(fleet.drive(update, min_devices=1, rounds=1)))
    driver.start()
    reply = fleet_pb2.CheckInReply()
    while not reply.HasField("assignment"):  # the release comes first
        reply = link.end_check_in(link.begin_check_in(12, 1, PATIENCE_S))
    told = reply.assignment.form
    assert (told.codec, list(told.private)) == ("int8", ["classifier.bias"])
    long = b"x" * (form.most_bytes + 1)
    with pytest.raises(sdk_link.Refused, match="is larger than the") as refused:
        link.upload(reply.assignment.id, long, hashlib.sha256(long).hexdigest(), 12, {})
    assert refused.value.code == "RESOURCE_EXHAUSTED"
    assert not any(fleet.server.assignments.spool.iterdir())
    values = np.linspace(-1, 1, form.split.shared_size, dtype=np.float32)
    data = encode(form.codec, values)
    assert link.upload(reply.assignment.id, data, hashlib.sha256(data).hexdigest(), 12, {}).accepted
    link.close()
    driver.join(PATIENCE_S)
    assert done
    assert fleet.statuses() == {("aggregated", None)}


# ---- kill -9 ------------------------------------------------------------------------------------------------------------

KILLED = """
import os, sys
from pocketfed.client_sdk import link
link.SDK_VERSION = "0.3.0"
from pocketfed.client_sdk import Device, participation
uploaded, link_class = 0, link.Link
upload, point = link_class.upload, sys.argv[3]
def dies(self, assignment, data, *rest):
    if point == "before":
        os._exit(9)
    receipt = upload(self, assignment, data, *rest)
    os._exit(9)
if point != "never":
    link_class.upload = dies
device = Device(sys.argv[1], sys.argv[2], name="device-0")
device._participation.run()
"""


@pytest.mark.slow
def test_a_device_killed_around_its_upload_ends_with_the_bits_of_one_that_never_was(
    fleet: Fleet, nano_artifact: Artifact
) -> None:
    """Killed before the first byte of an update was sent, and again when its receipt had come: the residual counts once."""
    update = UpdateForm("topk:0.1", private=("classifier.bias",))
    fleet.device(0).close()  # its examples lie in home
    fleet.device(1).start()
    done: list[Vector] = []
    driver = threading.Thread(target=lambda: done.append(fleet.drive(update)))
    driver.start()
    home = str(fleet.folder / "home-0")
    for point in ("before", "after", "before", "after"):
        killed = subprocess.run([sys.executable, "-c", KILLED, fleet.address, home, point], timeout=120, check=False)
        assert killed.returncode == 9
    last = subprocess.Popen([sys.executable, "-c", KILLED, fleet.address, home, "never"])
    driver.join(120)
    last.kill()
    last.wait()
    assert fleet.statuses() == {("aggregated", None)}
    simulated, _ = fleet.simulate(nano_artifact, update)
    assert done[0].tobytes() == simulated.tobytes()
