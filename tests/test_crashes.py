"""`kill -9` of the coordinator's process wherever it hurts: whoever starts it again ends with the same bits."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import sqlalchemy as sa

from pocketfed.client_sdk import Device
from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.flower_app import make_client_app
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.coordinator.artifacts import BuiltArtifact, publish_artifact
from pocketfed.coordinator.assignments import Assignments
from pocketfed.coordinator.config import RunConfig, apply_overrides
from pocketfed.coordinator.integrity import find_problems
from pocketfed.coordinator.progress import create_run
from pocketfed.coordinator.rounds import drive_run
from pocketfed.coordinator.store import Artifact as ArtifactRow
from pocketfed.coordinator.store import (
    Assignment,
    Blob,
    Chunk,
    History,
    Release,
    Round,
    Run,
    Store,
    Update,
    device_named,
    latest_release,
)
from pocketfed.model.tasks import Dataset
from pocketfed.simulations.grids import InProcessGrid
from pocketfed.simulations.run import encode_examples

pytestmark = pytest.mark.slow
PATIENCE_S = 240.0
DEVICES = 3
# In the order in which one round meets them; a coordinator that is started again goes through the round's rest.
POINTS = (
    "after sampling",
    "after offering",
    "mid-download",
    "mid-upload",
    "between rename and row",
    "between upload and receipt",
    "after 2 of 3 uploads",
    "mid-aggregation",
    "before the commit",
    "within the commit",
    "after the commit",
    "before the release",
)
SETTINGS = [
    "rounds=6",
    "min_devices=3",
    "seed=11",
    "strategy=FedAdam",
    "strategy_options.eta=0.01",
    "strategy_options.beta_1=0.9",
    "strategy_options.beta_2=0.99",
    "local.batch_size=4",
    "local.learning_rate=0.01",
    "local.max_length=32",
    "evaluate_on_devices=true",
    "lease_s=120",  # nobody is to be given up for being slow on a machine that is
    "offer_s=120",
]


def command(point: str = "never", *arguments: str) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("crashing.py")), point, *arguments]


def serve(point: str, database: str, port: int, result: Path, settings: list[str] = SETTINGS) -> list[str]:
    chosen = [word for setting in settings for word in ("--set", setting)]
    where = ("--database", database, "--spool", str(result.with_name("spool")), "--listen", f"127.0.0.1:{port}")
    return command(point, "serve", *where, "--exit-when-done", "--json", str(result), *chosen)


Runs = Callable[[list[str], Path], tuple[int, str]]


@pytest.fixture(scope="module")
def run() -> Iterator[Runs]:
    """Runs a command in a process of its own: the exit code (negative: the signal) and what was said.

    The processes are forks of one that has imported everything: a dozen crashes cost one start.
    """
    forks = subprocess.Popen(command()[:2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert forks.stdin is not None
    assert forks.stdout is not None
    assert forks.stdout.readline() == "ready\n"

    def through(words: list[str], folder: Path) -> tuple[int, str]:
        _, _, point, *rest = words
        said = folder / "said"
        print(json.dumps([point, str(folder), str(said), int(PATIENCE_S), rest]), file=forks.stdin, flush=True)
        code = int(forks.stdout.readline())
        return code, said.read_text()

    yield through
    forks.communicate(timeout=PATIENCE_S)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def released(database: str, nano_built: BuiltArtifact) -> str:
    """A database with the nano artifact released."""
    store = Store(database)
    with store.write() as session:
        publish_artifact(session, nano_built, "stable", "head")
    store.close()
    return database


@pytest.fixture
def port(tmp_path: Path, tiny_dataset: Dataset) -> Iterator[int]:
    """Three devices that look for their coordinator there, for as long as the test lasts."""
    found = free_port()
    members = [Device(f"127.0.0.1:{found}", tmp_path / f"home-{i}", name=f"device-{i}") for i in range(DEVICES)]
    for index, member in enumerate(members):
        member.add_examples((e.text, e.label) for e in tiny_dataset.train[12 * index : 12 * index + 12])
        member.start()
    yield found
    for member in members:
        member.close()


def simulated(folder: Path, built: BuiltArtifact, artifact: Artifact, dataset: Dataset) -> tuple[str, list[str | None]]:
    """The final parameters' digest, and those of every round, of the same run without a network and without a crash."""
    store = Store(str(folder / "simulated.db"))
    trainer = PlanTrainer(artifact, "head")
    everything = encode_examples(trainer, dataset.train, 32)
    local = {f"device-{i}": everything.take(range(12 * i, 12 * i + 12)) for i in range(DEVICES)}
    with store.write() as session:
        publish_artifact(session, built, "stable", "head")
        nodes = {device_named(session, name).id: name for name in local}
    config = RunConfig.from_dict(apply_overrides({}, SETTINGS))
    run_id = create_run(store, config)
    app = make_client_app(
        lambda: trainer, lambda c: (str(c.node_config["device"]), local[str(c.node_config["device"])])
    )
    theta = drive_run(store, run_id, InProcessGrid(store, run_id, app, nodes, 0), config)
    with store.read() as session:
        digests = list(session.scalars(sa.select(Round.parameters).order_by(Round.number)))
    store.close()
    return sha256(theta.tobytes()).hexdigest(), digests


def test_fault_01_a_coordinator_killed_at_every_point_ends_with_the_hash_of_the_uninterrupted_run(
    released: str,
    port: int,
    run: Runs,
    tmp_path: Path,
    nano_built: BuiltArtifact,
    nano_artifact: Artifact,
    tiny_dataset: Dataset,
) -> None:
    result = tmp_path / "result.json"
    for point in POINTS:
        code, said = run(serve(point, released, port, result), tmp_path)
        assert code == -signal.SIGKILL, (point, said)
        assert not result.exists()
    code, said = run(serve("never", released, port, result), tmp_path)
    assert code == 0, said

    expected, rounds = simulated(tmp_path, nano_built, nano_artifact, tiny_dataset)
    with contextlib.closing(Store(released, create=False)) as store:
        with store.read() as session:
            found = list(session.scalars(sa.select(Round.parameters).order_by(Round.number)))
            assert found == rounds, "the first round that differs tells the point"
            assert json.loads(result.read_text())["parameters_sha256"] == expected
            # Nothing lost, nothing counted twice: every device once a round and kind, all at the first attempt.
            parts = session.execute(sa.select(Assignment.status, Assignment.attempt, Assignment.counted_in)).all()
            assert len(parts) == 2 * 6 * DEVICES
            assert {(status, attempt) for status, attempt, _ in parts} == {("aggregated", 1)}
            counted = session.scalars(sa.select(History.assignment_id).where(History.status == "aggregated")).all()
            assert len(counted) == len(set(counted)) == len(parts)
            assert session.scalar(sa.select(sa.func.count()).select_from(Update)) == len(parts)
            assert session.scalars(sa.select(Run.status)).all() == ["finished"]
            assert session.scalar(sa.select(sa.func.count()).select_from(Release)) == 2  # the artifact's and the run's
        assignments = Assignments(store, tmp_path / "spool")
        assert list(find_problems(store, assignments)) == []
        assert [path.name for path in assignments.spool.iterdir()] == ["lock"]


def test_fault_01_a_publish_that_is_killed_has_published_nothing_and_can_be_repeated(
    database: str, run: Runs, tmp_path: Path, nano_built: BuiltArtifact
) -> None:
    words = ("publish", str(nano_built.folder), "--channel", "stable", "--database", database)
    assert run(command("during publish", *words), tmp_path)[0] == -signal.SIGKILL
    store = Store(database, create=False)
    with store.read() as session:
        for table in (ArtifactRow, Blob, Chunk, Release):
            assert session.scalar(sa.select(sa.func.count()).select_from(table)) == 0
    code, said = run(command("never", *words), tmp_path)
    assert code == 0, said
    with store.read() as session:
        assert latest_release(session, "stable").artifact_version == nano_built.version  # type: ignore[union-attr]
    assert list(find_problems(store, Assignments(store, tmp_path / "spool"))) == []
    store.close()


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_fault_24_the_second_coordinator_takes_over_when_the_first_is_killed(
    released: str, port: int, tmp_path: Path, nano_built: BuiltArtifact, nano_artifact: Artifact, tiny_dataset: Dataset
) -> None:
    """Both are started alike, on one port: the second does not even listen until the first is gone."""
    result = tmp_path / "result.json"
    os.mkfifo(tmp_path / "now")  # the first one is not gone before the second has met it
    die_on = os.environ | {"DIE_ON": str(tmp_path / "now")}
    first = subprocess.Popen(
        serve("mid-aggregation", released, port, result), cwd=tmp_path, stdout=subprocess.PIPE, env=die_on
    )
    assert first.stdout is not None
    assert first.stdout.readline().startswith(b"listening on")
    second = subprocess.Popen(serve("never", released, port, result), cwd=tmp_path, stdout=subprocess.PIPE)
    assert second.stdout is not None
    lines = [second.stdout.readline().decode()]
    (tmp_path / "now").write_text("")
    assert first.wait(PATIENCE_S) == -signal.SIGKILL
    lines += second.communicate(timeout=PATIENCE_S)[0].decode().splitlines()
    first.stdout.close()
    assert second.returncode == 0, lines
    assert lines[0].endswith("serves this database; waiting to take over\n")
    assert lines[1].startswith("listening on")
    assert "goes on where it was left" in lines[2]
    expected, _ = simulated(tmp_path, nano_built, nano_artifact, tiny_dataset)
    assert json.loads(result.read_text())["parameters_sha256"] == expected
