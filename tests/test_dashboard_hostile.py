"""What a database may hold or do while somebody looks: every page says what it can, and none of them breaks."""

from __future__ import annotations

import re
import shutil
import sqlite3
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import fleet_database
import pytest
import sqlalchemy as sa
from streamlit.testing.v1 import AppTest

from pocketfed.coordinator.store import Assignment, Device, Metric, Presence, Round, Run, Store, Update, Vitals, now
from pocketfed.dashboard import launch

if TYPE_CHECKING:
    from conftest import Cluster

ROOT = Path(__file__).resolve().parents[1]
VIEWS = ("now", "learning", "round", "fleet", "models", "security", "compare", "system")


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seeded") / "fleet.db"
    fleet_database.fill(str(path), devices=12, rounds=2, planned=4)
    return path


@pytest.fixture
def filled(tmp_path: Path, seeded: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "fleet.db"
    shutil.copyfile(seeded, path)
    monkeypatch.setenv(launch.DATABASE_VARIABLE, str(path))
    monkeypatch.setenv(launch.OPEN_VARIABLE, "1")
    return path


def drawn(view: str, **query: str) -> AppTest:
    app = AppTest.from_file(str(ROOT / "dashboard" / "views" / f"{view}.py"), default_timeout=60)
    app.query_params.update(query)
    app.run()
    assert not app.exception, app.exception
    return app


def html_of(app: AppTest) -> str:
    return "\n".join(element.proto.body for element in app.get("html"))


def change(path: Path, work: Callable[[sa.orm.Session], object]) -> None:
    store = Store(str(path))
    with store.write() as session:
        work(session)
    store.close()


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory, seeded: Path) -> Path:
    path = tmp_path_factory.mktemp("huge") / "fleet.db"
    shutil.copyfile(seeded, path)
    text = "\u05d0<script>" * 1_200_000

    def write(session: sa.orm.Session) -> None:
        session.execute(sa.update(Device).where(Device.id == 1).values(name=text, tier=text))
        mine = (
            sa.select(Assignment.id).where(Assignment.device_id == 1, Assignment.run_id == 2).limit(1).scalar_subquery()
        )
        session.execute(sa.update(Assignment).where(Assignment.id == mine).values(error=text, status="failed"))
        session.execute(sa.update(Run).where(Run.id == 2).values(name=text))

    change(path, write)
    return path


@pytest.mark.parametrize("view", VIEWS)
def test_a_text_of_ten_megabytes_is_shown_by_its_beginning(
    huge: Path, view: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(launch.DATABASE_VARIABLE, str(huge))
    monkeypatch.setenv(launch.OPEN_VARIABLE, "1")
    app = drawn(view, device="1")
    charts = "".join(chart.proto.spec for chart in app.get("vega_lite_chart"))
    tables = "".join(frame.value.to_csv() for frame in app.dataframe)
    assert len(html_of(app)) + len(tables) + len(charts) < 300_000
    assert "<script>" not in html_of(app)


@pytest.mark.parametrize("view", VIEWS)
def test_numbers_that_are_none_leave_every_page_standing(filled: Path, view: str) -> None:
    """SQLite keeps infinities, and not-a-number as nothing; JSON may hold either, whatever wrote it."""

    def write(session: sa.orm.Session) -> None:
        infinite = float("inf")
        session.execute(
            sa.update(Round).where(Round.number == 1).values(accuracy=infinite, loss=-infinite, train_loss=infinite)
        )
        session.execute(sa.update(Update).values(norm=infinite, cosine=infinite))
        session.add(Metric(run_id=2, round=2, name="x", value=infinite))
        session.execute(sa.update(Vitals).values(p99_ms=infinite))

    change(filled, write)
    with sqlite3.connect(filled) as connection:
        connection.execute('UPDATE updates SET metrics = \'{"accuracy": NaN, "loss": Infinity}\'')
    connection.close()
    app = drawn(view, round="1")
    assert "does not answer" not in html_of(app)
    for chart in app.get("vega_lite_chart"):
        assert "Infinity" not in chart.proto.spec
        assert "NaN" not in chart.proto.spec


@pytest.mark.parametrize("view", VIEWS)
def test_times_of_a_clock_that_runs_ahead_are_shown_and_nothing_is_negative(filled: Path, view: str) -> None:
    ahead = now() + timedelta(days=400)

    def write(session: sa.orm.Session) -> None:
        session.execute(sa.update(Device).values(last_seen_at=ahead, enrolled_at=ahead, present_until=ahead))
        session.execute(
            sa.update(Round).values(started_at=ahead, finished_at=ahead - timedelta(hours=1), seconds=-3600.0)
        )
        session.execute(
            sa.update(Assignment).values(offered_at=ahead, accepted_at=ahead - timedelta(hours=1), finished_at=ahead)
        )
        session.add(Presence(hour=ahead, devices=3))

    change(filled, write)
    for query in ({}, {"round": "1", "device": "1"}):
        app = drawn(view, **query)
        assert not re.findall(r">[^<]*[^<\w]-\d[^<]*<", html_of(app))


@pytest.mark.parametrize("view", VIEWS)
def test_a_run_without_devices_or_rounds_is_no_crash(filled: Path, view: str) -> None:
    with sqlite3.connect(filled) as connection:
        for table in (
            "release_reports",
            "updates",
            "assignments",
            "devices",
            "metrics",
            "rounds",
            "vitals",
            "presence",
        ):
            connection.execute(f"DELETE FROM {table}")
    connection.close()
    app = drawn(view)
    assert "does not answer" not in html_of(app)


@pytest.mark.parametrize("view", VIEWS)
def test_a_database_that_is_deleted_while_it_is_open_is_missed_and_its_successor_is_read(
    filled: Path, view: str, seeded: Path
) -> None:
    app = drawn(view)
    for name in ("fleet.db", "fleet.db-wal", "fleet.db-shm"):
        filled.with_name(name).unlink(missing_ok=True)
    app.run()
    assert not app.exception
    assert "There is no database" in html_of(app)
    shutil.copyfile(seeded, filled)
    app.run()
    assert not app.exception
    assert "There is no database" not in html_of(app)


def test_postgresql_that_is_stopped_is_named_and_once_it_is_back_pages_go_on(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet_database.fill(cluster.url, devices=12, rounds=2, planned=4)
    monkeypatch.setenv(launch.DATABASE_VARIABLE, cluster.url)
    monkeypatch.setenv(launch.OPEN_VARIABLE, "1")
    apps = {view: drawn(view) for view in VIEWS}
    cluster.stop()
    for app in apps.values():
        app.run()
        assert not app.exception, app.exception
        assert "The database does not answer" in html_of(app)
        assert "pocketfed@" not in html_of(app)
    cluster.start()
    for app in apps.values():
        app.run()
        assert not app.exception, app.exception
        assert "does not answer" not in html_of(app)
