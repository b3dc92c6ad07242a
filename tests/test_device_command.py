"""`pocketfed device` as a service: where its options come from, how it ends, and what a service manager hears of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pocketfed.cli.device import read_options
from pocketfed.cli.output import UsageError

if TYPE_CHECKING:
    from pocketfed.coordinator.artifacts import BuiltArtifact
    from pocketfed.coordinator.server import CoordinatorServer
    from pocketfed.coordinator.store import Store
    from pocketfed.model.tasks import Dataset

ROOT = Path(__file__).resolve().parents[1]
GIVEN = ("--coordinator", "c:1", "--data", "d.csv", "--home", "h")
ENDS_S = 10.0  # it takes a tenth of a second; who waited for the coordinator or for the round would take far longer
PATIENCE_S = 120.0


# ---- options ---------------------------------------------------------------------------------------------------------


def test_the_command_line_counts_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "device.toml"
    file.write_text('coordinator = "file:1"\nhome = "/from/file"\nchannel = "file"\nmax_memory_mb = 300\n')
    environment = {"POCKETFED_CONFIG": str(file), "POCKETFED_HOME": "/from/env", "POCKETFED_CHANNEL": "env"}
    options = read_options(["--data", "d.csv", "--channel", "line"], environment)
    assert (options.coordinator, options.home, options.channel) == ("file:1", Path("/from/env"), "line")
    assert (options.max_memory_mb, options.data) == (300.0, Path("d.csv"))
    assert (options.publisher, options.ca, options.log_level) == ("", None, "warning")  # nowhere: defaults


def test_every_option_can_be_given_in_the_environment(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    texts = {
        "coordinator": "c:1", "data": "d", "home": "h", "name": "ann", "channel": "beta", "tier": "low", "enrolment_key_file": str(key),
        "ca": "ca.pem", "publisher": "ab" * 32, "allow_plaintext_off_loopback": "1", "max_memory_mb": "150.5", "holdout": "0.1",
        "status_file": "s.json", "log_level": "info",
    }  # fmt: skip
    options = vars(read_options([], {f"POCKETFED_{name.upper()}": value for name, value in texts.items()}))
    assert options.pop("enrolment_key") == "secret"
    assert options.pop("allow_plaintext_off_loopback") is True
    assert {name: str(value) for name, value in options.items()} == {n: t for n, t in texts.items() if n in options}


def test_an_empty_variable_is_none_and_a_flag_can_be_off() -> None:
    options = read_options(GIVEN, {"POCKETFED_NAME": "", "POCKETFED_ALLOW_PLAINTEXT_OFF_LOOPBACK": "false"})
    assert (options.name, options.allow_plaintext_off_loopback) == (None, False)


@pytest.mark.parametrize(
    ("arguments", "environment", "file", "told"),
    [
        (GIVEN[2:], {}, "", "--coordinator is missing; give it, or POCKETFED_COORDINATOR, or coordinator in a --config file"),
        ((*GIVEN, "--max-memory-mb", "-1"), {}, "", "'-1' is no number of MB; give 0 or more"),
        ((*GIVEN, "--max-memory-mb", "nan"), {}, "", "'nan' is no number of MB; give 0 or more"),
        ((*GIVEN, "--hoem", "x"), {}, "", "unrecognized arguments: --hoem x; see pocketfed device --help"),
        (GIVEN, {"POCKETFED_MAX_MEMORY_MB": "much"}, "", "the environment: argument --max-memory-mb: 'much' is no number"),
        (GIVEN, {"POCKETFED_LOG_LEVEL": "loud"}, "", "the environment: argument --log-level: invalid choice: 'loud'"),
        (GIVEN, {"POCKETFED_ALLOW_PLAINTEXT_OFF_LOOPBACK": "maybe"}, "", "is 'maybe'; give true or false"),
        (GIVEN, {}, "chanel = 'x'", "device.toml has 'chanel', which is no setting; known are allow_plaintext"),
        (GIVEN, {}, "name = ['a']", "name is ['a']; give one value"),
        (GIVEN, {}, "name = ", "device.toml is no TOML file"),
        ((*GIVEN, "--enrolment-key", "a"), {"POCKETFED_ENROLMENT_KEY_FILE": "key"}, "", "and key; give one of the two"),
        ((*GIVEN, "--config", "gone.toml"), {}, "", "cannot read gone.toml: No such file or directory"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_where_it_was_given(
    arguments: tuple[str, ...], environment: dict[str, str], file: str, told: str, tmp_path: Path
) -> None:
    if file:
        (tmp_path / "device.toml").write_text(file)
        arguments = (*arguments, "--config", str(tmp_path / "device.toml"))
    with pytest.raises(UsageError) as wrong:
        read_options(arguments, environment)
    assert told in str(wrong.value)


# ---- a process -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset) -> Path:
    """With mine.jsonl."""
    made = tmp_path_factory.mktemp("box")
    rows = [{"text": e.text, "label": e.label} for e in tiny_dataset.train]
    (made / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


@pytest.fixture
def coordinator(tmp_path: Path, nano_built: BuiltArtifact) -> Iterator[CoordinatorServer]:
    from pocketfed.coordinator.artifacts import publish_artifact
    from pocketfed.coordinator.server import CoordinatorServer, ServerConfig
    from pocketfed.coordinator.store import Store

    store = Store(str(tmp_path / "fleet.db"))
    with store.write() as session:
        publish_artifact(session, nano_built, "stable", "head")
    with CoordinatorServer(store, ServerConfig("127.0.0.1:0", lease_s=5.0)) as server:
        yield server
    store.close()


@contextlib.contextmanager
def device(folder: Path, home: Path, address: str, **settings: str) -> Iterator[subprocess.Popen[str]]:
    """Configured as a service is: by its environment alone."""
    variables = {"coordinator": address, "data": str(folder / "mine.jsonl"), "home": str(home), **settings}
    environment = {f"POCKETFED_{name.upper()}": value for name, value in variables.items() if name != "NOTIFY_SOCKET"}
    environment |= {name: value for name, value in settings.items() if name == "NOTIFY_SOCKET"}
    with subprocess.Popen(
        [sys.executable, "-m", "pocketfed.cli", "device"], cwd=ROOT / "tests", text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, **environment},
    ) as child:  # fmt: skip
        reaper = threading.Timer(PATIENCE_S, child.kill)  # else one that never says what is waited for hangs the test
        reaper.start()
        try:
            yield child
        finally:
            reaper.cancel()
            child.kill()


def read_until(child: subprocess.Popen[str], text: str) -> None:
    assert child.stdout is not None
    assert child.stderr is not None
    for line in child.stdout:
        if text in line:
            return
    raise AssertionError(f"it ended without saying {text!r}: {child.stderr.read()}")


def terminate(child: subprocess.Popen[str]) -> tuple[int, float]:
    began = time.monotonic()
    child.send_signal(signal.SIGTERM)
    return child.wait(20), time.monotonic() - began


def test_a_service_manager_hears_when_it_is_ready_what_it_does_and_that_it_stops(
    folder: Path, tmp_path: Path, coordinator: CoordinatorServer
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        with device(
            folder, tmp_path / "home", f"127.0.0.1:{coordinator.port}", NOTIFY_SOCKET=str(tmp_path / "notify"),
            status_file=str(tmp_path / "status.json"),
        ) as child:  # fmt: skip
            read_until(child, "waiting for work")
            read_until(child, "waiting for work")  # with a model
            status = json.loads((tmp_path / "status.json").read_text())
            code, _ = terminate(child)
            assert (code, child.stderr.read() if child.stderr else None) == (0, "")
        heard = []
        while "STOPPING=1" not in heard:
            heard.append(manager.recv(1000).decode())
    assert sorted(heard[:2]) == ["READY=1", "STATUS=enrolling"]  # two threads say them
    assert "STATUS=fetching a new model" in heard
    assert (status["ok"], status["status"]) == (True, "waiting for work")
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "stopped"


def test_the_status_file_says_when_the_coordinator_cannot_be_reached(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        file = tmp_path / "status.json"
        with device(folder, tmp_path / "home", f"127.0.0.1:{nobody.getsockname()[1]}", status_file=str(file)) as child:
            read_until(child, "will try again")
            code, seconds = terminate(child)
            assert json.loads(file.read_text())["status"] == "stopped"
    assert (code, seconds < ENDS_S) == (0, True)
    # health checks grep for this
    from pocketfed.cli.service import write_status

    write_status(file, "will try again: x", ok=False)
    assert file.read_text().startswith('{"ok": false, ')


def progress(store: Store) -> float:
    """How far the one assignment is, as the device's heartbeats say."""
    from pocketfed.coordinator.store import Assignment

    with store.read() as session:
        return session.query(Assignment).one().progress


def test_it_ends_at_once_in_the_middle_of_training_and_keeps_what_it_has_trained(
    folder: Path, tmp_path: Path, coordinator: CoordinatorServer
) -> None:
    from pocketfed.client_sdk.trainer import TrainConfig
    from pocketfed.coordinator.config import RunConfig
    from pocketfed.coordinator.grid import FleetGrid
    from pocketfed.coordinator.progress import create_run, starting_theta
    from pocketfed.coordinator.rounds import Interrupted, drive_run

    config = RunConfig(name="long", rounds=1, min_devices=1, local=TrainConfig(epochs=1000, batch_size=4))
    run_id = create_run(coordinator.store, config)
    _, size = starting_theta(coordinator.store, run_id)
    grid = FleetGrid(coordinator.assignments, run_id, lambda: coordinator.online("stable"), size, 10.0)
    stopping = threading.Event()

    def drive() -> None:
        with contextlib.suppress(Interrupted):
            drive_run(coordinator.store, run_id, grid, config, should_stop=stopping.is_set)

    driven = threading.Thread(target=drive, daemon=True)
    driven.start()
    with device(folder, tmp_path / "home", f"127.0.0.1:{coordinator.port}", holdout="0") as child:
        read_until(child, "training in round 1 on 96 examples")
        while not stopping.wait(0.05) and not progress(coordinator.store):
            assert child.poll() is None
        code, seconds = terminate(child)
    stopping.set()
    driven.join(30)
    assert code == 0
    assert seconds < ENDS_S
    assert (tmp_path / "home" / "training.safetensors").stat().st_size > 0


@pytest.mark.parametrize(
    ("settings", "code", "told"),
    [
        ({"max_memory_mb": "much"}, 2, "the environment: argument --max-memory-mb: 'much' is no number of MB"),
        ({"data": "/nowhere.csv"}, 1, "/nowhere.csv does not exist"),
        ({"coordinator": "nowhere"}, 1, "nowhere"),
        ({"status_file": "/nowhere/status.json"}, 1, "--status-file /nowhere/status.json cannot be written"),
    ],
)
def test_a_mistake_is_exit_code_1_or_2_and_one_sentence(
    settings: dict[str, str], code: int, told: str, folder: Path, tmp_path: Path
) -> None:
    with device(folder, tmp_path / "home", "127.0.0.1:1", **settings) as child:
        _, err = child.communicate(timeout=20)
    assert child.returncode == code
    assert err.startswith("pocketfed: ")
    assert told in err
    assert err.count("\n") == 1
