"""Who may come in: faults 13 and 18 to 22 against a real server, enrolment keys, TLS, operators and the audit."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from cryptography import x509

from pocketfed.client_sdk.errors import ConfigurationError
from pocketfed.client_sdk.link import Busy, Link, Refused, Unreachable
from pocketfed.coordinator.enrolment import EnrolmentError, capped, create_key, enrol, revoke_device, revoke_key
from pocketfed.coordinator.limits import Buckets, Limits
from pocketfed.coordinator.operators import (
    ROLES,
    Actor,
    OperatorError,
    acting,
    audit_lines,
    check_password,
    disable_operator,
    hash_password,
    local_admin,
    log_in,
    set_operator,
)
from pocketfed.coordinator.server import CoordinatorServer, ServeError, ServerConfig
from pocketfed.coordinator.store import Assignment, Audit, Clock, Device, Run, Store, put_artifact, put_blob
from pocketfed.coordinator.tls import Tls, TlsError, find_tls, make_certificates
from pocketfed.protos import distribution_pb2, fleet_pb2, fleet_pb2_grpc

PATIENCE_S = 20.0
TOKEN, OTHER = "A" * 43, "B" * 43


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(str(tmp_path / "fleet.db"))
    yield opened
    opened.close()


@contextlib.contextmanager
def serving(store: Store, listen: str = "127.0.0.1:0", **settings: Any) -> Iterator[str]:
    with CoordinatorServer(store, ServerConfig(listen, **settings)) as server:
        yield f"127.0.0.1:{server.port}"


@contextlib.contextmanager
def linked(address: str, *arguments: Any, **options: Any) -> Iterator[Link]:
    link = Link(address, *arguments, **options)
    yield link
    link.close()


def expect(code: grpc.StatusCode, says: str, call: Callable[[], Any]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is code, caught.value.details()
    assert says in caught.value.details()


def check_in(link: Link, wait_s: float = 0.0, **told: Any) -> fleet_pb2.CheckInReply:
    return link.end_check_in(link.begin_check_in(3, 0, wait_s, **told))


def audited(store: Store) -> list[tuple[str, str, str]]:
    with store.read() as session:
        return [(a.act, a.target, a.outcome) for a in reversed(audit_lines(session))]


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


# ---- 13: clocks ------------------------------------------------------------------------------------------------------


def test_fault_13_a_clock_that_is_set_back_or_forward_moves_no_deadline() -> None:
    wall, passed = [datetime(2026, 3, 29, 0, 59, tzinfo=UTC)], [100.0]  # a minute before summer time begins in Europe
    clock = Clock(lambda: wall[0], lambda: passed[0])
    deadline = clock.now() + timedelta(seconds=30)
    for set_to in (datetime(2026, 3, 28, tzinfo=UTC), datetime(2026, 3, 30, tzinfo=UTC)):
        wall[0] = set_to
        assert clock.now() < deadline
    passed[0] += 31.0
    assert clock.now() - deadline == timedelta(seconds=1)


def test_fault_13_no_deadline_and_no_message_follows_a_devices_clock(tmp_path: Path) -> None:
    """No message holds a time of day, the SDK reads one for its owner's own rules alone (the hours in which it may work, the
    data of a day, how long its examples are kept), and a certificate is valid from two days before it was made."""
    for file in (fleet_pb2, distribution_pb2):
        for message in file.DESCRIPTOR.message_types_by_name.values():
            names = [f.name for f in message.fields]
            assert not [n for n in names if n.endswith(("_at", "_time")) or "date" in n.replace("update", "")], names
    sources = list((Path(__file__).parents[1] / "client_sdk").glob("*.py"))
    assert sources
    asking = [p.name for p in sources if re.search(r"clock\.now\(", p.read_text())]
    assert sorted(asking) == ["examples.py", "usage.py", "watch.py"]
    for source in sources:
        if source.name in ("clock.py", "conditions.py"):
            continue
        assert not re.search(r"time\.time\(|datetime|time_ns|gmtime|localtime", source.read_text()), source
    tls = make_certificates(tmp_path / "certs", ["127.0.0.1"])
    for path in (tls.certificate, tmp_path / "certs" / "ca.pem"):
        made = x509.load_pem_x509_certificate(path.read_bytes())
        assert made.not_valid_before_utc < datetime.now(UTC) - timedelta(days=1)
        assert made.not_valid_after_utc > datetime.now(UTC) + timedelta(days=300)


# ---- 18: limits ------------------------------------------------------------------------------------------------------


SMALL = Limits(
    calls_per_s=50.0, calls_burst=100.0, doubtful_per_s=1000.0, doubtful_burst=1000.0, calls_open=4, transfers_open=2,
    transfers_at_once=3, request_s=0.3, part_s=0.3, transfer_s=1.0, handshake_s=0.5, connections=400,
)  # fmt: skip


@pytest.fixture
def busy(store: Store) -> Iterator[str]:
    """A server with small limits and one enrolled device, TOKEN's."""
    enrol(store, "phone", "stable", "", TOKEN)
    with serving(store, limits=SMALL) as address:
        yield address


METADATA = (("authorization", f"Bearer {TOKEN}"),)
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


def served(address: str) -> bool:
    with grpc.insecure_channel(address, OWN_CONNECTION) as other:
        request = fleet_pb2.CheckInRequest(protocol=1)
        reply = fleet_pb2_grpc.FleetStub(other).CheckIn(request, metadata=METADATA, timeout=PATIENCE_S)
        return reply.WhichOneof("what") is not None


def test_fault_18_messages_over_the_limit_are_refused_compressed_ones_by_what_they_become(store: Store) -> None:
    enrol(store, "phone", "stable", "", TOKEN)
    bomb = bytes(64 << 20)
    assert len(gzip.compress(bomb)) < 70_000  # on the wire
    with serving(store) as address, grpc.insecure_channel(address, OWN_CONNECTION) as channel:
        send = channel.stream_unary("/pocketfed.v1.Fleet/Upload", request_serializer=bytes)
        plain = iter([bytes(2 << 20)])
        expect(grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max", lambda: send(plain, metadata=METADATA))
        gzipped = grpc.Compression.Gzip
        before = resident_mb()
        for _ in range(3):
            expect(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "larger than max",
                lambda: send(iter([bomb]), metadata=METADATA, compression=gzipped),
            )
        assert resident_mb() - before < 64  # client and server share this process
        assert served(address)


def test_fault_18_a_request_that_does_not_come_ends_and_costs_nobody_else(busy: str) -> None:
    """Slow-loris: calls that are opened, and then nothing, or a part now and then for ever."""
    stop = threading.Event()

    def nothing() -> Iterator[bytes]:
        stop.wait(PATIENCE_S)
        yield b""

    with grpc.insecure_channel(busy, OWN_CONNECTION) as channel:
        for method in ("Enrol", "CheckIn", "Upload"):
            send = channel.stream_unary(f"/pocketfed.v1.Fleet/{method}")
            began = time.monotonic()
            expect(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "nothing came for 0.3 s",
                lambda send=send: send(nothing(), metadata=METADATA),  # type: ignore[misc]
            )
            assert time.monotonic() - began < 5
        assert served(busy)
    stop.set()


def test_fault_18_an_endless_upload_ends_in_time_and_an_empty_part_at_once(store: Store, busy: str) -> None:
    assignment = offer(store, "phone")
    header = fleet_pb2.UploadHeader(assignment_id=assignment, total_bytes=4000, digest="0" * 64, num_examples=1)

    def drop_by_drop() -> Iterator[fleet_pb2.UploadPart]:
        yield fleet_pb2.UploadPart(header=header)
        for _ in range(1000):
            time.sleep(0.05)  # this is what the attacker does
            yield fleet_pb2.UploadPart(data=b"x")

    with grpc.insecure_channel(busy, OWN_CONNECTION) as channel:
        upload = fleet_pb2_grpc.FleetStub(channel).Upload
        expect(
            grpc.StatusCode.DEADLINE_EXCEEDED, "not done after 1 s", lambda: upload(drop_by_drop(), metadata=METADATA)
        )
        empty = channel.stream_unary("/pocketfed.v1.Fleet/Upload")
        expect(grpc.StatusCode.INVALID_ARGUMENT, "is empty", lambda: empty(iter([b""]), metadata=METADATA))
    assert served(busy)


def offer(store: Store, name: str) -> str:
    """An open assignment for an enrolled device, of a set with 10 values."""
    with store.write() as session:
        put_artifact(session, {"trainable_sets": {"head": {"size": 10}}}, "v" * 64, [])
        run = Run(
            name="r",
            channel="stable",
            config={},
            artifact_version="v" * 64,
            trainable_set="head",
            seed=1,
            rounds_planned=1,
        )
        session.add(run)
        session.flush()
        device = session.scalars(sa.select(Device).where(Device.name == name)).one()
        row = Assignment(
            id=f"{run.id}-1-1-{device.id}-train", run_id=run.id, round=1, device_id=device.id, kind="train", status="accepted",
            config={}, parameters=put_blob(session, b"theta"),
        )  # fmt: skip
        session.add(row)
        session.flush()
        return row.id


def test_fault_18_open_calls_and_calls_a_second_are_bounded_for_each_device(store: Store, busy: str) -> None:
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(linked(busy, TOKEN))
        polls = [link.begin_check_in(3, 0, PATIENCE_S) for _ in range(SMALL.calls_open)]
        deadline = time.monotonic() + PATIENCE_S
        said, pause = "", threading.Event()
        while "too many calls open" not in said and time.monotonic() < deadline:  # until the polls have arrived
            pause.wait(0.1)  # else these calls would use up the rate that the polls need to get in
            try:
                check_in(link)
            except Busy as error:
                said = str(error)
        assert "this device has too many calls open; end some" in said
        for poll in polls:
            poll.cancel()
    one_a_second = dataclasses.replace(SMALL, calls_per_s=1.0, calls_burst=3.0)
    with serving(store, limits=one_a_second) as address, linked(address, TOKEN) as link:
        with pytest.raises(Busy, match=r"too many calls of this device; try again in [01]\.\d s"):
            [check_in(link) for _ in range(1000)]
        enrol(store, "tablet", "stable", "", OTHER)
        with linked(address, OTHER) as other:
            assert check_in(other).HasField("wait")  # one device's haste is not another's


def test_fault_18_a_thousand_idle_connections_are_closed_and_the_others_served(busy: str) -> None:
    host, port = busy.split(":")
    before = resident_mb()
    idle = []
    for _ in range(1000):
        with contextlib.suppress(OSError):
            idle.append(socket.create_connection((host, int(port)), timeout=PATIENCE_S))
    assert len(idle) > SMALL.connections
    try:
        for connection in idle:  # those over the cap at once, the others when their handshake has not come
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(4096):
                    pass
        assert resident_mb() - before < 60
    finally:
        for connection in idle:
            connection.close()
    assert served(busy)


def test_fault_18_endless_metadata_is_refused(busy: str) -> None:
    with grpc.insecure_channel(busy, OWN_CONNECTION) as channel:
        stub = fleet_pb2_grpc.FleetStub(channel)
        big = (*METADATA, ("x", "y" * (64 << 10)))
        expect(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "metadata size exceeds",
            lambda: stub.CheckIn(fleet_pb2.CheckInRequest(protocol=1), metadata=big),
        )
    assert served(busy)


def test_what_is_remembered_of_peers_is_bounded() -> None:
    buckets = Buckets(rate=1.0, burst=2.0, most=100, clock=lambda: 0.0)
    for peer in range(10_000):
        buckets.take(str(peer))
    assert len(buckets) == 100


def test_a_bucket_fills_again_with_time() -> None:
    moment = [0.0]
    buckets = Buckets(rate=2.0, burst=3.0, most=10, clock=lambda: moment[0])
    assert [buckets.take("a") for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    moment[0] = 0.25
    assert buckets.take("a") == 0.25
    moment[0] = 0.5
    assert buckets.take("a") == 0.0
    assert buckets.take("b") == 0.0


# ---- 19: messages ----------------------------------------------------------------------------------------------------


METHODS = [("Fleet", m.name) for m in fleet_pb2.DESCRIPTOR.services_by_name["Fleet"].methods] + [
    ("Distribution", m.name) for m in distribution_pb2.DESCRIPTOR.services_by_name["Distribution"].methods
]


@pytest.mark.parametrize(("service", "method"), METHODS)
def test_fault_19_bytes_that_are_no_message_are_an_invalid_argument(busy: str, service: str, method: str) -> None:
    with grpc.insecure_channel(busy, OWN_CONNECTION) as channel:
        call = channel.stream_stream(f"/pocketfed.v1.{service}/{method}")
        expect(
            grpc.StatusCode.INVALID_ARGUMENT,
            "bytes are not a",
            lambda: list(call(iter([b"\xff" * 20]), metadata=METADATA)),
        )
        expect(grpc.StatusCode.INVALID_ARGUMENT, "", lambda: list(call(iter([]), metadata=METADATA)))


def test_fault_19_other_protocols_unknown_enums_and_missing_fields_have_answers(store: Store, busy: str) -> None:
    with grpc.insecure_channel(busy, OWN_CONNECTION) as channel:
        fleet = fleet_pb2_grpc.FleetStub(channel)
        for protocol in (0, 2, 2**32 - 1):
            says = f"protocol {protocol} is not spoken here, only 1"
            request = fleet_pb2.CheckInRequest(protocol=protocol)
            expect(grpc.StatusCode.FAILED_PRECONDITION, says, lambda r=request: fleet.CheckIn(r, metadata=METADATA))  # type: ignore[misc]
        assignment = offer(store, "phone")
        beat = fleet_pb2.HeartbeatRequest(assignment_id=assignment, phase=77, progress=float("nan"))  # type: ignore[arg-type]
        assert not fleet.Heartbeat(beat, metadata=METADATA).cancelled
        for request in (fleet_pb2.HeartbeatRequest(), fleet_pb2.HeartbeatRequest(assignment_id="\0" * 1000)):
            expect(
                grpc.StatusCode.NOT_FOUND,
                "holds no assignment",
                lambda r=request: fleet.Heartbeat(r, metadata=METADATA),
            )  # type: ignore[misc]
        part = fleet_pb2.UploadPart()
        expect(grpc.StatusCode.INVALID_ARGUMENT, "is empty", lambda: fleet.Upload(iter([part]), metadata=METADATA))


def test_fault_19_fields_of_a_newer_protocol_are_ignored(busy: str) -> None:
    known = fleet_pb2.CheckInRequest(protocol=1, examples=3).SerializeToString()
    unknown = bytes([15 << 3 | 2, 5]) + b"later"  # field 15, five bytes
    with grpc.insecure_channel(busy, OWN_CONNECTION) as channel:
        reply = channel.unary_unary("/pocketfed.v1.Fleet/CheckIn")(known + unknown, metadata=METADATA)
    assert fleet_pb2.CheckInReply.FromString(reply).HasField("wait")


# ---- 20: credentials and TLS -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "short", "C" * 43, "x" * 500, "é" * 40])
def test_fault_20_calls_without_a_known_token_are_unauthenticated(busy: str, token: str) -> None:
    with linked(busy, token) as link:
        if token.isascii():
            with pytest.raises(Refused, match="this device is not known here") as caught:
                check_in(link)
            assert caught.value.code == "UNAUTHENTICATED"


def test_fault_20_guessing_tokens_is_slowed_down_and_a_known_device_at_that_address_is_not(store: Store) -> None:
    enrol(store, "phone", "stable", "", TOKEN)
    slow = Limits(doubtful_per_s=0.01, doubtful_burst=5.0)
    with serving(store, limits=slow) as address, linked(address, TOKEN) as honest, linked(address) as guesser:
        check_in(honest)
        for guess in range(5):
            guesser.token = f"guess-{guess}".ljust(43, "x")
            with pytest.raises(Refused, match="not known"):
                check_in(guesser)
        guesser.token = "one-more".ljust(43, "x")
        with pytest.raises(Busy, match="too many calls with unknown tokens from this address"):
            check_in(guesser)
        assert check_in(honest).HasField("wait")


def test_fault_20_another_devices_assignment_is_not_found(store: Store, busy: str) -> None:
    assignment = offer(store, "phone")
    enrol(store, "thief", "stable", "", OTHER)
    with linked(busy, OTHER) as thief, pytest.raises(Refused, match="holds no assignment") as caught:
        thief.upload(assignment, b"x", "0" * 64, 1, {})
    assert caught.value.code == "NOT_FOUND"


def test_fault_20_a_credential_in_use_at_two_places_is_noticed_and_a_restart_is_not(store: Store) -> None:
    with serving(store) as address, linked(address) as owner:
        owner.enrol("phone", "stable", TOKEN)
        check_in(owner)
        with linked(address, TOKEN) as again:  # the app was started anew
            check_in(again)
            check_in(again)
            assert audited(store) == []
            check_in(owner)  # and yet the one before is still there
            check_in(again)
    assert audited(store) == [("credential.shared", "phone", "noticed")]  # once, not with every call
    with store.read() as session:
        assert session.scalars(sa.select(Device.shared_at)).one() is not None


def test_fault_20_a_revoked_device_is_out_with_its_next_call_and_ends_its_long_poll(store: Store) -> None:
    with CoordinatorServer(store, ServerConfig("127.0.0.1:0")) as server, linked(f"127.0.0.1:{server.port}") as link:
        link.enrol("phone", "stable", TOKEN)
        poll = link.begin_check_in(3, 0, 60.0)
        with server.assignments.changed:
            assert server.assignments.changed.wait_for(lambda: server.online("stable"), PATIENCE_S)
        with acting(store, local_admin(), "device.revoke", "phone") as session:
            revoke_device(session, "phone")
        assert server.online("stable") == {}
        server.assignments.notify_offered()  # what wakes long polls
        with pytest.raises(Refused, match="this device was revoked"):
            link.end_check_in(poll)
        with pytest.raises(Refused, match="not known here") as caught:
            check_in(link)
        assert caught.value.code == "UNAUTHENTICATED"
        with pytest.raises(Refused, match="this device was revoked; ask the operator"):
            link.enrol("phone", "stable", TOKEN)


def test_fault_20_a_revoked_device_whose_credential_was_right_a_moment_ago_is_out_and_sampled_no_more(
    store: Store,
) -> None:
    with CoordinatorServer(store, ServerConfig("127.0.0.1:0")) as server, linked(f"127.0.0.1:{server.port}") as link:
        link.enrol("phone", "stable", TOKEN)
        for _ in range(2):  # from the second call on the gate knows the credential
            assert link.end_check_in(link.begin_check_in(3, 0, 0.0)).HasField("wait")
        assert server.online("stable") == {1: "phone"}
        with store.write() as session:
            revoke_device(session, "phone")
        with pytest.raises(Refused, match="this device was revoked; ask the operator") as caught:
            link.end_check_in(link.begin_check_in(3, 0, 0.0))
        assert caught.value.code == "UNAUTHENTICATED"
        assert server.online("stable") == {}
        with pytest.raises(Refused, match="not known here"):
            link.end_check_in(link.begin_check_in(3, 0, 0.0))


def test_fault_20_a_server_that_another_authority_signed_is_not_talked_to(store: Store, tmp_path: Path) -> None:
    ours, theirs = (make_certificates(tmp_path / name, ["127.0.0.1"]) for name in ("ours", "theirs"))
    with serving(store, tls=ours) as address:
        with linked(address, ca=tmp_path / "ours" / "ca.pem") as link:
            assert link.encrypted
            link.enrol("phone", "stable", TOKEN)
            assert check_in(link).HasField("wait")
        with (
            linked(address, ca=tmp_path / "theirs" / "ca.pem") as link,
            pytest.raises(Unreachable, match="does not prove that it is the coordinator"),
        ):
            link.enrol("tablet", "stable", OTHER)
        with linked(address) as plain, pytest.raises(Unreachable):
            plain.enrol("tablet", "stable", OTHER)  # plaintext to a TLS port
    with (
        serving(store) as address,
        linked(address, ca=tmp_path / "ours" / "ca.pem") as link,
        pytest.raises(Unreachable),
    ):
        link.enrol("tablet", "stable", OTHER)  # TLS to a plaintext port
    assert theirs.key != ours.key
    with store.read() as session:
        assert session.scalars(sa.select(Device.name)).all() == ["phone"]


def test_fault_20_a_certificate_for_another_host_is_not_taken(store: Store, tmp_path: Path) -> None:
    tls = make_certificates(tmp_path / "certs", ["coordinator.example"])
    with (
        serving(store, tls=tls) as address,
        linked(address, ca=tmp_path / "certs" / "ca.pem") as link,
        pytest.raises(Unreachable, match="does not prove that it is the coordinator"),
    ):
        link.enrol("phone", "stable", TOKEN)


def test_fault_20_plaintext_to_another_machine_needs_its_long_name_and_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with linked("coordinator.example:8765") as link:
        assert link.encrypted  # by default, with the authorities that gRPC brings
    with (
        caplog.at_level(logging.WARNING, "pocketfed"),
        linked("coordinator.example:8765", allow_plaintext_off_loopback=True) as link,
    ):
        assert not link.encrypted
    assert "the link to coordinator.example:8765 is not encrypted" in caplog.text


def test_fault_20_serving_other_machines_in_plaintext_needs_its_long_name(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ServeError, match="there is no certificate to encrypt with; make one with `pocketfed certs`"):
        CoordinatorServer(store, ServerConfig("0.0.0.0:0")).start()
    with serving(store, "0.0.0.0:0", allow_plaintext_off_loopback=True) as address, linked(address) as link:
        assert "served in plaintext" in caplog.text
        with pytest.raises(Refused, match="the enrolment key is wrong"):  # and nobody comes in without one
            link.enrol("phone", "stable", TOKEN)


def test_a_renewed_certificate_is_served_without_a_restart(store: Store, tmp_path: Path) -> None:
    tls = make_certificates(tmp_path / "certs", ["coordinator.example"])
    ca = tmp_path / "certs" / "ca.pem"
    before = ca.read_bytes()
    with serving(store, tls=tls) as address:
        with linked(address, ca=ca) as link, pytest.raises(Unreachable):
            link.enrol("phone", "stable", TOKEN)
        make_certificates(tmp_path / "certs", ["127.0.0.1"])
        assert ca.read_bytes() == before
        with linked(address, ca=ca) as link:
            link.enrol("phone", "stable", TOKEN)


def test_private_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    make_certificates(tmp_path / "certs", ["127.0.0.1", "localhost"])
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "certs").iterdir()}
    assert modes == {"ca.pem": 0o644, "ca.key": 0o600, "server.pem": 0o644, "server.key": 0o600}
    assert (tmp_path / "certs").stat().st_mode & 0o777 == 0o700


def test_certificates_that_do_not_fit_are_told_in_a_sentence(store: Store, tmp_path: Path) -> None:
    one, two = (make_certificates(tmp_path / name, ["127.0.0.1"]) for name in ("one", "two"))
    with pytest.raises(TlsError, match="is not the key of"):
        CoordinatorServer(store, ServerConfig("127.0.0.1:0", tls=Tls(one.certificate, two.key))).start()
    assert find_tls(tmp_path) is None
    (tmp_path / "one" / "ca.key").unlink()
    with pytest.raises(TlsError, match="put the key back"):
        make_certificates(tmp_path / "one", ["127.0.0.1"])
    with pytest.raises(TlsError, match="give --host"):
        make_certificates(tmp_path / "three", [])
    with pytest.raises(ConfigurationError, match="cannot read ca"):
        Link("127.0.0.1:1", ca=tmp_path / "missing.pem")
    with pytest.raises(ConfigurationError, match="holds no certificate"):
        Link("127.0.0.1:1", ca=one.key)


# ---- 21: floods ------------------------------------------------------------------------------------------------------


def test_fault_21_a_key_lets_in_its_quota_however_many_come_at_once(store: Store) -> None:
    with store.write() as session:
        _, key = create_key(session, quota=5, cohort="beta")
    refused: list[str] = []

    def come(number: int) -> None:
        try:
            enrol(store, f"sybil-{number}", "stable", "", f"{number}".rjust(43, "s"), key)
        except EnrolmentError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=come, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused == ["the enrolment key has let in its 5 devices; ask for a new one"] * 15
    with store.read() as session:
        assert session.execute(sa.select(Device.cohort, sa.func.count()).group_by(Device.cohort)).all() == [("beta", 5)]


def test_fault_21_an_enrolment_whose_reply_was_lost_counts_once_against_the_quota(store: Store) -> None:
    with store.write() as session:
        _, key = create_key(session, quota=1)
    for _ in range(3):
        enrol(store, "phone", "stable", "", TOKEN, key)
    with pytest.raises(EnrolmentError, match="has let in its 1 devices"):
        enrol(store, "tablet", "stable", "", OTHER, key)
    with pytest.raises(EnrolmentError, match="has let in its 1 devices"):
        enrol(store, "phone", "stable", "", OTHER, key)


def test_fault_21_expired_revoked_and_unknown_keys_let_nobody_in(store: Store) -> None:
    from pocketfed.coordinator.store import EnrolmentKey

    with store.write() as session:
        number, revoked = create_key(session, quota=5)
        revoke_key(session, number)
        late, expired = create_key(session, quota=5, expires_at=datetime.now(UTC) + timedelta(hours=1))
        session.get_one(EnrolmentKey, late).expires_at = datetime.now(UTC) - timedelta(seconds=1)
    for key, says in ((revoked, "is wrong"), (expired, "expired at"), ("guess", "is wrong"), ("", "is wrong")):
        with pytest.raises(EnrolmentError, match=says) as caught:
            enrol(store, "phone", "stable", "", TOKEN, key)
        assert caught.value.kind == "denied"
    with store.read() as session:
        assert session.scalars(sa.select(Device)).all() == []
        assert revoked not in str(session.execute(sa.text("SELECT * FROM enrolment_keys")).all())


def test_fault_21_a_flood_of_enrolments_is_slowed_down(store: Store) -> None:
    slow = Limits(doubtful_per_s=0.01, doubtful_burst=3.0)
    with serving(store, limits=slow) as address, linked(address) as link:
        for number in range(3):
            link.enrol(f"sybil-{number}", "stable", f"{number}".rjust(43, "s"))
        with pytest.raises(Busy, match="too many enrolments from this address; try again in"):
            link.enrol("sybil-3", "stable", TOKEN)
        link.token = "0".rjust(43, "s")
        assert check_in(link).HasField("wait")


def test_fault_21_ten_thousand_sybils_are_no_more_of_a_round_than_their_keys_cap(store: Store) -> None:
    from pocketfed.coordinator.store import Round

    with store.write() as session:
        capped_id, _ = create_key(session, quota=10_000, round_cap=2)
        free_id, _ = create_key(session, quota=10)
        values = {
            "channel": "stable",
            "token_hash": "",
            "sdk_version": "",
            "examples": 1,
            "enrolled_at": datetime.now(UTC),
        }
        sybils = [values | {"id": n, "name": f"s{n:05d}", "enrolment_key_id": capped_id} for n in range(1, 10_001)]
        honest = [values | {"id": n, "name": f"h{n}", "enrolment_key_id": free_id} for n in range(20_001, 20_004)]
        own = [values | {"id": 30_000, "name": "own", "enrolment_key_id": None}]
        session.execute(sa.insert(Device), sybils + honest + own)
        online = dict(session.execute(sa.select(Device.id, Device.name)).all())  # type: ignore[arg-type]
        first = capped(session, online)
        assert set(first.values()) == {"s00001", "s00002", "h20001", "h20002", "h20003", "own"}
        put_artifact(session, {}, "v", [])
        run = Run(
            name="r", channel="stable", config={}, artifact_version="v", trainable_set="head", seed=1, rounds_planned=1
        )
        session.add(run)
        session.flush()
        session.add(Round(run_id=run.id, number=0))
        session.flush()
        assert set(capped(session, online).values()) - set(first.values()) == {
            "s00003",
            "s00004",
        }  # the next ones' turn
        busy = Assignment(id="a", run_id=run.id, round=0, device_id=9_999, kind="train", status="accepted", config={})
        busy.parameters = put_blob(session, b"")
        session.add(busy)
        session.flush()
        of_key = [name for name in capped(session, online).values() if name.startswith("s")]
        assert of_key == ["s00003", "s09999"]  # one that works still has one of the two places


# ---- 22: hostile text ------------------------------------------------------------------------------------------------


INJECTION = "x'); DROP TABLE devices; --"


def test_fault_22_sql_in_names_and_metrics_is_text(store: Store, tmp_path: Path) -> None:
    with serving(store) as address, linked(address) as link:
        link.enrol(INJECTION, INJECTION, TOKEN)
        with pytest.raises(Refused, match="there is no release on channel"):
            link.latest(INJECTION)
        assignment = offer(store, INJECTION)
        receipt = link.upload(assignment, b"", "", 1, {INJECTION: 1.0, "nan": float("nan")})
        assert receipt.reason == ""
        with acting(store, Actor(INJECTION, "admin"), INJECTION, INJECTION):
            pass
    with store.read() as session:
        assert session.scalars(sa.select(Device.name)).all() == [INJECTION]
        assert session.scalars(sa.select(Audit.who)).all() == [INJECTION]


def test_fault_22_long_strings_and_heaps_of_metrics_are_refused(store: Store, tmp_path: Path) -> None:
    with serving(store) as address, linked(address) as link:
        with pytest.raises(Refused, match="larger than max") as caught:
            link.enrol("x" * (10 << 20), "stable", TOKEN)
        assert caught.value.code == "RESOURCE_EXHAUSTED"
        with pytest.raises(Refused, match=r"a request of 100\d+ bytes is more than 4096"):
            link.enrol("x" * 100_000, "stable", TOKEN)
        link.enrol("phone", "stable", TOKEN)
        assignment = offer(store, "phone")
        for metrics in ({f"m{n}": 1.0 for n in range(33)}, {"x" * 101: 1.0}, {"": 1.0}, {"a\0b": 1.0}):
            with pytest.raises(Refused, match="at most 32 metrics with names of 1 to 100 printable characters"):
                link.upload(assignment, b"", "", 1, metrics)
        link.decline(assignment, "low \x1b[2J battery \0" + "x" * 10_000)
    with store.read() as session:
        said = session.scalars(sa.select(Assignment.error)).one() or ""
        assert said.startswith("low  [2J battery  xxx")
        assert len(said) == 500


def test_fault_22_the_metrics_of_a_round_have_at_most_64_names_whatever_devices_make_up() -> None:
    from pocketfed.coordinator.strategy_base import WeightedMean

    mean = WeightedMean()
    for device in range(50):
        mean.add({"loss": 1.0 + device, **{f"{device}-{n}": 1.0 for n in range(31)}}, 1.0)
    result = mean.result()
    assert result is not None
    assert len(result) == 64
    assert result["loss"] == 25.5


# ---- operators and the audit -----------------------------------------------------------------------------------------


def test_roles_may_do_what_those_before_them_may_and_every_act_leaves_a_line(store: Store) -> None:
    allowed = {}
    for role in (*ROLES, "", "root"):
        for act in ("look", "publish", "device.revoke", "key.revoke"):
            try:
                with acting(store, Actor(f"{role}!", role), act, "x"):
                    allowed.setdefault(role, []).append(act)
            except OperatorError:
                continue
    assert allowed == {
        "viewer": ["look"],
        "operator": ["look", "publish", "device.revoke"],
        "admin": ["look", "publish", "device.revoke", "key.revoke"],
    }
    outcomes = [outcome for _, _, outcome in audited(store)]
    assert (outcomes.count("done"), outcomes.count("refused")) == (8, 12)


def test_an_act_that_fails_changes_nothing_and_says_so_in_the_audit(store: Store) -> None:
    def act() -> None:
        with acting(store, local_admin(), "device.revoke", "nobody") as session:
            create_key(session, quota=1)
            revoke_device(session, "nobody")

    with pytest.raises(EnrolmentError, match="there is no device 'nobody'"):
        act()
    assert audited(store) == [("device.revoke", "nobody", "failed")]
    with store.read() as session:
        assert session.scalar(sa.text("SELECT count(*) FROM enrolment_keys")) == 0


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE audit SET who = 'nobody'",
        "DELETE FROM audit",
        "INSERT OR REPLACE INTO audit (id, at, who, act, target, outcome, detail) VALUES (1, '2026-01-01', 'x', 'x', '', 'done', '')",
    ],
)
def test_the_audit_only_grows(store: Store, sql: str) -> None:
    with acting(store, local_admin(), "publish", "v1"):
        pass
    with pytest.raises(sa.exc.DatabaseError, match="the audit only grows"), store.write() as session:
        session.execute(sa.text(sql))
    assert audited(store) == [("publish", "v1", "done")]


def test_passwords_are_scrypt_and_a_disabled_operator_is_out(store: Store) -> None:
    with store.write() as session:
        set_operator(session, "ada", "operator", "correct horse")
    assert log_in(store, "ada", "correct horse") == Actor("ada", "operator")
    assert log_in(store, "ada", "wrong horse") is None
    assert log_in(store, "bob", "correct horse") is None
    with store.write() as session:
        disable_operator(session, "ada")
    assert log_in(store, "ada", "correct horse") is None
    assert [outcome for _, _, outcome in audited(store)] == ["done", "refused", "refused", "refused"]
    one, two = hash_password("correct horse"), hash_password("correct horse")
    assert one != two
    assert one.startswith("scrypt$16384:8:1$")
    assert check_password("correct horse", two)
    assert not check_password("correct horse", "plain")
    for name, role, password in (("", "viewer", "long enough"), ("x", "king", "long enough"), ("x", "viewer", "short")):
        with pytest.raises(OperatorError), store.write() as session:
            set_operator(session, name, role, password)
