"""Schemas of old: every released one is brought up with its data, whole or not at all."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext

from pocketfed.coordinator.assignments import Assignments
from pocketfed.coordinator.integrity import find_problems
from pocketfed.coordinator.progress import find_place, unfinished_runs
from pocketfed.coordinator.store import (
    MIGRATIONS,
    Assignment,
    Base,
    Baseline,
    Chunk,
    Device,
    Release,
    ReleaseEvent,
    Round,
    Run,
    Signature,
    Store,
    StoreError,
    Update,
    put_blob,
)
from pocketfed.model.parameters import encode_vector

AT = "2025-11-30 12:00:00.000000"
RELEASED = ("0001",)  # every revision that a release has had


def database_of(database: str, revision: str) -> sa.Engine:
    """A database as that release left it, with a run that its coordinator was killed in."""
    engine = sa.create_engine(database if "://" in database else f"sqlite:///{database}")
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    theta = encode_vector("theta", np.arange(3, dtype=np.float32))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    with engine.begin() as connection:
        from sqlalchemy.orm import Session

        digest = put_blob(Session(connection), theta)

        def insert(table: str, **values: Any) -> None:
            names = ", ".join(values)
            connection.execute(
                sa.text(f"INSERT INTO {table} ({names}) VALUES ({', '.join(':' + n for n in values)})"), values
            )

        manifest = '{"trainable_sets": {"head": {"initial": "theta", "size": 3}}, "files": {"theta": {"sha256": "%s"}}}'
        insert("artifacts", version="v1", manifest=manifest % digest, bytes=1, created_at=AT)
        for number, name in ((1, "phone"), (2, "tablet")):
            insert(
                "devices",
                id=number,
                name=name,
                channel="stable",
                token_hash="",
                sdk_version="",
                examples=5,
                enrolled_at=AT,
            )
        insert(
            "runs", id=7, name="r", channel="stable", status="running", config="{}", artifact_version="v1",
            trainable_set="head", seed=1, rounds_planned=3, created_at=AT,
        )  # fmt: skip
        for number, status, parameters in ((0, "finished", digest), (1, "finished", digest), (2, "running", None)):
            insert(
                "rounds", run_id=7, number=number, status=status, parameters=parameters, devices=0, failed=0, bytes_up=0,
                bytes_down=0, seconds=1.0, started_at=AT,
            )  # fmt: skip
        for number, device, status in ((1, 1, "aggregated"), (1, 2, "failed"), (2, 1, "uploaded"), (2, 2, "accepted")):
            insert(
                "assignments", id=f"7-{number}-1-{device}-train", run_id=7, round=number, attempt=1, device_id=device,
                kind="train", status=status, config="{}", parameters=digest, progress=0.0, offered_at=AT, bytes_down=0,
            )  # fmt: skip
    return engine


def tables(engine: sa.Engine) -> dict[str, list[str]]:
    found = sa.inspect(engine)
    return {name: sorted(c["name"] for c in found.get_columns(name)) for name in sorted(found.get_table_names())}


@pytest.mark.parametrize("revision", RELEASED)
def test_every_released_schema_is_upgraded_with_what_it_holds_and_its_run_goes_on(
    database: str, revision: str, tmp_path: Path
) -> None:
    database_of(database, revision).dispose()
    store = Store(database)
    with store.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []
    with store.read() as session:
        assert session.scalars(sa.select(Device.name).order_by(Device.id)).all() == ["phone", "tablet"]
        assert session.scalars(sa.select(Round.attempt)).all() == [1, 1, 1]
        booked = session.execute(sa.select(Assignment.id, Assignment.counted_in).order_by(Assignment.id)).all()
        assert [tuple(row) for row in booked] == [
            ("7-1-1-1-train", 1),
            ("7-1-1-2-train", 1),
            ("7-2-1-1-train", None),
            ("7-2-1-2-train", None),
        ]
    assert unfinished_runs(store) == [7]
    place = find_place(store, 7)
    assert (place.number, place.attempt, place.cohort) == (2, 1, {1: "phone", 2: "tablet"})
    assert place.theta.tolist() == [0, 1, 2]
    assert list(find_problems(store, Assignments(store, tmp_path / "spool"))) == []
    store.close()


def test_fault_25_a_migration_that_fails_half_way_leaves_the_old_schema_and_can_be_repeated(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alembic import op

    engine = database_of(database, "0001")
    before = tables(engine)
    create_table = op.create_table

    def fail(name: str, *columns: Any, **options: Any) -> Any:
        if name == "leases":
            raise RuntimeError("the power went out")
        return create_table(name, *columns, **options)

    monkeypatch.setattr(op, "create_table", fail)
    with pytest.raises(RuntimeError, match="the power went out"):
        Store(database)
    assert tables(engine) == before
    monkeypatch.undo()
    Store(database).close()
    assert {"history", "leases", "checkpoints"} <= set(tables(engine))
    engine.dispose()


def test_fault_25_a_newer_schema_is_refused_with_what_to_do(database: str) -> None:
    store = Store(database)
    with store.engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    store.close()
    for create in (True, False):
        with pytest.raises(
            StoreError, match=r"has schema revision 9999, newer than .*; upgrade pocketfed or use another"
        ):
            Store(database, create=create)


def test_releases_of_before_are_live_or_superseded_and_going_back_a_schema_gives_nobody_more(database: str) -> None:
    engine = database_of(database, "0003")
    with engine.begin() as connection:
        digest = connection.execute(sa.text("SELECT digest FROM blobs")).scalar_one()
        for number, channel in ((1, "stable"), (2, "beta"), (3, "stable")):
            connection.execute(
                sa.text(
                    "INSERT INTO releases (id, channel, artifact_version, trainable_set, parameters, created_at) "
                    "VALUES (:id, :channel, 'v1', 'head', :digest, :at)"
                ),
                {"id": number, "channel": channel, "digest": digest, "at": AT},
            )
    store = Store(database)
    with store.write() as session:
        rows = session.scalars(sa.select(Release).order_by(Release.id)).all()
        assert [(r.state, r.percent, r.min_devices) for r in rows] == [
            ("superseded", 100.0, 0), ("live", 100.0, 0), ("live", 100.0, 0),
        ]  # fmt: skip
        session.add(
            Release(
                id=4, channel="stable", artifact_version="v1", trainable_set="head", parameters=digest, state="staged"
            )
        )
        for sequence, withheld_for in ((5, None), (6, 4)):
            session.add(
                Signature(
                    channel="stable", sequence=sequence, artifact_version="v1", key="k", statement=b"", signature=b"",
                    withheld_for=withheld_for,
                )
            )  # fmt: skip
        session.flush()
        session.add(ReleaseEvent(release_id=4, state="staged", percent=10, who="ann"))
    store.close()
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0003")
    with engine.connect() as connection:  # an older coordinator offers the newest to all, and tells all words
        assert connection.execute(sa.text("SELECT id FROM releases ORDER BY id")).scalars().all() == [1, 2, 3]
        assert connection.execute(sa.text("SELECT sequence FROM signatures")).scalars().all() == [5]
    engine.dispose()
    store = Store(database)
    with store.read() as session:
        assert session.scalars(sa.select(Release.state).order_by(Release.id)).all() == ["superseded", "live", "live"]
    store.close()


def test_what_was_known_before_stays_when_the_schema_goes_on_to_baselines_and_back(database: str) -> None:
    engine = database_of(database, "0006")
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO updates (assignment_id, num_examples, bytes, digest, metrics, norm, received_at) "
                "VALUES ('7-1-1-1-train', 5, 9, 'd', '{}', 2.5, :at)"
            ),
            {"at": AT},
        )
    before = tables(engine)
    store = Store(database)
    with store.write() as session:
        assert session.execute(sa.select(Update.norm, Update.cosine)).one() == (2.5, None)
        assert session.scalars(sa.select(Device.tier)).all() == [None, None]
        session.add(Baseline(run_id=7, kind="central", metric="accuracy", value=0.5))
        session.execute(sa.update(Update).values(cosine=-0.5))
    store.close()
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0006")
    assert tables(engine) == before
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT norm FROM updates")).scalar_one() == 2.5
    engine.dispose()
    store = Store(database)
    with store.read() as session:
        assert session.scalars(sa.select(Update.cosine)).all() == [None]
        assert session.scalars(sa.select(Baseline)).all() == []
    store.close()


def pocketfed(point: str, *words: str, folder: Path) -> tuple[int, str]:
    script = Path(__file__).with_name("crashing.py")
    done = subprocess.run(
        [sys.executable, str(script), point, *words],
        cwd=folder, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=90,
    )  # fmt: skip
    return done.returncode, done.stdout.decode().strip()


@pytest.mark.slow
def test_fault_01_a_coordinator_killed_during_a_migration_leaves_the_old_schema_and_db_upgrade_finishes_it(
    database: str, tmp_path: Path
) -> None:
    engine = database_of(database, "0001")
    before = tables(engine)
    assert (
        pocketfed("during a migration", "db", "upgrade", "--database", database, folder=tmp_path)[0] == -signal.SIGKILL
    )
    assert tables(engine) == before
    code, said = pocketfed("never", "db", "upgrade", "--database", database, folder=tmp_path)
    assert (code, said.endswith("has the newest schema")) == (0, True), said
    assert set(tables(engine)) > set(before)
    engine.dispose()


@pytest.mark.slow
def test_db_check_finds_what_is_damaged_or_missing_and_db_upgrade_makes_no_database(
    database: str, tmp_path: Path
) -> None:
    database_of(database, "0001").dispose()
    where = ("--database", database, "--spool", str(tmp_path / "spool"))
    code, said = pocketfed("never", "db", "check", *where, folder=tmp_path)
    assert code == 1
    assert re.search(r"has schema revision 0001, not \d+; run `pocketfed db upgrade` on it", said), said
    store = Store(database)
    code, said = pocketfed("never", "db", "check", *where, folder=tmp_path)
    assert (code, said.endswith("is sound")) == (0, True), said
    with store.write() as session:
        session.scalars(sa.select(Chunk)).one().data = b"other bytes"
        session.get_one(Run, 7).status = "waiting"
    store.close()
    code, said = pocketfed("never", "db", "check", *where, folder=tmp_path)
    assert code == 1
    assert "holds other bytes than its name says; restore a backup" in said
    assert "has 1 problem" in said
    code, said = pocketfed("never", "db", "upgrade", "--database", "nowhere.db", folder=tmp_path)
    assert (code, "there is no database" in said) == (1, True)
    assert not (tmp_path / "nowhere.db").exists()
