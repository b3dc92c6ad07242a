"""`pocketfed serve` and `pocketfed device` as the processes they are, over loopback gRPC."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.flower_app import make_client_app
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.coordinator.artifacts import BuiltArtifact, publish_artifact
from pocketfed.coordinator.config import RunConfig, apply_overrides
from pocketfed.coordinator.rounds import create_run, drive_run
from pocketfed.coordinator.store import Assignment, Device, Store, device_named
from pocketfed.model.tasks import Dataset, Example
from pocketfed.simulations.grids import InProcessGrid
from pocketfed.simulations.run import encode_examples

pytestmark = pytest.mark.slow
PATIENCE_S = 60.0
SECRET = "xylophone"  # in one device's texts only


class Process:
    """A `pocketfed` command whose lines can be waited for."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "pocketfed.cli", *arguments]
        self._process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self._ended = False
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                with self._news:
                    self.lines.append(line.rstrip())
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def line(self, start: str) -> str:
        """The first line that starts so, as soon as it is there."""
        found: list[str] = []

        def look() -> bool:
            found[:] = [line for line in self.lines if line.lstrip().startswith(start)]
            return bool(found) or self._ended

        with self._news:
            self._news.wait_for(look, PATIENCE_S)
        assert found, f"no line {start!r} in {self.lines}"
        return found[0]

    def end(self) -> int:
        """The exit code, once it has ended by itself."""
        code = self._process.wait(PATIENCE_S)
        self._reader.join()
        return code

    def stop(self) -> int:
        self._process.terminate()
        return self.end()

    def kill(self) -> None:
        self._process.kill()
        self.end()


class Fleet:
    """Processes in one folder, each ended with the test."""

    def __init__(self, folder: Path, artifact: Path, dataset: Dataset) -> None:
        self.folder, self.database = folder, str(folder / "fleet.db")
        self.parts = [list(dataset.train[16 * i : 16 * i + 16]) for i in range(4)]
        first = self.parts[0][0]
        self.parts[0][0] = Example(f"{first.text} {SECRET}", first.label)
        self.processes: list[Process] = []
        assert (
            self.run(
                "publish", str(artifact), "--channel", "stable", "--database", self.database, "--train", "full"
            ).end()
            == 0
        )

    def run(self, *arguments: str) -> Process:
        process = Process(self.folder, *arguments)
        self.processes.append(process)
        return process

    def serve(self, settings: list[str]) -> Process:
        chosen = [word for setting in settings for word in ("--set", setting)]
        result = str(self.folder / "result.json")
        server = self.run(
            "serve",
            "--database",
            self.database,
            "--listen",
            "127.0.0.1:0",
            "--exit-when-done",
            "--json",
            result,
            *chosen,
        )
        self.address = server.line("listening on ").removeprefix("listening on ")
        return server

    def device(self, index: int) -> Process:
        data = self.folder / f"part-{index}.jsonl"
        data.write_text("".join(json.dumps({"text": e.text, "label": e.label}) + "\n" for e in self.parts[index]))
        return self.run(
            "device",
            "--coordinator",
            self.address,
            "--data",
            str(data),
            "--home",
            str(self.folder / f"home-{index}"),
            "--name",
            f"device-{index}",
        )

    def result(self) -> Any:
        return json.loads((self.folder / "result.json").read_text())


@pytest.fixture
def fleet(tmp_path: Path, nano_built: BuiltArtifact, tiny_dataset: Dataset) -> Iterator[Fleet]:
    made = Fleet(tmp_path, nano_built.folder, tiny_dataset)
    yield made
    for process in made.processes:
        process.kill()


def simulated_digest(
    folder: Path, built: BuiltArtifact, artifact: Artifact, parts: list[list[Example]], config: RunConfig
) -> str:
    """The final parameters of the same run with virtual devices."""
    store = Store(str(folder / "simulated.db"))
    trainer = PlanTrainer(artifact, "full")
    local = {f"device-{i}": encode_examples(trainer, part, config.local.max_length) for i, part in enumerate(parts)}
    with store.write() as session:
        publish_artifact(session, built, "stable", "full")
        nodes = {device_named(session, name).id: name for name in local}
    run_id = create_run(store, config)
    app = make_client_app(
        lambda: trainer, lambda c: (str(c.node_config["device"]), local[str(c.node_config["device"])])
    )
    theta = drive_run(store, run_id, InProcessGrid(store, run_id, app, nodes, 0), config)
    store.close()
    return sha256(theta.tobytes()).hexdigest()


def test_four_processes_end_with_the_bits_of_the_simulation_and_no_text_leaves_them(
    fleet: Fleet, tmp_path: Path, nano_built: BuiltArtifact, nano_artifact: Artifact
) -> None:
    settings = [
        "rounds=2",
        "min_devices=4",
        "seed=11",
        "local.batch_size=8",
        "local.learning_rate=0.005",
        "local.max_length=32",
        "cohort=3",
    ]
    server = fleet.serve(settings)
    devices = [fleet.device(index) for index in range(4)]
    assert server.end() == 0, server.lines
    assert [device.stop() for device in devices] == [0, 0, 0, 0]
    result = fleet.result()
    assert [(r["status"], r["devices"], r["failed"]) for r in result["rounds"]] == [
        ("finished", 0, 0),
        ("finished", 3, 0),
        ("finished", 3, 0),
    ]
    config = RunConfig.from_dict(apply_overrides({}, settings))
    assert result["parameters_sha256"] == simulated_digest(tmp_path, nano_built, nano_artifact, fleet.parts, config)
    held = b"".join(path.read_bytes() for path in tmp_path.glob("fleet.db*") if path.is_file())
    assert b"device-0" in held
    assert SECRET.encode() not in held
    assert SECRET in (tmp_path / "part-0.jsonl").read_text()


def test_a_device_killed_in_a_round_and_one_that_comes_late_do_not_stop_the_run(fleet: Fleet) -> None:
    """Three start, one is killed; then the run has to wait for the late one, for it wants three."""
    server = fleet.serve(
        [
            "rounds=9",
            "min_devices=3",
            "lease_s=6",
            "local.batch_size=2",
            "local.max_length=32",
            "local.epochs=1000",
            "local.max_steps=150",
            "local.learning_rate=0.0005",
        ]
    )
    devices = [fleet.device(index) for index in range(3)]
    server.line("1 ")  # round 1 has ended
    late = fleet.device(3)
    devices[2].line("training in round 2")
    devices[2].kill()
    assert server.end() == 0, server.lines
    assert [process.stop() for process in (*devices[:2], late)] == [0, 0, 0]

    rounds = fleet.result()["rounds"]
    assert [r["round"] for r in rounds] == list(range(10))
    assert {r["status"] for r in rounds} == {"finished"}
    assert (rounds[1]["devices"], rounds[1]["failed"]) == (3, 0)
    assert rounds[2]["failed"] >= 1
    store = Store(fleet.database, create=False)
    with store.read() as session:
        parts = session.execute(
            sa.select(Device.name, Assignment.round, Assignment.status, Assignment.error).join(Device)
        ).all()
    store.close()
    assert ("device-2", 2, "expired", "no heartbeat within the lease") in parts
    assert any(name == "device-3" and status == "aggregated" for name, _, status, _ in parts)
    assert {name for name, number, status, _ in parts if number == 9 and status == "aggregated"} == {
        "device-0",
        "device-1",
        "device-3",
    }
