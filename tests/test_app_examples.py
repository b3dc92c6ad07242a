"""examples/*.py: each is run as its docstring says, against a real coordinator, and what its user said is trained on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from pocketfed.coordinator import fleet
from pocketfed.coordinator.artifacts import BuiltArtifact, publish_artifact
from pocketfed.coordinator.config import LocalTraining, RunConfig
from pocketfed.coordinator.grid import FleetGrid
from pocketfed.coordinator.rounds import create_run, drive_run
from pocketfed.coordinator.server import CoordinatorServer, ServerConfig
from pocketfed.coordinator.store import Device as DeviceRow
from pocketfed.coordinator.store import Store, Update

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
APPS = ("chat_intent.py", "fastapi_app.py", "sensor_loop.py")
PATIENCE_S = 60.0
KEY = "ab" * 32


class Coordinator:
    """The nano artifact (alarm, lights, music, weather), released; `address` is where it listens."""

    def __init__(self, folder: Path, built: BuiltArtifact) -> None:
        self.store = Store(str(folder / "fleet.db"))
        with self.store.write() as session:
            publish_artifact(session, built, "stable", "head")
        self.server = CoordinatorServer(self.store, ServerConfig("127.0.0.1:0"), folder / "spool")
        self.address = f"127.0.0.1:{self.server.start()}"
        self.size = int(built.manifest["trainable_sets"]["head"]["size"])

    def one_round(self) -> int:
        """How many examples the one device that takes part has trained on."""
        config = RunConfig(min_devices=1, rounds=1, wait_s=PATIENCE_S, local=LocalTraining(batch_size=4, max_length=32))
        run_id = create_run(self.store, config)
        grid = FleetGrid(self.server.assignments, run_id, lambda: self.server.online("stable"), self.size, PATIENCE_S)
        drive_run(self.store, run_id, grid, config, None, lambda result: None, self.server.assignments.forget)
        with self.store.read() as session:
            return session.scalars(sa.select(Update.num_examples)).one()

    def reported(self) -> list[int]:
        """How many examples each device says it can train on."""
        with self.store.read() as session:
            return list(session.scalars(sa.select(DeviceRow.examples)))


@pytest.fixture
def coordinator(tmp_path: Path, nano_built: BuiltArtifact, monkeypatch: pytest.MonkeyPatch) -> Iterator[Coordinator]:
    monkeypatch.setattr(fleet, "MAX_WAIT_S", 1.0)  # an app that had nothing to learn from is heard again soon
    made = Coordinator(tmp_path, nano_built)
    yield made
    made.server.stop()
    made.store.close()


class App:
    """An example as a process: what is said to it, and what it answers."""

    def __init__(self, child: subprocess.Popen[str], errors: Path) -> None:
        self.child, self._errors = child, errors

    def say(self, line: str) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write(line + "\n")
        self.child.stdin.flush()

    def hear(self) -> str:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        assert line, self._errors.read_text()
        return line.rstrip("\n")

    def ask(self, line: str) -> str:
        self.say(line)
        return self.hear()


@contextmanager
def running(folder: Path, *arguments: str, **environment: str) -> Iterator[App]:
    errors = folder / "errors.txt"
    with errors.open("w") as stream:
        child = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            env={**os.environ, **environment},
        )
        reaper = threading.Timer(2 * PATIENCE_S, child.kill)  # else a silent app would be waited for
        reaper.start()
        try:
            yield App(child, errors)
        finally:
            reaper.cancel()
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                assert pipe is not None
                pipe.close()


@pytest.mark.parametrize("name", APPS)
def test_an_example_is_short_and_says_how_to_run_it(name: str) -> None:
    text = (EXAMPLES / name).read_text()
    assert len(text.splitlines()) <= 80
    assert "    pip install pocketfed" in text.split('"""')[1]
    assert f"]({name})" in (EXAMPLES / "README.md").read_text()


def test_no_example_is_left_out() -> None:
    assert tuple(sorted(p.name for p in EXAMPLES.glob("*.py"))) == APPS


# ---- a chat --------------------------------------------------------------------------------------------------------------


def test_the_chat_learns_from_what_it_is_told_and_keeps_it_encrypted(coordinator: Coordinator, tmp_path: Path) -> None:
    arguments = (str(EXAMPLES / "chat_intent.py"), "--coordinator", coordinator.address, "--home", "home")
    with running(tmp_path, *arguments, CHAT_KEY=KEY) as chat:
        assert chat.hear().startswith("Say what you want.")
        assert chat.hear().startswith("/forget")
        assert re.fullmatch(r"(alarm|lights|music|weather) \(\d+%\)", chat.ask("play some jazz"))
        assert chat.ask("/no singing") == "choose one of alarm, lights, music, weather"
        assert chat.ask("/no music") == "thank you"
        assert chat.ask("/no music").startswith("Say what you want."), "there is nothing left to correct"
        chat.hear()
        for sentence, label in (("wake me at noon", "alarm"), ("will it rain", "weather"), ("my secret", "lights")):
            chat.ask(sentence)
            assert chat.ask(f"/no {label}") == "thank you"
        guess = chat.ask("dim the hall light").split()[0]
        assert chat.ask("/yes") == "thank you"
        chat.ask("not for you")
        assert chat.ask("/drop") == "forgotten"
        chat.ask("never labelled")
        assert chat.ask("/status").endswith("5 of 6 sentences have a label")
        assert coordinator.one_round() == 5
        assert guess in ("alarm", "lights", "music", "weather")
        assert not any(b"my secret" in p.read_bytes() for p in (tmp_path / "home").rglob("*") if p.is_file())
        assert chat.ask("/forget") == "6 sentences are forgotten"
        chat.say("/quit")
        assert chat.child.wait(PATIENCE_S) == 0
    assert (tmp_path / "errors.txt").read_text() == ""


def test_the_chat_without_a_coordinator_says_so_and_goes_on(tmp_path: Path) -> None:
    with running(tmp_path, str(EXAMPLES / "chat_intent.py"), "--coordinator", "127.0.0.1:9", "--home", "home") as chat:
        chat.hear(), chat.hear()
        assert "127.0.0.1:9" in chat.ask("play some jazz")
        assert chat.ask("/status").endswith("0 of 0 sentences have a label")


# ---- a web service ---------------------------------------------------------------------------------------------------------


class Web:
    def __init__(self, address: str) -> None:
        self.address = address

    def __call__(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        request = urllib.request.Request(
            self.address + path,
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
                content = reply.read()
                return reply.status, json.loads(content) if content else None
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())


@contextmanager
def serving(folder: Path, coordinator: str) -> Iterator[Web]:
    pytest.importorskip("fastapi", reason="FastAPI is not installed")
    pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    command = ("-m", "uvicorn", "--app-dir", str(EXAMPLES), "--port", "0", "fastapi_app:app")
    with running(folder, *command, POCKETFED_COORDINATOR=coordinator, POCKETFED_HOME="home") as app:
        found = None
        while found is None:
            assert app.child.poll() is None, (folder / "errors.txt").read_text()
            found = re.search(r"running on (http://127\.0\.0\.1:\d+)", (folder / "errors.txt").read_text())
            threading.Event().wait(0.05)
        yield Web(found.group(1))
        app.child.terminate()
        app.child.wait(PATIENCE_S)
        assert "Application shutdown complete" in (folder / "errors.txt").read_text()


def test_the_web_service_predicts_is_corrected_and_trains(coordinator: Coordinator, tmp_path: Path) -> None:
    with serving(tmp_path, coordinator.address) as web:
        for sentence, label in (("wake me at noon", "alarm"), ("will it rain", "weather"), ("play a waltz", "music")):
            status, found = web("POST", "/predictions", {"text": sentence})
            assert (status, found["label"] in ("alarm", "lights", "music", "weather")) == (200, True)
            assert web("PUT", f"/predictions/{found['id']}/label", {"label": label}) == (204, None)
        _, last = web("POST", "/predictions", {"text": "not for you"})
        assert web("DELETE", f"/predictions/{last['id']}") == (204, None)
        assert web("DELETE", f"/predictions/{last['id']}")[0] == 404
        assert web("PUT", "/predictions/99/label", {"label": "music"})[0] == 404
        assert web("POST", "/predictions", {"text": ""})[0] == 422
        assert coordinator.one_round() == 3
        status, found = web("GET", "/status")
        assert (status, found["texts"], found["labelled"]) == (200, 3, 3)


def test_the_web_service_answers_503_with_a_sentence_while_there_is_no_model(tmp_path: Path) -> None:
    with serving(tmp_path, "127.0.0.1:9") as web:
        status, found = web("POST", "/predictions", {"text": "play a waltz"})
        assert status == 503
        assert "127.0.0.1:9" in found["detail"]
        assert web("GET", "/status")[0] == 200


# ---- a sensor --------------------------------------------------------------------------------------------------------------


def around_now(start_h: float, end_h: float) -> tuple[str, str]:
    return tuple(f"{datetime.now() + timedelta(hours=h):%H:%M}" for h in (start_h, end_h))  # type: ignore[return-value]


def readings(app: App) -> None:
    """Events that the owner names, in between readings that are none."""
    app.say("kitchen 20")
    app.say("kitchen 21.5")
    assert re.fullmatch(r"the kitchen rose above 26 degrees fast \D+: \w+ \(\d+%\)", app.ask("kitchen 30"))
    assert app.ask("= alarm") == "noted"
    app.say("garden 5")
    assert re.match(r"the garden fell below 3 degrees slowly .*: \w+ \(\d+%\)", app.ask("garden 2"))
    assert app.ask("= weather") == "noted"
    assert app.ask("kitchen warm") == "'kitchen warm' is no reading; give PLACE DEGREES"
    both = (app.ask("kitchen 10"), app.hear())
    assert ["above" in b or "below 16" in b or "below 26" in b for b in both] == [True, True]


def test_the_sensor_tells_its_events_is_taught_and_trains_in_its_hours(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    arguments = (str(EXAMPLES / "sensor_loop.py"), "--coordinator", coordinator.address, "--home", "home")
    with running(tmp_path, *arguments, "--window", *around_now(-1, 2)) as sensor:
        readings(sensor)
        assert coordinator.one_round() == 2
        assert sensor.child.stdin is not None
        sensor.child.stdin.close()
        sensor.hear()
        assert sensor.child.wait(PATIENCE_S) == 0
    assert (tmp_path / "errors.txt").read_text() == ""


def test_the_sensor_waits_for_its_hours(coordinator: Coordinator, tmp_path: Path) -> None:
    arguments = (str(EXAMPLES / "sensor_loop.py"), "--coordinator", coordinator.address, "--home", "home")
    begin, end = around_now(3, 4)
    with running(tmp_path, *arguments, "--window", begin, end) as sensor:
        readings(sensor)
        told, waits_for = "", f"the hours from {begin} to {end}"
        for _ in range(round(PATIENCE_S / 0.1)):  # it fetches its model first
            told = sensor.ask("?")
            if waits_for in told:
                break
            time.sleep(0.1)
        assert waits_for in told
        assert sensor.child.stdin is not None
        sensor.child.stdin.close()
    with coordinator.store.read() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Update)) == 0
