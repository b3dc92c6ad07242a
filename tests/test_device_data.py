"""A device's data on the way through its life: hostile text, full disks, feedback and keys, against a real coordinator."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from pocketfed.client_sdk import Device
from pocketfed.client_sdk.errors import ConfigurationError
from pocketfed.coordinator.artifacts import BuiltArtifact, publish_artifact
from pocketfed.coordinator.config import LocalTraining, RunConfig
from pocketfed.coordinator.grid import FleetGrid
from pocketfed.coordinator.rounds import create_run, drive_run
from pocketfed.coordinator.server import CoordinatorServer, ServerConfig
from pocketfed.coordinator.store import Device as DeviceRow
from pocketfed.coordinator.store import Store, Update
from pocketfed.model.tasks import Dataset

PATIENCE_S = 60.0  # for what takes a second on an idle machine
KEY = bytes(range(32))


class Fleet:
    """A coordinator with the nano artifact released, and its devices."""

    def __init__(self, folder: Path, built: BuiltArtifact) -> None:
        self.store = Store(str(folder / "fleet.db"))
        with self.store.write() as session:
            publish_artifact(session, built, "stable", "head")
        self.server = CoordinatorServer(self.store, ServerConfig("127.0.0.1:0"), folder / "spool")
        self.address = f"127.0.0.1:{self.server.start()}"
        self.home = folder / "home"
        self.size = int(built.manifest["trainable_sets"]["head"]["size"])
        self._said: list[str] = []
        self._news = threading.Condition()
        self._devices: list[Device] = []

    def device(self, **options: Any) -> Device:
        self._devices.append(Device(self.address, self.home, name="phone", on_status=self._hear, **options))
        return self._devices[-1]

    def _hear(self, status: str) -> None:
        with self._news:
            self._said.append(status)
            self._news.notify_all()

    def wait(self, status: str) -> None:
        with self._news:
            found = self._news.wait_for(lambda: any(status in s for s in self._said), PATIENCE_S)
        assert found, f"never said {status!r}: {self._said}"

    def reported(self) -> int | None:
        with self.store.read() as session:
            return session.scalar(sa.select(DeviceRow.examples))

    def drive(self, rounds: int = 1) -> None:
        local = LocalTraining(batch_size=4, learning_rate=0.01, max_length=32)
        config = RunConfig(min_devices=1, rounds=rounds, wait_s=PATIENCE_S, local=local)
        run_id = create_run(self.store, config)
        grid = FleetGrid(self.server.assignments, run_id, lambda: self.server.online("stable"), self.size, PATIENCE_S)
        drive_run(self.store, run_id, grid, config, None, lambda result: None, self.server.assignments.forget)

    def trained_on(self) -> list[int]:
        with self.store.read() as session:
            return list(session.scalars(sa.select(Update.num_examples)))

    def close(self) -> None:
        for device in self._devices:
            device.close()
        self.server.stop()
        self.store.close()


@pytest.fixture
def fleet(tmp_path: Path, nano_built: BuiltArtifact) -> Iterator[Fleet]:
    made = Fleet(tmp_path, nano_built)
    yield made
    made.close()


def test_what_the_user_corrects_is_what_the_next_round_trains_on(fleet: Fleet, tiny_dataset: Dataset) -> None:
    with fleet.device() as device:
        kept = [device.predict(e.text, keep=True) for e in tiny_dataset.train[:6]]
        assert [p.example_id for p in kept] == [1, 2, 3, 4, 5, 6]
        assert device.predict("not kept").example_id == 0
        assert not device.correct(0, "music")
        assert (device.count(), device.count(labelled=True)) == (6, 0)
        for prediction, example in zip(kept, tiny_dataset.train, strict=False):
            assert device.correct(prediction.example_id, str(example.label))
        assert device.forget(kept[0].example_id) == 1
        device.start()
        fleet.drive()
        assert fleet.trained_on() == [5]


def test_a_label_that_was_corrected_in_place_is_read_again(fleet: Fleet) -> None:
    device = fleet.device()
    (first, _) = device.add_examples([("play some jazz", "alarm"), ("wake me at noon", "alarm")]).ids
    trainer = device._model().trainer
    before = device._local.training(trainer, 32)
    assert device._local.training(trainer, 32) is before, "it is kept while nothing changes"
    device.predict("dim the hall light", keep=True)
    assert device._local.training(trainer, 32) is before, "what has no label is not trained on"
    device.correct(first, "music")
    after = device._local.training(trainer, 32)
    assert (list(before.labels), list(after.labels)) == ([0, 0], [2, 0])


@pytest.mark.parametrize(
    ("examples", "status"),
    [
        ([], "waiting for work; not eligible: no labelled examples"),
        ([("", "music"), ("play", None)], "not eligible: no labelled examples"),
        ([("play", "music"), ("sing", "music")], "all 2 examples that it can learn from have the same label"),
        ([("play", "out of range"), ("sing", "another")], "not eligible: none of 2 labels is one of the model's"),
        ([("play", "music"), ("sing", "out of range")], "all 1 examples that it can learn from have the same label"),
    ],
    ids=["empty", "hostile or without a label", "one class", "labels out of range", "one class and out of range"],
)
def test_fault_27_a_device_that_cannot_learn_says_so_and_is_not_counted_on(
    examples: Any, status: str, fleet: Fleet
) -> None:
    device = fleet.device()
    device.fetch()
    device.add_examples([("before", "music"), ("and", "alarm")])
    device.forget()
    device.add_examples(examples)
    device.start()
    fleet.wait(status)
    device.stop()
    assert fleet.reported() == 0


def test_fault_27_only_examples_with_a_label_that_the_model_knows_are_reported_and_trained_on(
    fleet: Fleet, tiny_dataset: Dataset
) -> None:
    device = fleet.device()
    device.fetch()
    hostile = [("\0", "music"), ("a" * 10_000_000, "music"), (None, "music"), ("no label", None)]
    odd = [("\u202eשלום 👩‍👩‍👧 " * 20, "music"), ("word " * 190_000, "lights"), ("weather\0\ud800", "weather")]
    of_another_model = [(f"text {i}", "out of range") for i in range(3)]
    added = device.add_examples([*hostile, *odd, *of_another_model])  # type: ignore[list-item]
    assert (added.added, sum(added.skipped.values())) == (7, 3)
    device.add_examples((e.text, e.label) for e in tiny_dataset.train[:4])
    device.start()
    fleet.drive()
    assert (fleet.trained_on(), fleet.reported()) == ([7], 7)
    assert device.count(labelled=True) == 10
    examples = device._local.training(device._model().trainer, 32)
    assert (examples.truncated, max(map(len, examples.rows))) == (2, 32)


def test_fault_27_a_damaged_checkpoint_and_store_cost_what_they_held_and_no_round(
    fleet: Fleet, tiny_dataset: Dataset
) -> None:
    fleet.home.mkdir()
    (fleet.home / "training.safetensors").write_bytes(b"\xff" * 1000)
    (fleet.home / "examples.db").write_bytes(b"\xff" * 10_000)
    device = fleet.device()
    device.add_examples((e.text, e.label) for e in tiny_dataset.train[:4])
    device.start()
    fleet.drive()
    assert fleet.trained_on() == [4]
    assert not (fleet.home / "training.safetensors").exists()


@pytest.mark.skipif(os.name == "nt", reason="file modes are POSIX's")
def test_with_a_key_no_file_in_home_has_the_text_and_none_is_for_others(fleet: Fleet, tiny_dataset: Dataset) -> None:
    device = fleet.device(examples_key=KEY)
    device.add_examples((e.text, e.label) for e in tiny_dataset.train[:8])
    device.start()
    fleet.drive()
    assert fleet.trained_on() == [8]
    files = [p for p in fleet.home.rglob("*") if p.is_file()]
    assert {"examples.db", "examples.db-wal", "identity.json"} <= {p.name for p in files}
    contents = [p.read_bytes() for p in files]
    assert not any(e.text.encode() in content for e in tiny_dataset.train[:8] for content in contents)
    assert fleet.home.stat().st_mode & 0o777 == 0o700
    public = {p.relative_to(fleet.home).parts[0].split("-")[0] for p in files if p.stat().st_mode & 0o077}
    assert public <= {"artifacts", "theta", "lock", "trust.json"}, "models, a process's number, and whom to trust"


def test_the_wrong_key_is_refused_and_leaves_home_free_for_the_right_one(fleet: Fleet) -> None:
    with fleet.device(examples_key=KEY) as device:
        device.add_examples([("play", "music")])
    for key in (None, bytes(32)):
        with pytest.raises(ConfigurationError, match=r"examples\.db .*encrypted"):
            fleet.device(examples_key=key)
    assert fleet.device(examples_key=KEY).count() == 1


FULL = """
import os, subprocess, sys
from pathlib import Path
from pocketfed.client_sdk import Device, StorageError

address, folder = sys.argv[1], Path(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)], check=True)
filler = folder / "filler"
def open_device():
    return Device(address, folder / "home", name="phone", on_status=lambda status: print(status, flush=True))
def fill():
    with filler.open("ab", buffering=0) as file:
        for size in (1 << 20, 4096):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                pass
examples = [(f"play song {i}", ("music", "alarm")[i % 2]) for i in range(8)]
for opened_before in (True, False):
    device = open_device() if opened_before else None
    fill()
    device = device or open_device()
    added = device.add_examples(examples * 500)
    assert added.added == 0 and list(added.skipped.values()) == [4000], added
    assert set(added.ids) == {0}
    assert not device.correct(1, "music")
    try:
        device.predict("play")
        raise SystemExit("it fetched a model without space")
    except StorageError as error:
        print(error, flush=True)
    assert device.forget() == 0
    if opened_before:
        device.close()
device.start()
assert sys.stdin.readline() == "there is space\\n"
filler.unlink()
assert device.add_examples(examples).added == 8
sys.stdin.readline()
device.close()
"""


def test_fault_27_a_device_on_a_full_disk_says_so_and_goes_on_when_there_is_space(fleet: Fleet, tmp_path: Path) -> None:
    """The disk is one in memory, in a namespace of the child's own."""
    command = ["unshare", "--user", "--map-root-user", "--mount"]
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if not shutil.which("unshare") or subprocess.run([*command, *mount], check=False, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk in a namespace of their own")
    child = subprocess.Popen(
        [*command, sys.executable, "-c", FULL, fleet.address, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        said = iter(child.stdout.readline, "")
        full = f"the disk of {folder / 'home'} does not take it: No space left on device; free some space\n"
        assert full in said, child.stderr and child.stderr.read()
        assert f"will try again: {full}" in said
        child.stdin.write("there is space\n")
        child.stdin.flush()
        fleet.drive()
        assert fleet.trained_on() == [8]
        _, errors = child.communicate("end\n", timeout=PATIENCE_S)
        assert (child.returncode, errors) == (0, "")
    finally:
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout, child.stderr):
            assert stream is not None
            stream.close()
