"""The store: its schema is what the models say, blobs come back bit for bit, a broken file is told in a sentence."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from pocketfed.coordinator.artifacts import manifest_bytes
from pocketfed.coordinator.store import (
    CHUNK_BYTES,
    Artifact,
    Base,
    Blob,
    Chunk,
    Device,
    Metric,
    Release,
    Run,
    Store,
    StoreError,
    device_named,
    get_blob,
    iterate_blob,
    latest_release,
    put_artifact,
    put_blob,
    split_chunks,
)


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    opened = Store(database)
    yield opened
    opened.close()


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count)


def add_run(store: Store, seed: int = 1) -> int:
    with store.write() as session:
        put_artifact(session, {}, "v1", [])
        run = Run(
            name="r",
            channel="stable",
            config={},
            artifact_version="v1",
            trainable_set="head",
            seed=seed,
            rounds_planned=1,
        )
        session.add(run)
        session.flush()
        return run.id


# ---- schema ----------------------------------------------------------------------------------------------------------


def differences(store: Store) -> list[object]:
    with store.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        return list(compare_metadata(context, Base.metadata))


def test_the_migrations_make_exactly_the_tables_of_the_models(store: Store) -> None:
    assert differences(store) == []
    assert set(sa.inspect(store.engine).get_table_names()) == {*Base.metadata.tables, "alembic_version"}


def test_an_empty_file_becomes_a_database(tmp_path: Path) -> None:
    path = tmp_path / "empty.db"
    path.touch()
    store = Store(str(path))
    assert differences(store) == []
    store.close()


def test_opening_again_keeps_what_is_there_and_runs_in_wal_mode_with_foreign_keys(tmp_path: Path) -> None:
    first = Store(str(tmp_path / "a.db"))
    with first.write() as session:
        device_named(session, "phone")
    first.close()
    second = Store(f"sqlite:///{tmp_path / 'a.db'}")
    with second.read() as session:
        assert session.scalars(sa.select(Device.name)).all() == ["phone"]
        assert session.scalar(sa.text("PRAGMA journal_mode")) == "wal"
        assert session.scalar(sa.text("PRAGMA foreign_keys")) == 1
    second.close()


def set_revision(store: Store, revision: str) -> None:
    with store.engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = :r"), {"r": revision})
    store.close()


def test_a_newer_schema_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = str(tmp_path / "newer.db")
    set_revision(Store(path), "9999")
    with pytest.raises(
        StoreError,
        match=r"newer\.db has schema revision 9999, newer than .*; upgrade pocketfed or use another database",
    ):
        Store(path)


def test_a_reader_does_not_upgrade_and_does_not_create(tmp_path: Path) -> None:
    (tmp_path / "old.db").touch()
    with pytest.raises(StoreError, match=r"schema revision None, not \d+; run `pocketfed db upgrade` on it"):
        Store(str(tmp_path / "old.db"), create=False)
    assert (tmp_path / "old.db").stat().st_size in (0, 4096)  # at most the header that switching to WAL writes
    with pytest.raises(StoreError, match=r"there is no database .*missing\.db; start"):
        Store(str(tmp_path / "missing.db"), create=False)
    assert not (tmp_path / "missing.db").exists()


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"dear diary, " * 1000)
    with pytest.raises(StoreError, match=r"notes\.txt: file is not a database; check"):
        Store(str(path))
    assert path.read_bytes() == b"dear diary, " * 1000


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing/fleet.db", r"the folder .*missing of database .* does not exist; create it first"),
        ("", r"is a folder; name a file in it"),
    ],
)
def test_a_database_without_a_place_to_lie_is_refused(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(StoreError, match=says):
        Store(str(tmp_path / name))


@pytest.mark.parametrize("url", ["nosuch://host/db", "://", "sqlite+nosuch:///x.db"])
def test_a_bad_url_is_refused_by_name(url: str) -> None:
    with pytest.raises(StoreError, match=r"is not a database URL: .*; use a file name"):
        Store(url)


def test_a_password_is_never_part_of_a_message() -> None:
    pytest.importorskip("psycopg", reason="no PostgreSQL driver (psycopg) is installed")
    with socket.socket() as taken:  # bound, not listening: connecting is refused
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(StoreError) as caught:
            Store(f"postgresql+psycopg://user:secret@127.0.0.1:{taken.getsockname()[1]}/db")
    assert "secret" not in str(caught.value)


# ---- blobs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES + 7])
def test_a_blob_comes_back_bit_for_bit(store: Store, size: int) -> None:
    data = noise(size)
    with store.write() as session:
        digest = put_blob(session, data)
    with store.read() as session:
        assert digest == hashlib.sha256(data).hexdigest()
        assert get_blob(session, digest) == data
        assert len(session.get_one(Blob, digest).chunks) == -(-size // CHUNK_BYTES)


def test_equal_chunks_are_kept_once_within_and_between_blobs(store: Store) -> None:
    shared, other = noise(CHUNK_BYTES), noise(CHUNK_BYTES, 1)
    with store.write() as session:
        twice = put_blob(session, shared + shared)
        mixed = put_blob(session, other + shared + b"tail")
        assert put_blob(session, shared + shared) == twice
    with store.read() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Chunk)) == 3  # shared, other, tail
        assert session.scalar(sa.select(sa.func.count()).select_from(Blob)) == 2
        assert get_blob(session, twice) == shared + shared
        assert b"".join(iterate_blob(session, mixed, first_chunk=1)) == shared + b"tail"


def test_split_chunks_are_the_pieces_in_order() -> None:
    data = noise(CHUNK_BYTES + 3)
    assert [(d, bytes(p)) for d, p in split_chunks(data)] == [
        (hashlib.sha256(p).hexdigest(), p) for p in (data[:CHUNK_BYTES], data[CHUNK_BYTES:])
    ]


def test_bytes_that_are_not_held_are_named(store: Store) -> None:
    with store.read() as session, pytest.raises(StoreError, match="no bytes with sha256 abc; was it restored"):
        get_blob(session, "abc")


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_times_come_back_as_the_same_moment_in_utc(store: Store) -> None:
    moment = datetime(2025, 1, 2, 3, 4, 5, 678901, tzinfo=timezone(timedelta(hours=5, minutes=45)))
    with store.write() as session:
        device_named(session, "phone", enrolled_at=moment)
    with store.read() as session:
        found = session.scalars(sa.select(Device)).one()
        assert found.enrolled_at == moment
        assert found.enrolled_at.tzinfo is UTC
        assert found.last_seen_at is None


def write_and_fail(store: Store) -> None:
    with store.write() as session:
        put_artifact(session, {"labels": ["a"]}, "v1", [noise(10), noise(20, 1)])
        device_named(session, "tablet")
        session.add(Metric(run_id=77, round=1, name="x", value=1.0))  # there is no run 77
        session.flush()


def test_a_failed_write_leaves_nothing(store: Store) -> None:
    with pytest.raises(sa.exc.IntegrityError):
        write_and_fail(store)
    with store.read() as session:
        for table in (Artifact, Blob, Chunk, Device, Metric):
            assert session.scalar(sa.select(sa.func.count()).select_from(table)) == 0


def test_an_artifact_is_stored_once_with_the_sum_of_its_bytes(store: Store) -> None:
    manifest = {"labels": ["ä", "b"]}
    version = hashlib.sha256(manifest_bytes(manifest)).hexdigest()
    with store.write() as session:
        assert put_artifact(session, manifest, version, [noise(10), noise(20, 1)])
        assert not put_artifact(session, manifest, version, [])
    with store.read() as session:
        row = session.get_one(Artifact, version)
        assert row.bytes == 30
        assert manifest_bytes(row.manifest) == manifest_bytes(manifest)


def test_the_newest_release_of_a_channel_counts(store: Store) -> None:
    run_id = add_run(store)
    with store.write() as session:
        digest = put_blob(session, b"theta")
        for channel in ("stable", "beta", "stable"):
            session.add(
                Release(channel=channel, artifact_version="v1", trainable_set="head", parameters=digest, run_id=run_id)
            )
            session.flush()
    with store.read() as session:
        newest = {channel: latest_release(session, channel) for channel in ("stable", "beta", "none")}
        assert {channel: release and release.id for channel, release in newest.items()} == {
            "stable": 3,
            "beta": 2,
            "none": None,
        }


def test_a_device_is_made_once(store: Store) -> None:
    with store.write() as session:
        first = device_named(session, "phone", channel="beta")
        assert device_named(session, "phone", channel="stable").id == first.id
        assert first.channel == "beta"


# ---- another database ------------------------------------------------------------------------------------------------


def test_the_largest_seed_is_kept(store: Store) -> None:
    run_id = add_run(store, seed=2**63 - 1)
    with store.read() as session:
        assert session.get_one(Run, run_id).seed == 2**63 - 1


@pytest.mark.slow
def test_postgresql_keeps_quotas_signatures_and_an_audit_that_only_grows(postgres: str, tmp_path: Path) -> None:
    from pocketfed.coordinator import signing
    from pocketfed.coordinator.enrolment import EnrolmentError, create_key, enrol
    from pocketfed.coordinator.operators import acting, audit_lines, local_admin

    store = Store(postgres)
    try:
        with acting(store, local_admin(), "publish", "signed") as session:
            put_artifact(session, {}, "signed", [])
            signing.sign_version(session, signing.ensure_keys(session, tmp_path / "keys"), "stable", "signed")
            _, key = create_key(session, quota=1)
        for _ in range(2):
            enrol(store, "first", "stable", "", "A" * 43, key)
        with pytest.raises(EnrolmentError, match="has let in its 1 devices"):
            enrol(store, "second", "stable", "", "B" * 43, key)
        for sql in ("UPDATE audit SET who = 'x'", "DELETE FROM audit", "TRUNCATE audit"):
            with pytest.raises(sa.exc.DatabaseError, match="the audit only grows"), store.write() as session:
                session.execute(sa.text(sql))
        with store.read() as session:
            assert [a.act for a in audit_lines(session)] == ["publish", "key.create"]
    finally:
        store.close()


def test_a_missing_driver_is_told_in_a_sentence() -> None:
    with pytest.raises(StoreError, match="needs a driver that is not installed"):
        Store("mysql://localhost/x")  # MySQLdb is no dependency of ours


def test_what_a_write_has_read_still_holds_when_it_writes(store: Store) -> None:
    with store.write() as session:
        device_named(session, "phone", examples=0)

    def count() -> None:
        for _ in range(20):
            with store.write() as session:
                session.scalars(sa.select(Device).with_for_update()).one().examples += 1  # PostgreSQL's locks are rows

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with store.read() as session:
        assert device_named(session, "phone").examples == 80


# ---- migrations of a database in use -----------------------------------------------------------------------------------


def test_a_database_in_use_takes_on_who_may_come_in_and_loses_nothing(tmp_path: Path) -> None:
    """Devices with assignments: what refers to a table forbids making that table anew."""
    from alembic import command
    from alembic.config import Config

    from pocketfed.coordinator.store import MIGRATIONS

    path = tmp_path / "old.db"
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        connection.exec_driver_sql("PRAGMA foreign_keys=ON")
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        for row in (
            "artifacts VALUES ('v', '{}', 0, '2026-01-01')",
            "blobs VALUES ('b', 0, '[]')",
            "devices (id, name, channel, token_hash, sdk_version, examples, enrolled_at) "
            "VALUES (1, 'phone', 'stable', 'h', '', 3, '2026-01-01')",
            "runs (id, name, channel, status, config, artifact_version, trainable_set, seed, rounds_planned, created_at) "
            "VALUES (1, 'r', 'stable', 'running', '{}', 'v', 'head', 1, 1, '2026-01-01')",
            "assignments (id, run_id, round, attempt, device_id, kind, status, config, parameters, progress, offered_at, bytes_down) "
            "VALUES ('a', 1, 1, 1, 1, 'train', 'offered', '{}', 'b', 0, '2026-01-01', 0)",
        ):
            connection.exec_driver_sql(f"INSERT INTO {row}")
    engine.dispose()
    store = Store(str(path))
    assert differences(store) == []
    with store.read() as session:
        device = session.scalars(sa.select(Device)).one()
        assert (device.name, device.examples, device.cohort, device.revoked_at) == ("phone", 3, None, None)
        assert session.scalar(sa.text("SELECT device_id FROM assignments")) == 1
    store.close()
