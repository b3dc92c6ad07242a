"""What befalls a device: killed, unplugged, moved to a metered network, forked, on a full disk, beside itself (faults 2, 26 to 29)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from safetensors import safe_open

from pocketfed.client_sdk import (
    ArtifactError,
    Conditions,
    ConfigurationError,
    Device,
    LinkError,
    Progress,
    Readings,
    link,
    status,
)
from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.perform import Task, perform
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples, TrainConfig
from pocketfed.coordinator.artifacts import BuiltArtifact, publish_artifact
from pocketfed.coordinator.config import LocalTraining, RunConfig
from pocketfed.coordinator.grid import FleetGrid
from pocketfed.coordinator.rounds import RoundResult, RunError, create_run, drive_run
from pocketfed.coordinator.server import CoordinatorServer, ServerConfig
from pocketfed.coordinator.store import Assignment, Store, Update, latest_release, put_blob
from pocketfed.coordinator.store import Device as DeviceRow
from pocketfed.model.parameters import encode_vector
from pocketfed.model.tasks import Dataset

PATIENCE_S = 30.0
ENDS_S = 8.0  # a machine under load may take a while; sensors are read every ten seconds, polls last longer
EXAMPLES = 12
LOCAL = LocalTraining(epochs=1000, batch_size=4, learning_rate=0.01, max_length=32, max_steps=60)
GOOD = Readings(charging=True, battery=90, metered=False, idle=True, temperature_c=30)
ASKED = Conditions(charging=True, battery=50, unmetered=True, idle=True, max_temperature_c=40, patience_s=20)
LOST = {
    "charging": {"charging": False},
    "battery": {"battery": 32.0},
    "idle": {"idle": False},
    "temperature": {"temperature_c": 48.0},
    "app": {"hold": "the app to come back to the front"},
}


class Sensors:
    """What the device reads; changed at a named moment of its work."""

    def __init__(self) -> None:
        self.now = GOOD
        self.moments: list[tuple[str, float, Callable[[], None]]] = []
        self.progress: list[Progress] = []

    def __call__(self) -> Readings:
        return self.now

    def at(self, phase: str, fraction: float, act: Callable[[], None]) -> None:
        self.moments.append((phase, fraction, act))

    def hear(self, progress: Progress) -> None:
        self.progress.append(progress)
        due = [m for m in self.moments if progress.phase == m[0] and progress.fraction >= m[1]]
        self.moments = [m for m in self.moments if m not in due]
        for _, _, act in due:
            act()


class Scene:
    """A coordinator with the nano artifact, a run in the background, and devices that are changed while they work."""

    def __init__(self, folder: Path, built: BuiltArtifact, artifact: Artifact, dataset: Dataset) -> None:
        self.folder, self.artifact, self.dataset = folder, artifact, dataset
        self.store = Store(str(folder / "fleet.db"))
        with self.store.write() as session:
            publish_artifact(session, built, "stable", "norms")
        self.server = CoordinatorServer(self.store, ServerConfig("127.0.0.1:0", lease_s=15.0), folder / "spool")
        self.address = f"127.0.0.1:{self.server.start()}"
        self.size = int(built.manifest["trainable_sets"]["norms"]["size"])
        self.sensors, self.said, self.devices = Sensors(), list[str](), list[Device]()
        self._news = threading.Condition()
        self._runs: list[threading.Thread] = []
        self._giving_up = threading.Event()
        self.results: list[RoundResult] = []

    def device(self, **options: Any) -> Device:
        usual = {
            "conditions": ASKED,
            "on_status": self.hear,
            "on_progress": self.sensors.hear,
            "readings": self.sensors,
        }
        made = Device(self.address, self.folder / "home", name="phone", **(usual | options))
        self.devices.append(made)
        if not made.examples.count():
            made.add_examples((e.text, e.label) for e in self.dataset.train[:EXAMPLES])
        return made

    def hear(self, status: str) -> None:
        with self._news:
            self.said.append(status)
            self._news.notify_all()

    def wait(self, start: str, after: int = 0) -> None:
        with self._news:
            heard = self._news.wait_for(lambda: any(s.startswith(start) for s in self.said[after:]), PATIENCE_S)
        assert heard, f"never said {start!r}: {self.said}"

    def begin(self, local: LocalTraining = LOCAL, **settings: Any) -> None:
        """A run of one round of one device, in the background."""
        config = RunConfig(
            **({"min_devices": 1, "rounds": 1, "seed": 3, "wait_s": PATIENCE_S, "local": local} | settings)
        )
        run_id = create_run(self.store, config)
        online = lambda: self.server.online("stable")  # noqa: E731
        grid = FleetGrid(self.server.assignments, run_id, online, self.size, 5.0)
        self.results = []

        def drive() -> None:
            with contextlib.suppress(RunError):  # a test that fails its only round
                drive_run(self.store, run_id, grid, config, None, self.results.append, self.server.assignments.forget,
                          self._giving_up.is_set)  # fmt: skip

        self._runs.append(threading.Thread(target=drive))
        self._runs[-1].start()

    def end(self) -> RoundResult:
        self._runs[-1].join(PATIENCE_S)
        assert not self._runs[-1].is_alive(), self.said
        return self.results[-1]

    def assignment(self) -> Assignment:
        with self.store.read() as session:
            return session.scalars(sa.select(Assignment).order_by(Assignment.offered_at.desc())).first()  # type: ignore[return-value]

    def expected_digest(self) -> str:
        """Of the update that the last assignment asked for, computed without interruption."""
        assignment = self.assignment()
        trainer = PlanTrainer(self.artifact, "norms")
        index = {label: i for i, label in enumerate(self.artifact.manifest.labels)}
        mine = self.dataset.train[:EXAMPLES]
        examples = Examples(trainer.encode([e.text for e in mine], None, 32), np.array([index[e.label] for e in mine]))
        task = Task("train", trainer.initial_theta(), TrainConfig.from_mapping(assignment.config), 1, "phone")
        return hashlib.sha256(encode_vector("delta", perform(trainer, task, examples).delta)).hexdigest()

    def digest(self) -> str:
        with self.store.read() as session:
            return session.scalars(sa.select(Update.digest)).one()

    def parts(self) -> list[int]:
        """Sizes of what has arrived of updates that are not complete."""
        return [p.stat().st_size for p in (self.folder / "spool").glob("*.part")]

    def close(self) -> None:
        self._giving_up.set()
        for device in self.devices:
            device.close()
        self.server.stop()
        for run in self._runs:
            run.join()
        self.store.close()


@pytest.fixture
def scene(
    tmp_path: Path,
    nano_built: BuiltArtifact,
    nano_artifact: Artifact,
    tiny_dataset: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Scene]:
    monkeypatch.setattr(status, "OFTEN_S", 0.0)  # every step is told, however fast the machine is
    made = Scene(tmp_path, nano_built, nano_artifact, tiny_dataset)
    yield made
    made.close()


# ---- 26: conditions come and go --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOST)
def test_fault_26_training_stops_within_a_step_and_goes_on_to_the_same_bits_when_the_condition_is_back(
    scene: Scene, name: str
) -> None:
    device = scene.device()

    def lose() -> None:
        scene.sensors.now = replace(GOOD, **LOST[name])
        device.reconsider()

    scene.sensors.at("training", 0.5, lose)
    device.start()
    scene.begin()
    scene.wait("round 1 is broken off; waits for ")
    assert list(device.state().waits_for)
    lost_at = next(p.fraction for p in scene.sensors.progress if p.phase == "training" and p.fraction >= 0.5)
    with safe_open(scene.folder / "home" / "training.safetensors", "np") as kept:
        assert json.loads(kept.metadata()["state"])["steps"] == round(60 * lost_at)  # not one more
    scene.sensors.now = GOOD
    device.reconsider()
    assert scene.end().devices == 1
    assert scene.digest() == scene.expected_digest()
    assert not (scene.folder / "home" / "training.safetensors").exists()


def test_fault_26_a_condition_that_is_only_read_stops_training_at_the_second_it_is_read(scene: Scene) -> None:
    seen, at_break = 0, list[int]()

    def read() -> Readings:
        nonlocal seen
        seen += scene.sensors.now.charging is False
        return scene.sensors.now

    def hear(status: str) -> None:
        at_break.extend([seen] if "is broken off" in status and not at_break else [])
        scene.hear(status)

    device = scene.device(readings=read, on_status=hear)

    def unplug() -> None:
        scene.sensors.now = replace(GOOD, charging=False)

    scene.sensors.at("training", 0.0, unplug)
    device.start()
    scene.begin(LocalTraining(epochs=1000, batch_size=1, max_length=32, max_steps=12000))
    scene.wait("round 1 is broken off; waits for a charger (it is not plugged in)")
    assert at_break == [1], "the first reading that shows it, and one is made every second"


def test_fault_26_a_round_is_given_back_if_the_condition_stays_away_and_what_the_sensors_say_is_not_told(
    scene: Scene,
) -> None:
    device = scene.device(conditions=replace(ASKED, patience_s=0.0))

    def lose() -> None:
        scene.sensors.now = replace(GOOD, battery=32.0, temperature_c=55.0)
        device.reconsider()

    scene.sensors.at("training", 0.3, lose)
    device.start()
    scene.begin(max_attempts=1, max_failed_rounds=1)
    scene.wait("gave round 1 back; waits for a battery of 50 % (it has 32 %), at most 40 °C (it has 55 °C)")
    scene.wait("waits for a battery of 50 % (it has 32 %)")
    assert (scene.assignment().status, scene.assignment().error) == ("failed", "NOT_ELIGIBLE: battery, temperature")
    assert (scene.folder / "home" / "training.safetensors").exists()  # the same round may come again


def test_fault_26_an_update_is_kept_while_the_network_is_metered_and_sent_when_it_no_longer_is(scene: Scene) -> None:
    device = scene.device()
    scene.sensors.at("training", 1.0, lambda: setattr(scene.sensors, "now", replace(GOOD, metered=True)))
    scene.sensors.at("training", 1.0, device.reconsider)
    device.start()
    scene.begin()
    scene.wait("the update of round 1 is kept; waits for an unmetered network (this one is metered)")
    assert scene.parts() == []
    assert not any(p.phase == "uploading" for p in scene.sensors.progress)
    assert (scene.folder / "home" / "update.kept").exists()
    scene.sensors.now = GOOD
    device.reconsider()
    assert scene.end().devices == 1
    assert scene.digest() == scene.expected_digest()
    scene.wait("handed in")
    assert not (scene.folder / "home" / "update.kept").exists()


def test_fault_26_an_upload_stops_when_the_network_becomes_metered_and_goes_on_where_it_was(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "UPLOAD_BYTES", 1024)
    device = scene.device()

    def to_cellular() -> None:
        scene.sensors.now = replace(GOOD, metered=True)
        device.reconsider()

    scene.sensors.at("uploading", 0.0, to_cellular)
    device.start()
    scene.begin()
    scene.wait("the update of round 1 is kept; waits for an unmetered network")
    (arrived,) = scene.parts()
    assert 1024 <= arrived < 4 * scene.size
    mark = len(scene.sensors.progress)
    scene.sensors.now = GOOD
    device.reconsider()
    assert scene.end().devices == 1
    assert scene.digest() == scene.expected_digest()
    again = [p.fraction for p in scene.sensors.progress[mark:] if p.phase == "uploading"]
    assert min(again) >= arrived / (4 * scene.size + 200)


def test_fault_26_a_download_stops_when_the_network_becomes_metered_and_goes_on_where_it_was(scene: Scene) -> None:
    device = scene.device()
    first: list[int] = []
    download = device._link.download

    def watched(digest: str, first_chunk: int = 0) -> Iterator[bytes]:
        first.append(first_chunk)
        for chunk in download(digest, first_chunk):
            yield chunk
            if not first[1:]:
                scene.sensors.now = replace(GOOD, metered=True)
                device.reconsider()

    device._link.download = watched  # type: ignore[method-assign]
    device.start()
    scene.wait("waits for an unmetered network (this one is metered)")
    with pytest.raises(LinkError, match="no model is fetched now: the device waits for an unmetered network"):
        device.predict("play some jazz")
    partial = list((scene.folder / "home" / "artifacts").glob("*.partial/*"))
    assert sum(p.stat().st_size for p in partial) > 0
    scene.sensors.now = GOOD
    device.reconsider()
    scene.wait("waiting for work", len(scene.said))
    assert device.predict("play some jazz").label in scene.dataset.labels
    fetched = {f.sha256: f.bytes for f in scene.artifact.manifest.files.values()}
    assert len(first) <= len(fetched) + 2  # no file that was there came again


def test_fault_26_a_device_that_may_not_train_asks_for_no_work_but_takes_new_models(scene: Scene) -> None:
    scene.sensors.now = replace(GOOD, charging=False)
    device = scene.device()
    device.start()
    scene.wait("waits for a charger (it is not plugged in)")
    assert device.state().release == 1
    assert device.predict("play some jazz").label in scene.dataset.labels
    with scene.store.read() as session:
        assert session.scalars(sa.select(DeviceRow.examples)).one() == 0  # that it could train on now
    assert scene.server.online("stable") == {}
    scene.sensors.now = GOOD
    device.reconsider()
    scene.begin()
    assert scene.end().devices == 1


def test_the_data_of_a_day_ends_transfers_until_tomorrow(scene: Scene) -> None:
    device = scene.device(conditions=Conditions(max_mb_per_day=0.02))
    device.start()
    scene.wait("waits for tomorrow (")
    used = device.state().bytes_today
    assert 20_000 <= used < 20_000 + (1 << 20) + 5000  # at most a chunk over
    device.close()
    assert json.loads((scene.folder / "home" / "usage.json").read_text())["bytes"] >= used


def test_rounds_keep_their_distance(scene: Scene) -> None:
    device = scene.device(conditions=Conditions(min_separation_s=3600))
    device.start()
    scene.begin()
    assert scene.end().devices == 1
    scene.wait("waits for 3600 s between rounds to pass")
    device.close()
    scene.said.clear()
    scene.device(conditions=Conditions(min_separation_s=3600)).start()
    scene.wait("waits for 3600 s between rounds to pass")


# ---- 2: killed -------------------------------------------------------------------------------------------------------


APP = """
import os, signal, sys, threading, time
from pathlib import Path
from pocketfed.client_sdk import Device, link, status
status.OFTEN_S = 0.0
address, home, phase, fraction, spool = sys.argv[1:]
link.UPLOAD_BYTES = 1024
def hear(progress):
    if progress.phase == phase and progress.fraction >= float(fraction):
        while phase == "uploading" and not any(p.stat().st_size for p in Path(spool).glob("*.part")):
            time.sleep(0.005)  # until the coordinator has some of it
        os.kill(os.getpid(), signal.SIGKILL)
Device(address, home, name="phone", checkpoint_s=0.0, on_progress=hear).start()
threading.Event().wait()
"""


def killed(scene: Scene, phase: str, fraction: float) -> None:
    """A device that is killed at a point of a round, in a process of its own."""
    scene.device().close()  # its examples
    scene.begin()
    app = [sys.executable, "-c", APP, scene.address, str(scene.folder / "home"), phase, str(fraction)]
    done = subprocess.run([*app, str(scene.folder / "spool")], timeout=60, capture_output=True, check=False)
    assert done.returncode == -9, done.stderr


def test_fault_02_a_device_killed_in_training_goes_on_from_its_checkpoint_to_the_same_bits(scene: Scene) -> None:
    killed(scene, "training", 0.5)
    assert scene.assignment().status == "accepted"
    device = scene.device()
    downloads: list[str] = []
    download = device._link.download
    device._link.download = lambda *a: downloads.append(a[0]) or download(*a)  # type: ignore[method-assign, func-returns-value]
    device.start()
    assert scene.end().devices == 1
    assert scene.digest() == scene.expected_digest()
    training = [p.fraction for p in scene.sensors.progress if p.phase == "training"]
    assert min(training) > 0.5
    there = {f.sha256 for f in scene.artifact.manifest.files.values()} | {scene.assignment().parameters}
    assert not there & set(downloads)


def test_fault_02_a_device_killed_in_its_upload_goes_on_with_the_bytes_that_are_missing(scene: Scene) -> None:
    killed(scene, "uploading", 0.3)
    (arrived,) = scene.parts()
    assert arrived > 0
    device = scene.device()
    device.start()
    assert scene.end().devices == 1
    assert scene.digest() == scene.expected_digest()
    assert not any(s.startswith(("training", "preparing")) for s in scene.said)  # it was done already
    first = next(p for p in scene.sensors.progress if p.phase == "uploading")
    assert first.fraction >= arrived / (4 * scene.size + 200)


def test_fault_02_an_update_whose_round_has_ended_meanwhile_is_dropped_and_the_device_goes_on(scene: Scene) -> None:
    killed(scene, "uploading", 0.3)
    scene.server.assignments.expire([scene.assignment().id], "the round's deadline has passed")
    scene.device().start()
    scene.wait("not taken: the assignment has ended: the round's deadline has passed")
    assert not (scene.folder / "home" / "update.kept").exists()
    assert scene.end().devices == 1  # in its next attempt


# ---- 14 and 19: what a coordinator should not send ---------------------------------------------------------------------


def test_fault_14_parameters_that_are_not_what_was_promised_are_dropped_and_a_broken_download_goes_on(
    scene: Scene,
) -> None:
    device = scene.device()
    device.fetch()
    values = np.arange(600_000, dtype=np.float32)  # three chunks
    data = encode_vector("theta", values)
    with scene.store.write() as session:
        digest = put_blob(session, data)
    download, asked = device._link.download, list[int]()

    def sent(change: Callable[[bytes], bytes], most: int) -> Any:
        def send(digest: str, first_chunk: int = 0) -> Iterator[bytes]:
            asked.append(first_chunk)
            yield from [change(c) for c in list(download(digest, first_chunk))[:most]]

        return send

    device._link.download = sent(lambda c: bytes(len(c)), 3)  # type: ignore[method-assign]
    with pytest.raises(ArtifactError, match=f"do not have the digest {digest[:12]}"):
        device._models.parameters(digest, len(values))
    for most in (2, 3):
        device._link.download = sent(bytes, most)  # type: ignore[method-assign]
        with contextlib.suppress(ArtifactError):
            found = device._models.parameters(digest, len(values))
    assert found.tobytes() == values.tobytes()
    assert asked == [0, 0, 2]
    device._link.download = sent(bytes, 0)  # type: ignore[method-assign]
    assert device._models.parameters(digest, len(values)).tobytes() == values.tobytes()  # from disk
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": 77}, "UnsupportedError: an assignment of kind 77 is not known to this SDK: update the app"),
        ({"kind": 0}, "UnsupportedError: an assignment of kind 0 is not known"),
        ({"trainable_set": "../x"}, "ArtifactError: the artifact"),
        ({"artifact_version": "../x"}, "Refused: "),
        ({"parameters_digest": "../../x"}, "ArtifactError: '../../x' is not a SHA-256"),
    ],
)
def test_fault_19_an_assignment_that_makes_no_sense_here_is_given_back_with_the_reason(
    scene: Scene, change: dict[str, Any], says: str
) -> None:
    device = scene.device()
    end = device._link.end_check_in

    def changed(call: Any) -> Any:
        reply = end(call)
        if reply.HasField("assignment"):
            for name, value in change.items():
                setattr(reply.assignment, name, value)
        return reply

    device._link.end_check_in = changed  # type: ignore[method-assign]
    device.start()
    scene.begin(max_attempts=1, max_failed_rounds=1)
    scene.wait("cannot do round 1: ")
    scene.wait("waiting for work", scene.said.index(next(s for s in scene.said if s.startswith("cannot do round"))))
    assert (scene.assignment().error or "").startswith(says)
    assert device.predict("play some jazz").label in scene.dataset.labels


# ---- 27: a full disk and a damaged checkpoint ------------------------------------------------------------------------


def on_a_full_disk(path: Path) -> None:
    """What is written there next fails as on a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".partial").symlink_to("/dev/full")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_fault_27_a_full_disk_costs_the_checkpoint_and_the_kept_update_but_not_the_round(scene: Scene) -> None:
    device = scene.device(checkpoint_s=0.0)
    on_a_full_disk(scene.folder / "home" / "update.kept")
    on_a_full_disk(scene.folder / "home" / "training.safetensors")
    on_a_full_disk(scene.folder / "home" / "usage.json")
    device.start()
    scene.begin()
    assert scene.end().devices == 1
    assert scene.digest() == scene.expected_digest()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_fault_27_on_a_full_disk_no_model_is_taken_and_the_device_goes_on_when_there_is_room(scene: Scene) -> None:
    device = scene.device()
    on_a_full_disk(scene.folder / "home" / "release.json")
    device.start()
    scene.wait("will try again: the disk of")
    assert "No space left on device" in device.state().last_error
    (scene.folder / "home" / "release.json.partial").unlink(missing_ok=True)
    scene.wait("waiting for work", len(scene.said))
    assert device.predict("play some jazz").label in scene.dataset.labels


def test_fault_27_a_damaged_checkpoint_or_kept_update_is_passed_over(scene: Scene) -> None:
    device = scene.device()
    for name in ("training.safetensors", "update.kept"):
        (scene.folder / "home" / name).write_bytes(b"\x00" * 100)
    device.start()
    scene.begin()
    assert scene.end().devices == 1
    assert scene.digest() == scene.expected_digest()


# ---- 28: an app that does what apps do -------------------------------------------------------------------------------


def test_fault_28_two_threads_may_start_stop_and_predict_at_once(scene: Scene) -> None:
    device = scene.device()
    failures: list[BaseException] = []

    def use() -> None:
        try:
            for _ in range(5):
                device.start()
                device.predict("play some jazz")
                device.add_examples([("play a waltz", "music")])
                device.state()
                device.stop()
        except LinkError:
            pass  # the other thread's stop() ended the first fetch
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert failures == []
    device.stop()
    assert [t.name for t in threading.enumerate() if t.name == "pocketfed-phone"] == []
    device.start()
    scene.begin()
    assert scene.end().devices == 1


def test_fault_28_a_second_device_on_a_home_is_refused_by_the_process_that_has_it(scene: Scene) -> None:
    scene.device()
    with pytest.raises(ConfigurationError, match="is in use by this process, by another Device; close that one"):
        scene.device()
    code = f"from pocketfed.client_sdk import Device\nDevice({scene.address!r}, {str(scene.folder / 'home')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"home is in use by process {os.getpid()}; close that one" in done.stderr


def test_fault_28_callbacks_that_raise_or_stop_the_device_harm_nothing(scene: Scene) -> None:
    def raising(value: object) -> None:
        raise ZeroDivisionError(f"on {value}")

    device = scene.device()
    device._voice._on_status = raising
    device._voice._on_progress = raising
    device.start()
    scene.begin()
    assert scene.end().devices == 1
    assert "callback failed: ZeroDivisionError" in device.state().last_error
    device.close()
    again = scene.device()
    scene.sensors.at("training", 0.2, again.stop)
    again.start()
    scene.begin(max_attempts=1, max_failed_rounds=1)
    scene.wait("stopped training")
    scene.wait("stopped", scene.said.index("stopped training") + 1)
    assert scene.assignment().error == "the app stopped the device"


FORK = """
import os, sys
from pocketfed.client_sdk import ConfigurationError, Device
address, home = sys.argv[1:]
device = Device(address, home + "/a", name="parent")
device.predict("play some jazz")
device.start()
child = os.fork()
if child == 0:
    said = []
    for use in (device.start, device.state, lambda: device.predict("x"), lambda: device.add_examples([("a", "b")]),
                lambda: Device(address, home + "/b")):
        try:
            use()
        except ConfigurationError as error:
            said.append(str(error))
    device.stop()
    device.close()
    print(len(said), all("spawn" in s for s in said), flush=True)
    os._exit(0)  # as multiprocessing ends a child: ONNX Runtime hangs in an exit of Python's own
assert os.waitpid(child, 0)[1] == 0
print(device.predict("play some jazz").label, device.fetch(), flush=True)
device.add_examples([("a", "b")])
try:
    Device(address, home + "/a")
except ConfigurationError as error:
    print("still locked" if "in use" in str(error) else error)
device.close()
child = os.fork()
if child == 0:
    import time
    time.sleep(60)
# The child lives, and yet home is free.
with Device(address, home + "/a") as again:
    print(again.examples.count())
os.kill(child, 9)
os.waitpid(child, 0)
"""


def test_fault_28_a_forked_child_is_told_and_disturbs_nothing(scene: Scene, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, scene.address, str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "5 True"
    assert lines[1].split()[0] in scene.dataset.labels
    assert lines[1].split()[1] == "False"
    assert lines[2:] == ["still locked", "1"]


@pytest.mark.parametrize(
    "waits", ["for a condition", "in a round that is broken off", "with a kept update", "for work"]
)
def test_stopping_does_not_last_as_long_as_what_the_device_waits_for(scene: Scene, waits: str) -> None:
    device = scene.device()
    if waits == "for a condition":
        scene.sensors.now = replace(GOOD, charging=False)
    moment, lost = (1.0, {"metered": True}) if "kept" in waits else (0.3, {"charging": False})
    scene.sensors.at("training", moment, lambda: setattr(scene.sensors, "now", replace(GOOD, **lost)))
    scene.sensors.at("training", moment, device.reconsider)
    device.start()
    if "round" in waits or "update" in waits:
        scene.begin(max_attempts=1, max_failed_rounds=1)
        scene.wait("the update of round 1 is kept" if "update" in waits else "round 1 is broken off")
    else:
        scene.wait("waits for" if "condition" in waits else "waiting for work")
    began = time.monotonic()
    device.stop()
    assert time.monotonic() - began < ENDS_S
    assert device.status() == "stopped"
    assert (scene.folder / "home" / "update.kept").exists() == ("update" in waits)
    if "update" in waits:  # it is handed in when the device is started again
        scene.sensors.now = GOOD
        device.start()
        assert scene.end().devices == 1


def test_fault_26_a_round_of_before_a_restart_is_given_back_by_a_device_that_may_no_longer_work(scene: Scene) -> None:
    killed(scene, "training", 0.3)
    scene.sensors.now = replace(GOOD, charging=False)
    scene.device().start()
    scene.wait("gave round 1 back; waits for a charger")
    scene.wait("waits for a charger")
    with scene.store.read() as session:
        first = session.scalars(sa.select(Assignment).order_by(Assignment.offered_at)).first()
    assert first is not None
    assert first.error == "NOT_ELIGIBLE: charging"
    scene.sensors.now = GOOD
    scene.devices[-1].reconsider()
    assert scene.end().devices == 1  # in its next attempt


def test_the_sdk_starts_no_process_handles_no_signal_and_ends_no_app() -> None:
    forbidden = re.compile(
        r"\b(import (signal|subprocess|multiprocessing)|from (signal|subprocess)|os\.(system|_exit|kill|popen)|sys\.exit)"
    )
    sources = [p for p in (Path(__file__).parents[1] / "client_sdk").glob("*.py") if p.name != "flower_app.py"]
    assert len(sources) > 20
    assert [p.name for p in sources if forbidden.search(p.read_text())] == []


# ---- 29: training that diverges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_to", ["learning rate", "parameters"])
def test_fault_29_training_that_diverges_is_reported_and_nothing_is_sent(scene: Scene, set_to: str) -> None:
    device = scene.device(conditions=Conditions())
    if set_to == "parameters":
        parameters = device._models.parameters

        def overflowing(*arguments: Any) -> Any:
            return np.full_like(parameters(*arguments), 3e38)

        device._models.parameters = overflowing  # type: ignore[method-assign]
    device.start()
    wild = replace(LOCAL, optimizer="sgd", learning_rate=100.0, max_grad_norm=0.0)
    scene.begin(wild, max_attempts=1, max_failed_rounds=1)
    scene.wait("cannot do round 1: ")
    scene.wait("waiting for work", scene.said.index(next(s for s in scene.said if s.startswith("cannot do round"))))
    assert scene.assignment().error.startswith("LOCAL_FAILED_COMPUTE: ")  # type: ignore[union-attr]
    assert scene.parts() == []
    with scene.store.read() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Update)) == 0
        kept = latest_release(session, "stable")
        assert kept is not None
        assert kept.id == 1
