"""Whose artifacts devices run: faults 15 to 17, keys that come and go, and parsers that take anything and allocate nothing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketfed.client_sdk import Device
from pocketfed.client_sdk.artifacts import parse_manifest
from pocketfed.client_sdk.errors import ArtifactError, ConfigurationError, PocketfedError, UntrustedError
from pocketfed.client_sdk.trust import Trust
from pocketfed.coordinator import signing
from pocketfed.coordinator.artifacts import BuiltArtifact, manifest_bytes, publish_artifact
from pocketfed.coordinator.assignments import Assignments, Header, UploadError
from pocketfed.coordinator.operators import audit_lines
from pocketfed.coordinator.releases import roll_back
from pocketfed.coordinator.server import CoordinatorServer, ServerConfig
from pocketfed.coordinator.signing import SigningError
from pocketfed.coordinator.store import (
    Assignment,
    Release,
    Run,
    Signature,
    Store,
    latest_release,
    put_artifact,
    put_blob,
)
from pocketfed.model.parameters import ParametersError, decode_vector, encode_vector
from pocketfed.protos import distribution_pb2, fleet_pb2

V1, V2, V3 = ("1" * 64, "2" * 64, "3" * 64)


@dataclass
class Said:
    statement: bytes
    signature: bytes


class Publisher:
    """A database with three versions, and the keys beside it."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(str(folder / "fleet.db"))
        with self.store.write() as session:
            for version in (V1, V2, V3):
                put_artifact(session, {}, version, [])
            self.keys = signing.create_keys(session, folder / "keys")

    def list(self) -> Said:
        with self.store.read() as session:
            newest = signing.newest_list(session)
            assert newest is not None
            self.root = newest.publisher
            return Said(newest.statement, newest.signature)

    def sign(self, version: str, channel: str = "stable", **how: bool) -> Said:
        with self.store.write() as session:
            row = signing.sign_version(session, self.keys, channel, version, **how)
            return Said(row.statement, row.signature)

    def rotate(self) -> None:
        with self.store.write() as session:
            self.keys = signing.rotate_keys(session, self.keys)

    def revoke(self, name: str) -> None:
        with self.store.write() as session:
            self.keys = signing.revoke_signing_key(session, self.keys, name)


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[Publisher]:
    made = Publisher(tmp_path)
    yield made
    made.store.close()


@pytest.fixture
def trust(tmp_path: Path, publisher: Publisher) -> Trust:
    made = Trust(tmp_path / "trust.json")
    made.learn_keys(publisher.list())
    return made


# ---- 15: signatures --------------------------------------------------------------------------------------------------


def test_fault_15_a_changed_signature_statement_or_list_is_refused(
    publisher: Publisher, trust: Trust, tmp_path: Path
) -> None:
    said = publisher.sign(V1)
    statement = said.statement.replace(V1.encode(), V2.encode())
    for version, wrong in (
        (V2, Said(statement, said.signature)),
        (V1, Said(said.statement, bytes(64))),
        (V1, Said(said.statement, said.signature[:-1])),
        (V1, Said(said.statement, b"")),
        (V1, Said(said.statement + b" ", said.signature)),
    ):
        with pytest.raises(UntrustedError, match="is signed by none of the 1 keys"):
            trust.learn_version(version, "stable", wrong)
        with pytest.raises(UntrustedError, match="has not signed"):
            trust.check(version, "stable", release=True)
    listed = publisher.list()
    fresh = Trust(tmp_path / "other.json", publisher.root)
    for wrong in (
        Said(listed.statement, bytes(64)),
        Said(listed.statement.replace(b"false", b"true"), listed.signature),
    ):
        with pytest.raises(UntrustedError, match="the publisher's list of keys"):
            fresh.learn_keys(wrong)
    trust.learn_version(V1, "stable", said)
    trust.check(V1, "stable", release=True)


def test_fault_15_a_word_about_another_version_or_channel_is_not_taken_for_this_one(
    publisher: Publisher, trust: Trust
) -> None:
    for said in (publisher.sign(V2), publisher.sign(V1, "beta")):
        with pytest.raises(UntrustedError, match="the signature is for version"):
            trust.learn_version(V1, "stable", said)
    with pytest.raises(UntrustedError, match="statement is not"):
        trust.learn_version(
            V1, "stable", publisher.list()
        )  # the root signs lists only, and a list is no word on a version


def test_fault_15_an_unknown_key_is_refused_even_if_its_list_is_offered(
    tmp_path: Path, publisher: Publisher, trust: Trust
) -> None:
    (tmp_path / "stranger").mkdir()
    stranger = Publisher(tmp_path / "stranger")
    with pytest.raises(UntrustedError, match=f"but {publisher.root[:16]} is pinned; nothing is taken from it"):
        trust.learn_keys(stranger.list())
    with pytest.raises(UntrustedError, match="is signed by none of the 1 keys"):
        trust.learn_version(V1, "stable", stranger.sign(V1))
    stranger.store.close()


def test_fault_15_a_revoked_key_counts_no_more_also_for_what_was_learnt_before(
    publisher: Publisher, trust: Trust
) -> None:
    trust.learn_version(V1, "stable", publisher.sign(V1))
    trust.adopt(V1, "stable")
    old = publisher.list()
    (name,) = publisher.keys.signing
    publisher.revoke(name)
    trust.learn_keys(publisher.list())
    with pytest.raises(UntrustedError, match=f"the key {name} that signed artifact 111111111111 was revoked"):
        trust.check(V1, "stable", release=True)
    trust.learn_keys(old)  # replayed: an older list brings no key back
    with pytest.raises(UntrustedError, match="was revoked"):
        trust.check(V1, "stable", release=True)
    with publisher.store.write() as session:
        assert signing.sign_again(session, publisher.keys) == ["stable"]
        again = signing.newest_signature(session, "stable", V1)
        assert again is not None
    trust.learn_version(V1, "stable", Said(again.statement, again.signature))
    trust.check(V1, "stable", release=True)


def test_keys_rotate_without_the_old_one_being_lost(publisher: Publisher, trust: Trust) -> None:
    trust.learn_version(V1, "stable", publisher.sign(V1))
    publisher.rotate()
    by_the_new = publisher.sign(V2)
    with pytest.raises(UntrustedError, match="is signed by none of the 1 keys"):
        trust.learn_version(V2, "stable", by_the_new)
    trust.learn_keys(publisher.list())
    trust.learn_version(V2, "stable", by_the_new)
    trust.check(V1, "stable", release=True)
    trust.check(V2, "stable", release=True)


def test_the_pin_outlives_the_process_and_another_is_refused(
    publisher: Publisher, trust: Trust, tmp_path: Path
) -> None:
    again = Trust(tmp_path / "trust.json")
    publisher.list()
    assert again.publisher == trust.publisher == publisher.root
    with pytest.raises(ConfigurationError, match="has pinned the publisher"):
        Trust(tmp_path / "trust.json", "f" * 64)
    with pytest.raises(ConfigurationError, match="is not a key of 64 hexadecimal digits"):
        Trust(tmp_path / "new.json", "not a key")
    (tmp_path / "trust.json").write_text("{")
    with pytest.raises(ConfigurationError, match="not readable"):  # not: trusting anybody again
        Trust(tmp_path / "trust.json")


def test_without_a_publisher_only_a_coordinator_on_this_machine_is_believed(tmp_path: Path) -> None:
    Trust(tmp_path / "a.json", unsigned=True).check(V1, "stable", release=True)
    with pytest.raises(UntrustedError, match="comes from another machine and no publisher has signed it"):
        Trust(tmp_path / "b.json").check(V1, "stable", release=True)
    with pytest.raises(UntrustedError, match="has not signed"):
        Trust(tmp_path / "c.json", "a" * 64, unsigned=True).check(V1, "stable", release=True)


# ---- 16: downgrade ---------------------------------------------------------------------------------------------------


def test_fault_16_an_older_version_is_refused_unless_a_rollback_is_signed(publisher: Publisher, trust: Trust) -> None:
    first, second, third = (publisher.sign(v) for v in (V1, V2, V3))
    for version, said in ((V1, first), (V2, second), (V3, third)):
        trust.learn_version(version, "stable", said)
    trust.adopt(V3, "stable")
    for version in (V1, V2):
        with pytest.raises(UntrustedError, match=f"is older than {V3[:12]}, which this device runs"):
            trust.check(version, "stable", release=True)
    trust.check(V2, "stable", release=False)  # a round of the version before may end
    with pytest.raises(UntrustedError, match="is older than"):
        trust.check(V1, "stable", release=False)
    with pytest.raises(SigningError, match="use `pocketfed release rollback`"):
        publisher.sign(V1)
    trust.learn_version(V1, "stable", publisher.sign(V1, rollback=True, supersede=True))
    trust.check(V1, "stable", release=True)
    trust.adopt(V1, "stable")
    with pytest.raises(UntrustedError, match="is older than"):  # what was rolled back from is not trained on any more
        trust.check(V3, "stable", release=False)
    trust.learn_version(V1, "stable", first)  # replayed: it does not take back the newer word
    trust.check(V1, "stable", release=True)


def test_fault_16_a_superseded_version_is_not_even_trained_on(publisher: Publisher, trust: Trust) -> None:
    for version, supersede in ((V1, False), (V2, True)):
        trust.learn_version(version, "stable", publisher.sign(version, supersede=supersede))
    trust.adopt(V2, "stable")
    with pytest.raises(UntrustedError, match="is older than"):
        trust.check(V1, "stable", release=False)


def test_fault_16_sequences_grow_also_when_the_database_was_restored_from_an_older_copy(tmp_path: Path) -> None:
    first = Publisher(tmp_path)
    said = json.loads(first.sign(V1).statement)
    with first.store.write() as session:
        session.execute(sa.delete(Signature))
    assert json.loads(first.sign(V2).statement)["sequence"] > said["sequence"]
    first.store.close()


# ---- devices ---------------------------------------------------------------------------------------------------------


class Fleet:
    """A served database with the nano artifact in two versions, the first one released and signed; and one device."""

    def __init__(self, folder: Path, built: BuiltArtifact) -> None:
        self.folder, self.first = folder, built
        data = built.manifest | {"parent": built.version}
        self.second = BuiltArtifact(hashlib.sha256(manifest_bytes(data)).hexdigest(), data, built.folder)
        self.store = Store(str(folder / "fleet.db"))
        self.publish(self.first)
        self.server = CoordinatorServer(self.store, ServerConfig("127.0.0.1:0"))
        self.device = Device(f"127.0.0.1:{self.server.start()}", folder / "home", name="phone")

    def publish(self, built: BuiltArtifact, signed: bool = True) -> None:
        with self.store.write() as session:
            self.keys = signing.ensure_keys(session, self.folder / "keys")
            publish_artifact(session, built, "stable", "head", self.keys if signed else None)

    def release_only(self, built: BuiltArtifact) -> int:
        """As somebody could who can write to the database and has no key."""
        with self.store.write() as session:
            last = latest_release(session, "stable")
            assert last is not None
            release = Release(
                channel="stable", artifact_version=built.version, trainable_set="head", parameters=last.parameters
            )
            session.add(release)
            session.flush()
            return release.id

    def check_in(self) -> str:
        """One check-in of the device that does not wait; returns what it says."""
        self.device._participation.failing = True
        self.device.enrol()
        self.device._participation.ask_for_work()
        return self.device.status()

    def runs(self) -> str:
        return str(json.loads((self.folder / "home" / "release.json").read_text())["artifact"])

    def alerts(self) -> list[tuple[str, str]]:
        with self.store.read() as session:
            return [(a.who, a.target) for a in audit_lines(session) if a.act == "release.refused"]


@pytest.fixture
def fleet(tmp_path: Path, nano_built: BuiltArtifact) -> Iterator[Fleet]:
    made = Fleet(tmp_path, nano_built)
    yield made
    made.device.close()
    made.server.stop()
    made.store.close()


def test_fault_15_a_device_keeps_its_model_when_a_release_is_not_signed_and_the_operator_hears_of_it(
    fleet: Fleet,
) -> None:
    fleet.check_in()
    assert fleet.runs() == fleet.first.version
    assert fleet.device._trust.publisher == signing.public_hex(fleet.keys.root)  # type: ignore[arg-type]
    before = fleet.device.predict("play some jazz").probabilities
    fleet.publish(fleet.second, signed=False)
    said = fleet.check_in()
    assert said == (
        f"keeps its model: the publisher {fleet.device._trust.publisher[:16]} has not signed artifact "
        f"{fleet.second.version[:12]}; it is not used"
    )
    assert fleet.runs() == fleet.first.version
    assert fleet.device.predict("play some jazz").probabilities == before
    assert not (fleet.folder / "home" / "artifacts" / fleet.second.version).exists()  # not even fetched
    assert fleet.check_in() == said  # it is not offered again, and the device goes on
    assert fleet.alerts() == [("phone", f"2 {fleet.second.version}")]


def test_fault_15_a_device_hears_of_a_revoked_key_with_its_next_check_in(fleet: Fleet) -> None:
    fleet.check_in()
    (name,) = fleet.keys.signing
    with fleet.store.write() as session:
        signing.revoke_signing_key(session, fleet.keys, name)
    fleet.release_only(fleet.first)  # other parameters for the same artifact
    assert "keeps its model" in fleet.check_in()
    with fleet.store.write() as session:
        signing.sign_again(session, signing.open_keys(fleet.folder / "keys"))
    newest = fleet.release_only(fleet.first)
    fleet.check_in()
    assert json.loads((fleet.folder / "home" / "release.json").read_text())["id"] == newest


def test_fault_16_a_device_goes_back_for_the_publisher_and_for_nobody_else(fleet: Fleet) -> None:
    fleet.check_in()
    fleet.publish(fleet.second)
    fleet.check_in()
    assert fleet.runs() == fleet.second.version
    fleet.release_only(fleet.first)
    assert f"artifact {fleet.first.version[:12]} is older than {fleet.second.version[:12]}" in fleet.check_in()
    assert fleet.runs() == fleet.second.version
    with fleet.store.write() as session:
        roll_back(session, fleet.keys, "stable", fleet.first.version[:10])
    fleet.check_in()
    assert fleet.runs() == fleet.first.version


def test_a_publisher_given_to_the_device_is_the_only_one_it_runs(fleet: Fleet, tmp_path: Path) -> None:
    address = fleet.device._link.coordinator
    with (
        Device(address, tmp_path / "other", publisher="a" * 64) as device,
        pytest.raises(UntrustedError, match="is pinned"),
    ):
        device.fetch()
    with Device(address, tmp_path / "right", publisher=publisher_of(fleet)) as device:
        assert device.fetch()


def publisher_of(fleet: Fleet) -> str:
    with fleet.store.read() as session:
        newest = signing.newest_list(session)
        assert newest is not None
        return newest.publisher


def test_keys_of_another_place_cannot_publish_here(publisher: Publisher, tmp_path: Path) -> None:
    with publisher.store.write() as session:
        with pytest.raises(SigningError, match=r"there are no publisher's keys in .*elsewhere; make them"):
            signing.ensure_keys(session, tmp_path / "elsewhere")
        with pytest.raises(SigningError, match=r"has the publisher .* already; `pocketfed keys rotate`"):
            signing.create_keys(session, tmp_path / "elsewhere")
    (tmp_path / "strange").mkdir()
    strange = Publisher(tmp_path / "strange")
    with publisher.store.write() as session, pytest.raises(SigningError, match="no signing key of the publisher"):
        signing.ensure_keys(session, tmp_path / "strange" / "keys")
    strange.store.close()
    (tmp_path / "keys" / "root.key").unlink()  # the root is kept elsewhere
    without_root = signing.open_keys(tmp_path / "keys")
    with publisher.store.write() as session:
        signing.sign_version(session, without_root, "stable", V1)
        with pytest.raises(SigningError, match=r"the root key of the publisher .* is not in"):
            signing.rotate_keys(session, without_root)
    modes = {p.stat().st_mode & 0o777 for p in (tmp_path / "keys").iterdir()}
    assert modes == {0o600}


# ---- 17: hostile bytes -----------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("touch pwned",)


def safetensors(header: Any, data: bytes = b"", claimed: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text + data


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("../../evil", b"x")
        archive.writestr("delta", bytes(40))
    return stream.getvalue()


F32 = {"dtype": "F32", "shape": [10], "data_offsets": [0, 40]}
HOSTILE = {
    "a pickle": pickle.dumps(Bomb()),
    "a zip with a path out of it": zipped(),
    "nothing": b"",
    "a header of 1 GB": safetensors({}, claimed=1 << 30),
    "a header of all that 64 bits can say": safetensors({}, claimed=2**64 - 1),
    "overlapping offsets": safetensors({"delta": F32, "other": F32 | {"data_offsets": [20, 60]}}, bytes(60)),
    "huge dimensions": safetensors({"delta": F32 | {"shape": [1 << 62, 1 << 62]}}, bytes(40)),
    "offsets past the end": safetensors({"delta": F32 | {"data_offsets": [0, 1 << 40]}}, bytes(40)),
    "offsets backwards": safetensors({"delta": F32 | {"data_offsets": [40, 0]}}, bytes(40)),
    "a negative size": safetensors({"delta": F32 | {"shape": [-10]}}, bytes(40)),
    "another type": safetensors({"delta": F32 | {"dtype": "F64"}}, bytes(40)),
    "a shape to broadcast": safetensors({"delta": F32 | {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "a deep header": safetensors(b"[" * 3000),
    "too many bytes": safetensors({"delta": F32}, bytes(40)) + bytes(5000),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_fault_17_hostile_bytes_are_refused_without_allocating_what_they_claim(
    data: bytes, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    tracemalloc.start()
    with pytest.raises(ParametersError):
        decode_vector("delta", data, 10)
    with pytest.raises(ArtifactError):
        parse_manifest(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert list(tmp_path.iterdir()) == []


def test_fault_17_the_parser_of_parameters_does_not_grow_by_what_a_header_claims() -> None:
    """Native allocations too: in a process that may have 300 MB more than it has, and no more."""
    code = (
        "import resource, struct\n"
        "from pocketfed.model.parameters import ParametersError, decode_vector\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), used + (300 << 20)))\n"
        "for claimed in (1 << 30, 99_000_000, 2**64 - 1):\n"
        "    try:\n"
        "        decode_vector('delta', struct.pack('<Q', claimed) + b'{}' * 100, 10)\n"
        "    except ParametersError:\n"
        "        print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "refused\n" * 3, done.stderr


@pytest.mark.parametrize("name", ["../x", "a/../../x", "..", "x\0", "/etc/passwd"])
def test_fault_17_an_assignments_name_is_never_a_path(tmp_path: Path, name: str) -> None:
    store = Store(str(tmp_path / "fleet.db"))
    assignments = Assignments(store, tmp_path / "spool")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    for call in (
        lambda: assignments.check_header(1, Header(name, 10, "0" * 64, 0, 1, {}), 100),
        lambda: assignments.received(1, name),
        lambda: assignments.decline(1, name, "x"),
    ):
        with pytest.raises(UploadError, match="holds no assignment"):
            call()
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    store.close()


# ---- fuzzing ---------------------------------------------------------------------------------------------------------

# A longer run by hand: POCKETFED_FUZZ=100000 pytest tests/test_trust.py -k fuzz
EXAMPLES = int(os.environ.get("POCKETFED_FUZZ", "150"))
FUZZ = settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize="POCKETFED_FUZZ" not in os.environ)
VALID = encode_vector("delta", np.arange(10, dtype=np.float32))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=20,
)


def mutated(valid: bytes) -> st.SearchStrategy[bytes]:
    """Bytes near valid ones: a piece replaced by others."""
    at = st.integers(0, len(valid))
    return st.builds(lambda a, b, new: valid[: min(a, b)] + new + valid[max(a, b) :], at, at, st.binary(max_size=24))


@FUZZ
@given(st.binary(max_size=300) | mutated(VALID))
def test_fuzz_parameters_are_ten_values_or_an_error_of_ours(data: bytes) -> None:
    try:
        vector = decode_vector("delta", data, 10)
    except ParametersError:
        return
    assert (vector.dtype, vector.shape) == ("float32", (10,))


HEADERS = st.dictionaries(
    st.sampled_from(["delta", "theta", "__metadata__", "x"]),
    JSON
    | st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "I64", "BOOL", "F8_E4M3", "x"]),
            "shape": st.lists(st.integers(-2, 1 << 63) | st.sampled_from([0, 1, 10]), max_size=4),
            "data_offsets": st.lists(st.integers(-1, 1 << 63) | st.sampled_from([0, 40]), min_size=2, max_size=2),
        }
    ),
    max_size=3,
)


@FUZZ
@given(HEADERS, st.integers(0, 80))
def test_fuzz_headers_of_parameters_never_reach_past_their_bytes(header: Any, size: int) -> None:
    try:
        vector = decode_vector("delta", safetensors(header, bytes(size)), 10)
    except ParametersError:
        return
    assert vector.shape == (10,)


MANIFEST = manifest_bytes(
    {
        "schema": 1, "labels": ["a", "b"], "max_length": 8, "plans": {"tokenize": "t"},
        "trainable_sets": {"head": {"train": "t", "predict": "t", "initial": "t", "size": 3}},
        "files": {"t": {"sha256": "0" * 64, "bytes": 5, "chunks": ["0" * 64]}},
    }
)  # fmt: skip


@FUZZ
@given(st.binary(max_size=200) | mutated(MANIFEST) | JSON.map(lambda v: json.dumps({"schema": 1, "files": v}).encode()))
def test_fuzz_manifests_are_read_or_refused_with_an_error_of_ours(data: bytes) -> None:
    try:
        manifest = parse_manifest(data)
    except ArtifactError:
        return
    assert all("/" not in name and not name.startswith(".") for name in manifest.files)


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trust, Said, Said]:
    """A device's trust, the list it has, and the publisher's word on a version that it has not heard yet."""
    folder = tmp_path_factory.mktemp("signed")
    publisher = Publisher(folder)
    listed, said = publisher.list(), publisher.sign(V1)
    publisher.store.close()
    trust = Trust(folder / "trust.json")
    trust.learn_keys(listed)
    return trust, listed, said


@FUZZ
@given(data=st.data())
def test_fuzz_nothing_that_the_publisher_did_not_sign_changes_whom_a_device_trusts(
    data: st.DataObject, signed: tuple[Trust, Said, Said]
) -> None:
    trust, listed, said = signed
    before = trust._path.read_bytes()
    which = data.draw(st.sampled_from([listed, said]))
    statement = data.draw(
        mutated(which.statement)
        | st.binary(max_size=100)
        | JSON.map(
            lambda v: json.dumps({"type": "pocketfed keys 1", "keys": v, "publisher": v, "sequence": 2}).encode()
        )
    )
    signature = data.draw(st.just(which.signature) | st.binary(min_size=64, max_size=64) | st.binary(max_size=70))
    try:
        trust.learn_keys(Said(statement, signature))
        trust.learn_version(V2, "stable", Said(statement, signature))
    except UntrustedError:
        pass
    if statement != which.statement:
        assert trust._path.read_bytes() == before


@pytest.fixture(scope="module")
def wire(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    import grpc

    from pocketfed.coordinator.enrolment import enrol
    from pocketfed.coordinator.limits import Limits

    folder = tmp_path_factory.mktemp("wire")
    store = Store(str(folder / "fleet.db"))
    enrol(store, "phone", "stable", "", "A" * 43)
    with store.write() as session:  # something to upload to, until some example declines it
        put_artifact(session, {"trainable_sets": {"head": {"size": 10}}}, V1, [])
        run = {"channel": "stable", "config": {}, "artifact_version": V1, "trainable_set": "head", "seed": 1}
        session.add(Run(id=1, name="r", rounds_planned=1, **run))
        session.flush()
        theta = put_blob(session, VALID)
        session.add_all(
            Assignment(id=f"1-{n}-1-1-train", run_id=1, round=n, device_id=1, kind="train", config={}, parameters=theta)
            for n in range(1, 4)
        )
    limits = Limits(calls_per_s=1e6, calls_burst=1e6, doubtful_per_s=1e6, doubtful_burst=1e6)
    with (
        CoordinatorServer(store, ServerConfig("127.0.0.1:0", limits=limits)) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield channel
    store.close()


@FUZZ
@given(
    st.sampled_from([(s, m.name) for f, s in ((fleet_pb2, "Fleet"), (distribution_pb2, "Distribution"))
                     for m in f.DESCRIPTOR.services_by_name[s].methods]),
    st.lists(st.binary(max_size=120), max_size=3),
    st.booleans(),
)  # fmt: skip
def test_fuzz_no_bytes_on_the_wire_make_the_coordinator_fail(
    wire: Any, method: tuple[str, str], parts: list[bytes], known: bool
) -> None:
    """Whatever comes, the answer is a reply or a status that says whose fault it was: never INTERNAL or UNKNOWN."""
    import grpc

    call = wire.stream_stream(f"/pocketfed.v1.{method[0]}/{method[1]}")
    metadata = (("authorization", f"Bearer {'A' * 43 if known else 'B' * 43}"),)
    code = None
    try:
        list(call(iter(parts), metadata=metadata, timeout=20))
    except grpc.RpcError as error:
        code = error.code().name  # type: ignore[attr-defined]
    assert code not in ("INTERNAL", "UNKNOWN", "DEADLINE_EXCEEDED", "UNAVAILABLE")


TEXTS = st.text(max_size=30) | st.sampled_from(
    [
        "",
        "stable",
        "phone",
        "A" * 43,
        "0" * 64,
        "1-1-1-1-train",
        "1-2-1-1-train",
        "1-3-1-1-train",
        "x'; --",
        "\0",
        "../x",
    ]
)
WHOLE = st.integers(0, 10) | st.sampled_from([2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1])
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "string": TEXTS,
    "bytes": st.binary(max_size=60),
    "double": st.floats(),
    "uint32": WHOLE.filter(lambda n: n < 2**32),
    "uint64": WHOLE,
    "bool": st.booleans(),
    "enum": st.sampled_from([0, 1, 2, 3, 77, -1]),
}
KINDS = {9: "string", 12: "bytes", 1: "double", 13: "uint32", 4: "uint64", 8: "bool", 14: "enum"}


def messages(descriptor: Any) -> st.SearchStrategy[Any]:
    """Well-formed messages with whatever in them."""
    from google.protobuf.message_factory import GetMessageClass

    def field(f: Any) -> st.SearchStrategy[Any]:
        if f.message_type is not None and f.message_type.GetOptions().map_entry:
            return st.dictionaries(TEXTS, st.floats(), max_size=40)
        return messages(f.message_type) if f.message_type is not None else VALUES[KINDS[f.type]]

    fields = {f.name: field(f) for f in descriptor.fields}
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: GetMessageClass(descriptor)(**values))


CALLS = [(s, m) for f, s in ((fleet_pb2, "Fleet"), (distribution_pb2, "Distribution"))
         for m in f.DESCRIPTOR.services_by_name[s].methods]  # fmt: skip
WELL_FORMED = st.one_of(
    [
        st.tuples(
            st.just((s, m.name)),
            st.lists(messages(m.input_type).map(lambda v: v.SerializeToString()), min_size=1, max_size=3),
        )
        for s, m in CALLS
    ]
)


@FUZZ
@given(call=WELL_FORMED)
def test_fuzz_no_values_in_messages_make_the_coordinator_fail(
    wire: Any, call: tuple[tuple[str, str], list[bytes]]
) -> None:
    import grpc

    (service, method), parts = call
    code = None
    try:
        replies = wire.stream_stream(f"/pocketfed.v1.{service}/{method}")
        metadata = (("authorization", f"Bearer {'A' * 43}"),)
        # A check-in may ask to wait for as long as it likes: it is ended from here.
        list(replies(iter(parts), metadata=metadata, timeout=0.2 if method == "CheckIn" else 20))
    except grpc.RpcError as error:
        code = error.code().name  # type: ignore[attr-defined]
    assert code not in ("INTERNAL", "UNKNOWN", "UNAVAILABLE")
    assert code != "DEADLINE_EXCEEDED" or method == "CheckIn"


def test_every_error_of_the_sdk_can_be_caught_as_one() -> None:
    assert issubclass(UntrustedError, ArtifactError)
    assert issubclass(UntrustedError, PocketfedError)
