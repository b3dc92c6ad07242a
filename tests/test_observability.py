"""What an operator can see: metrics, vital figures, logs, health; each from a coordinator that really serves."""

from __future__ import annotations

import asyncio
import contextlib
import doctest
import io
import json
import logging
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from pocketfed.coordinator import metrics, vitals
from pocketfed.coordinator.batches import Batches
from pocketfed.coordinator.enrolment import enrol
from pocketfed.coordinator.health import Health
from pocketfed.coordinator.limits import Limits
from pocketfed.coordinator.logs import SAYS, logging_as
from pocketfed.coordinator.metrics import Metrics, MetricsError, serve_metrics
from pocketfed.coordinator.server import CoordinatorServer, ServerConfig
from pocketfed.coordinator.store import (
    Assignment,
    Device,
    History,
    Run,
    Store,
    Vitals,
    device_named,
    now,
    put_artifact,
    put_blob,
)
from pocketfed.coordinator.vitals import BOUNDS_S, Recorder, Tally
from pocketfed.protos import fleet_pb2, fleet_pb2_grpc

PATIENCE_S = 20.0
TOKEN = "A" * 43
METADATA = (("authorization", f"Bearer {TOKEN}"),)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(str(tmp_path / "fleet.db"))
    yield made
    made.close()


@pytest.fixture
def server(store: Store) -> Iterator[CoordinatorServer]:
    enrol(store, "phone", "stable", "", TOKEN)
    limits = Limits(doubtful_per_s=0.001, doubtful_burst=20.0)
    with CoordinatorServer(store, ServerConfig("127.0.0.1:0", limits=limits)) as made:
        yield made


def check_in(address: str, metadata: Any = METADATA, wait_s: float = 0.0) -> Any:
    with grpc.insecure_channel(address) as channel:
        request = fleet_pb2.CheckInRequest(protocol=1, examples=5, wait_s=wait_s)
        return fleet_pb2_grpc.FleetStub(channel).CheckIn(request, metadata=metadata, timeout=PATIENCE_S)


def offer(store: Store, *names: str) -> None:
    """A run, and an assignment for each device of these names."""
    with store.write() as session:
        put_artifact(session, {"files": {}, "trainable_sets": {}}, "v1", [])
        digest = put_blob(session, b"theta")
        run = Run(
            name="r", channel="stable", config={}, artifact_version="v1", trainable_set="all", seed=0, rounds_planned=1
        )
        session.add(run)
        session.flush()
        for name in names:
            device = device_named(session, name)
            row = {"run_id": run.id, "round": 1, "device_id": device.id, "kind": "train", "config": {}}
            session.add(Assignment(id=f"{run.id}-{name}", parameters=digest, **row))


# ---- many at once ----------------------------------------------------------------------------------------------------


def batches(work: Any, items: list[Any]) -> tuple[list[Any], list[list[Any]]]:
    """What each item came to, and which went together, the first one alone."""
    seen: list[list[Any]] = []
    open_up = threading.Event()

    def slowly(batch: list[Any]) -> list[Any]:
        seen.append(list(batch))
        assert open_up.wait(PATIENCE_S)
        return list(work(batch))

    async def main() -> list[Any]:
        asked = Batches[Any, Any](asyncio.to_thread, slowly)  # type: ignore[arg-type]
        first = asked.ask(items[0])
        while not seen:
            await asyncio.sleep(0)
        rest = [asked.ask(item) for item in items[1:]]
        open_up.set()
        return await asyncio.gather(first, *rest, return_exceptions=True)

    return asyncio.run(main()), seen


def test_all_that_come_while_one_batch_is_at_work_share_the_next() -> None:
    results, seen = batches(lambda batch: [10 * item for item in batch], [1, 2, 3, 4])
    assert results == [10, 20, 30, 40]
    assert seen == [[1], [2, 3, 4]]


def test_what_one_of_a_batch_does_wrong_is_not_the_others_fault_and_an_outage_is_everybodys() -> None:
    def divide(batch: list[int]) -> list[float]:
        return [12 / item for item in batch]

    results, seen = batches(divide, [1, 2, 0, 3])
    assert [str(r) for r in results] == ["12.0", "6.0", "division by zero", "4.0"]
    assert seen == [[1], [2, 0, 3], [2], [0], [3]]

    def out(batch: list[int]) -> list[float]:
        raise OSError(28, "No space left on device")

    results, seen = batches(out, [1, 2, 3])
    assert [type(r) for r in results] == [OSError] * 3
    assert seen == [[1], [2, 3]]


def test_a_tier_is_taken_down_at_check_in_as_a_short_line_and_one_that_is_told_no_more_is_gone(store: Store) -> None:
    with CoordinatorServer(store, ServerConfig("127.0.0.1:0")) as server:
        enrol(store, "phone", "stable", "", TOKEN)
        seen = []
        for tier in ("low", "\u202e\n" + "x" * 99, ""):
            with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                request = fleet_pb2.CheckInRequest(protocol=1, tier=tier)
                fleet_pb2_grpc.FleetStub(channel).CheckIn(request, metadata=METADATA, timeout=PATIENCE_S)
            with store.read() as session:
                seen.append(session.scalars(sa.select(Device.tier)).one())
    assert seen == ["low", "x" * 48, None]


def test_an_offer_wakes_those_it_is_for_and_nobody_else(store: Store) -> None:
    """Three wait; after the offer only the one that it is for has asked the store again."""
    tokens = [f"{name:-<43}" for name in ("one", "two", "three")]
    for token in tokens:
        enrol(store, token.strip("-"), "stable", "", token)
    asked: list[int] = []
    from pocketfed.coordinator import desk

    serve = desk.serve
    with CoordinatorServer(store, ServerConfig("127.0.0.1:0")) as server:
        fleet = server._fleet
        assert fleet is not None
        fleet._desk._work = lambda batch: (  # type: ignore[method-assign, assignment]
            asked.extend(a.device_id for a in batch),
            serve(server.assignments, 5.0, fleet._answer, ValueError, batch),
        )[1]
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            ask = fleet_pb2_grpc.FleetStub(channel).CheckIn
            polls = [
                ask.future(fleet_pb2.CheckInRequest(protocol=1, examples=1, wait_s=60), metadata=bearer(token))
                for token in tokens
            ]
            until(lambda: server.tally.polls() == 3 and len(asked) >= 3)
            before = len(asked)
            offer(store, "two")
            server.assignments.notify_offered()
            assert polls[1].result(PATIENCE_S).assignment.id == "1-two"
            assert asked[before:] == [2]
            assert server.tally.polls() == 2
            for poll in polls:
                poll.cancel()


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def until(true: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_the_examples_in_the_modules_are_true() -> None:
    assert doctest.testmod(vitals).failed == doctest.testmod(metrics).failed == 0


def scrape(port: int) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
        text = reply.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_is_told_what_calls_ended_how_and_what_the_store_holds(
    store: Store, server: CoordinatorServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "OLD_S", 0.0)
    shown = Metrics(store, server.assignments.spool, server.tally, lambda: server.health.leads)
    address = f"127.0.0.1:{server.port}"
    with serve_metrics(shown, "127.0.0.1", 0) as port:
        for _ in range(3):
            check_in(address)
        for _ in range(2):
            with pytest.raises(grpc.RpcError):
                check_in(address, metadata=bearer("B" * 43))
        offer(store, "phone")
        with store.write() as session:
            session.get_one(Assignment, "1-phone").status = "uploaded"
        with store.write() as session:
            row = session.get_one(Assignment, "1-phone")
            row.status, row.error = "quarantined", "norm: 48.2 is above the limit"
        (server.assignments.spool / "x.part").write_bytes(b"12345")
        seen = scrape(port)
    ok, unknown = (("code", "OK"), ("method", "CheckIn")), (("code", "UNAUTHENTICATED"), ("method", "CheckIn"))
    assert seen["pocketfed_rpc_seconds_count", ok] == 3
    assert seen["pocketfed_rpc_seconds_count", unknown] == 2
    assert seen["pocketfed_rpc_seconds_bucket", tuple(sorted((*ok, ("le", "+Inf"))))] == 3
    assert seen["pocketfed_assignments_total", (("status", "offered"),)] == 1
    assert seen["pocketfed_assignments_total", (("status", "quarantined"),)] == 1
    assert seen["pocketfed_updates_refused_total", (("reason", "norm"),)] == 1
    assert seen["pocketfed_spool_bytes", ()] == 5
    assert seen["pocketfed_devices_online", ()] == 1
    assert seen["pocketfed_leader", ()] == 1
    assert seen["pocketfed_database_up", ()] == 1
    assert seen["pocketfed_database_write_seconds_count", ()] >= 3
    assert seen["process_resident_memory_bytes", ()] > 10e6
    text = " ".join(f"{name} {labels}" for name, labels in seen)
    assert "phone" not in text  # nothing that a device says is a label
    assert "48.2" not in text


def test_a_long_polls_wait_is_not_counted_as_work(server: CoordinatorServer) -> None:
    check_in(f"127.0.0.1:{server.port}", wait_s=3.0)
    until(lambda: ("CheckIn", "OK") in server.tally.calls)
    assert server.tally.calls["CheckIn", "OK"].total_s < 2.5


def test_a_port_that_is_taken_is_told_in_a_sentence(store: Store, tmp_path: Path) -> None:
    shown = Metrics(store, tmp_path, Tally(), lambda: False)
    with (
        serve_metrics(shown, "127.0.0.1", 0) as port,
        pytest.raises(MetricsError, match="choose another --metrics-port"),
        serve_metrics(shown, "127.0.0.1", port),
    ):
        pass


def test_a_row_of_vital_figures_holds_what_happened_since_the_last_and_old_ones_are_forgotten(
    store: Store, tmp_path: Path
) -> None:
    tally = Tally(polls=lambda: 7)
    recorder = Recorder(store, tmp_path, tally)
    for seconds in (0.002, 0.002, 0.002, 0.02):
        tally.called("CheckIn", "OK", seconds)
    tally.called("Upload", "INTERNAL", 0.02)
    tally.called("CheckIn", "CANCELLED", 0.02)
    tally.bytes_in = 100
    with store.write() as session:
        session.add(old_row())
    recorder.record()
    tally.bytes_in = 130
    recorder.record()
    with store.read() as session:
        first, second = session.scalars(sa.select(Vitals).order_by(Vitals.at)).all()
    assert (first.calls, first.errors, first.bytes_in, first.polls) == (6, 1, 100, 7)
    assert (second.calls, second.errors, second.bytes_in, second.p99_ms) == (0, 0, 30, 0.0)
    assert first.p50_ms == pytest.approx(2.5)  # the bound that 3 of 6 lie below
    assert 10.0 <= first.p95_ms <= 25.0
    assert BOUNDS_S[:5] == (0.001, 0.0025, 0.005, 0.01, 0.025)


def old_row() -> Vitals:
    numbers = {c.name: 0 for c in Vitals.__table__.columns if c.name != "at"}
    return Vitals(at=now() - timedelta(days=2), **numbers)


# ---- logs ------------------------------------------------------------------------------------------------------------


def logged(form: str, *calls: tuple[str, str, dict[str, Any]]) -> tuple[str, str]:
    """What is on stdout and on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), logging_as(form):
        for name, text, extra in calls:
            logging.getLogger(name).warning("%s", text, extra=extra)
    return out.getvalue(), err.getvalue()


HOSTILE = 'low\n{"level": "info", "message": "forged"}\x1b[2J\0 "battery"'


def test_json_logs_are_one_object_a_line_whatever_a_device_says() -> None:
    out, err = logged(
        "json",
        ("pocketfed.coordinator", HOSTILE, {"device": "phone\n", "rpc": "Decline", "token": "secret"}),
        (SAYS, "run 1 finished", {"run": 1}),
    )
    first, second = map(json.loads, out.splitlines())
    assert err == ""
    assert (first["message"], first["device"], first["rpc"], first["level"]) == (
        HOSTILE,
        "phone\n",
        "Decline",
        "warning",
    )
    assert "secret" not in out  # only known fields are written
    assert (second["logger"], second["run"], second["message"]) == (SAYS, 1, "run 1 finished")


def test_text_logs_keep_a_devices_words_on_one_line_without_control_characters() -> None:
    out, err = logged("text", ("pocketfed.coordinator", HOSTILE, {}), (SAYS, "run 1 finished", {}))
    assert out == "run 1 finished\n"
    assert err.count("\n") == 1
    assert err.endswith(' warning low {"level": "info", "message": "forged"} [2J  "battery"\n')


def test_a_tracebacks_lines_cannot_be_taken_for_log_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_as("text"):
        try:
            raise ValueError("2026-01-01 00:00:00 info\nforged")
        except ValueError:
            logging.getLogger("pocketfed.coordinator").exception("a call failed")
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.endswith("error a call failed")
    assert rest
    assert all(line.startswith("| ") for line in rest)


def test_after_the_block_nothing_of_it_is_left() -> None:
    before = list(logging.getLogger("pocketfed").handlers)
    with logging_as("json"):
        pass
    assert logging.getLogger("pocketfed").handlers == before


# ---- health ----------------------------------------------------------------------------------------------------------


def status(channel: grpc.Channel, service: str = "pocketfed.v1.Fleet") -> str:
    reply = health_pb2_grpc.HealthStub(channel).Check(
        health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S
    )
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


def test_the_coordinators_port_tells_its_health_without_a_credential_but_not_without_end(
    server: CoordinatorServer,
) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        assert status(channel, "") == "SERVING"
        until(lambda: status(channel) == "SERVING" if not server.health.ready else True)
        assert status(channel, "pocketfed.v1.Distribution") == "SERVING"
        with pytest.raises(grpc.RpcError) as caught:
            status(channel, "nobody")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.RpcError) as caught:  # a stream without credential is not kept open for strangers
            next(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        with pytest.raises(grpc.RpcError) as caught:
            [status(channel, "") for _ in range(30)]
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "too many questions for the health from this address" in caught.value.details()


def test_while_the_database_takes_nothing_it_is_alive_but_not_ready(
    store: Store, server: CoordinatorServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocketfed.coordinator import server as module

    until(lambda: server.health.ready)

    def out(session: Any) -> None:
        raise sa.exc.OperationalError("UPDATE", {}, Exception("database or disk is full"))

    monkeypatch.setattr(module, "PROBE_S", 0.02)
    with server.health.served("127.0.0.1", 0) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="pocketfed.v1.Fleet"))
        told = [next(watch).status]
        store.fence = out
        told.append(next(watch).status)
        assert status(channel, "") == "SERVING"
        store.fence = None
        told.append(next(watch).status)
        assert told == [1, 2, 1]  # SERVING, NOT_SERVING, SERVING
        server.stop()
        assert next(watch).status == 2
        assert status(channel, "") == "SERVING"
        watch.cancel()


def test_a_coordinator_that_stands_by_is_alive_and_not_ready() -> None:
    health = Health()
    with health.served("127.0.0.1", 0) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert (status(channel, ""), status(channel)) == ("SERVING", "NOT_SERVING")


# ---- the command -----------------------------------------------------------------------------------------------------


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pocketfed.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_serve_shows_metrics_health_and_json_logs_where_it_is_told_to(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pocketfed.cli", "serve", "--database", "fleet.db", "--listen", "127.0.0.1:0"]
    more = ["--metrics-port", "0", "--health-port", "0", "--log-format", "json"]
    with subprocess.Popen([*command, *more], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            said: dict[str, str] = {}
            while "listening" not in said:
                words = json.loads(child.stdout.readline())["message"].split()
                said[words[0]] = words[-1]
            assert scrape(int(said["metrics"].split(":")[2].split("/")[0]))["pocketfed_leader", ()] == 1
            until(lambda: run("health", said["listening"]).returncode == 0)
            asked = run("health", said["health"])
            assert (asked.returncode, asked.stdout) == (0, f"{said['health']} is serving\n")
            second = [*command, *more[2:4]]  # stands by: it does not listen, but tells its health
            with subprocess.Popen(second, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as standby:
                assert standby.stdout is not None
                place = standby.stdout.readline().split()[-1]
                asked = run("health", place)
                assert (asked.returncode, asked.stderr) == (1, f"pocketfed: {place} is not serving\n")
                assert run("health", place, "--service", "").returncode == 0
                standby.terminate()
        finally:
            child.terminate()
    gone = run("health", said["listening"])
    assert gone.returncode == 1
    assert f"{said['listening']} does not tell its health: unavailable" in gone.stderr


def test_asking_for_the_health_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom pocketfed.cli.main import main\nsys.argv = ['pocketfed', 'health', '127.0.0.1:1']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 1\n"
        "print(sorted({m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout[1:-2].replace("'", "").split(", "))
    assert "grpc" in loaded
    assert loaded.isdisjoint({"numpy", "onnxruntime", "sqlalchemy", "google", "torch"})


def test_history_of_before_the_start_is_not_counted(store: Store) -> None:
    offer(store, "phone")
    outcomes = metrics.Outcomes(store)
    outcomes.update()
    assert outcomes.assignments == {}
    with store.write() as session:
        session.get_one(Assignment, "1-phone").status = "accepted"
    outcomes.update()
    outcomes.update()
    assert outcomes.assignments == {"accepted": 1}
    with store.read() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(History)) == 3  # waiting, offered, accepted
