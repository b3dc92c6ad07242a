"""Every page in every state it was designed for, run by Streamlit itself without a browser."""

from __future__ import annotations

import importlib.util
import sqlite3
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import sqlalchemy as sa
from streamlit.testing.v1 import AppTest

from pocketfed.coordinator.store import Assignment, Device, Round, Run, Store, Update
from pocketfed.dashboard import launch

ROOT = Path(__file__).resolve().parents[1]
VIEWS = ("now", "learning", "round", "fleet", "models")
HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    ":red[x] $\\frac{1}{2}$",
    "\u202egnp.exe",
    "z" * 10_000,
    "",
    "=1+1",
)


def load(path: str) -> ModuleType:
    """A script of the repository that is in no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "fleet.db"
    monkeypatch.setenv(launch.DATABASE_VARIABLE, str(path))
    return path


@pytest.fixture
def filled(database: Path) -> Path:
    load("benchmarks/fleet_database.py").fill(str(database), devices=60, rounds=3, planned=5)
    return database


def drawn(view: str, prepare: Callable[[AppTest], None] = lambda app: None) -> AppTest:
    app = AppTest.from_file(str(ROOT / "dashboard" / "views" / f"{view}.py"), default_timeout=30)
    prepare(app)
    app.run()
    assert not app.exception, app.exception
    return app


def html_of(app: AppTest) -> str:
    return "\n".join(element.proto.body for element in app.get("html"))


def tables(app: AppTest) -> str:
    return "\n".join(frame.value.to_csv() for frame in app.dataframe)


def test_now_says_in_words_what_is_happening(filled: Path) -> None:
    text = html_of(drawn("now"))
    assert "Running: round 3 of 5" in text
    assert "assistant intents" in text
    assert "Devices online" in text
    assert "of 60 enrolled" in text


def test_now_follows_the_address_to_another_run(filled: Path) -> None:
    app = drawn("now", lambda app: app.query_params.update(run="1"))
    assert "Finished: all 3 rounds are done" in html_of(app)
    assert app.sidebar.selectbox[0].value == 1


@pytest.mark.parametrize("wrong", ["99", "-1", "x", "1e9", "٣", "9" * 40])
def test_an_address_with_a_wrong_run_is_answered_with_a_sentence(filled: Path, wrong: str) -> None:
    text = html_of(drawn("now", lambda app: app.query_params.update(run=wrong)))
    assert "There is no run 99" in text if wrong == "99" else "Running: round 3 of 5" in text


def test_choosing_a_run_puts_it_into_the_address(filled: Path) -> None:
    app = drawn("learning")
    assert "run" not in app.query_params
    app.sidebar.selectbox[0].select(1).run()
    assert not app.exception
    assert app.query_params["run"] in ("1", ["1"])
    assert app.multiselect[0].value == [1]


def test_learning_shows_every_round_and_its_curves(filled: Path) -> None:
    app = drawn("learning")
    rows = app.dataframe[0].value
    assert list(rows["Round"]) == [3, 2, 1, 0]
    assert len(app.get("vega_lite_chart")) == 2
    app.multiselect[0].set_value([2, 1]).run()
    assert not app.exception
    assert len(app.dataframe[0].value) == 8  # four rounds of each run


def test_round_shows_the_funnel_and_pages_its_devices(filled: Path) -> None:
    app = drawn("round", lambda app: app.query_params.update(round="2"))
    assert "Round 2: finished" in html_of(app)
    assert len(app.dataframe[0].value) == 50
    app.number_input[0].set_value(2).run()
    assert not app.exception
    assert len(app.dataframe[0].value) == 10  # the rest of 60


def test_round_zero_says_why_no_device_took_part(filled: Path) -> None:
    app = drawn("round", lambda app: app.query_params.update(round="0"))
    assert "round 0 is the coordinator's own evaluation" in app.info[0].value


def test_fleet_finds_a_device_by_part_of_its_name(filled: Path) -> None:
    app = drawn("fleet")
    assert len(app.dataframe[0].value) == 50
    app.text_input[0].set_value("-00007").run()
    assert list(app.dataframe[0].value["Device"]) == ["phone-00007"]
    app.text_input[0].set_value("nobody").run()
    assert "No device matches" in app.info[0].value


def test_models_shows_sizes_and_where_each_came_from(filled: Path) -> None:
    app = drawn("models")
    models, releases = (frame.value for frame in app.dataframe)
    assert list(models["fp32"]) == [4 * 622_208 / 1e6, 4 * 184_320 / 1e6]
    assert models["Made from"][0] == models["Version"][1]
    assert list(releases["Current"]) == [True, False]
    assert len(app.get("vega_lite_chart")) == 1


@pytest.mark.parametrize("view", VIEWS)
def test_fault_35_a_missing_database_is_named_and_not_made(database: Path, view: str) -> None:
    text = html_of(drawn(view))
    assert "There is no database" in text
    assert database.name in text
    assert not database.exists()


@pytest.mark.parametrize("view", VIEWS)
def test_fault_35_an_empty_database_says_what_to_do(database: Path, view: str) -> None:
    Store(str(database)).close()
    text = html_of(drawn(view))
    assert any(f"No {noun} yet" in text for noun in ("run", "device", "model"))
    assert "looks again every" in text


@pytest.mark.parametrize("view", VIEWS)
def test_a_database_of_a_newer_schema_asks_for_an_upgrade(database: Path, view: str) -> None:
    Store(str(database)).close()
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    assert "upgrade pocketfed" in html_of(drawn(view))


@pytest.mark.parametrize("view", VIEWS)
def test_fault_35_a_file_that_is_no_database_is_called_so(database: Path, view: str) -> None:
    database.write_bytes(b"not a database " * 99)
    assert "file is not a database" in html_of(drawn(view))


@pytest.mark.parametrize("view", VIEWS)
def test_fault_35_tables_that_vanish_are_answered_with_a_sentence(filled: Path, view: str) -> None:
    drawn(view)  # the store is open now, and stays so
    with sqlite3.connect(filled) as connection:
        for name in ("runs", "artifacts", "devices"):
            connection.execute(f"DROP TABLE {name}")
    connection.close()
    assert "The database does not answer" in html_of(drawn(view))


def test_no_database_named_is_answered_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(launch.DATABASE_VARIABLE, raising=False)
    assert "pocketfed dashboard --database" in html_of(drawn("now"))


@pytest.mark.parametrize("view", VIEWS)
def test_a_database_made_anew_in_the_same_place_is_read_anew(database: Path, view: str) -> None:
    app = drawn(view)
    assert "There is no database" in html_of(app)
    load("benchmarks/fleet_database.py").fill(str(database), devices=5, rounds=1, planned=2)
    app.run()
    assert not app.exception
    assert "There is no database" not in html_of(app)
    assert "phone-00000" in tables(app) or view in ("now", "learning", "models")


@pytest.mark.parametrize("view", VIEWS)
def test_fault_35_a_page_is_drawn_while_another_process_writes(filled: Path, view: str) -> None:
    writer = sqlite3.connect(filled)
    try:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("UPDATE runs SET name = 'half written'")
        app = drawn(view)
    finally:
        writer.rollback()
        writer.close()
    assert "half written" not in html_of(app) + tables(app)


@pytest.mark.parametrize("view", VIEWS)
def test_fault_35_no_page_writes_to_the_database(filled: Path, view: str) -> None:
    def contents() -> list[str]:
        with sqlite3.connect(filled) as connection:
            lines = list(connection.iterdump())
        connection.close()
        return lines

    before = contents()
    drawn(view)
    assert contents() == before


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_fault_35_hostile_text_is_shown_as_short_plain_text(filled: Path, view: str, name: str) -> None:
    store = Store(str(filled))
    with store.write() as session:
        session.execute(sa.update(Run).values(name=name, reason=name, channel=name))
        session.execute(sa.update(Device).where(Device.id == 1).values(name=name, sdk_version=name))
        session.execute(sa.update(Assignment).values(error=name, phase=name, status="failed"))
        session.execute(sa.update(Update).values(reason=name))
        session.execute(sa.update(Round).values(reason=name))
    store.close()
    app = drawn(view)
    markdown = "\n".join(
        str(getattr(element, "value", ""))
        for kind in ("title", "caption", "subheader", "markdown", "info")
        for element in app.get(kind)
    )
    page = html_of(app)
    for raw in ("<script>", "<img", "z" * 400):
        assert raw not in page + markdown
    assert "javascript:" not in markdown
    assert ":red[" not in markdown
    assert "\u202e" not in page + tables(app) + markdown


def test_app_offers_the_five_pages_and_opens_on_now(filled: Path) -> None:
    app = AppTest.from_file(str(launch.APP), default_timeout=30).run()
    assert not app.exception
    assert app.title[0].value == "Now"
    assert sorted(path.stem for path in (ROOT / "dashboard" / "views").glob("[a-z]*.py")) == sorted(VIEWS)


def test_the_command_stays_on_loopback_and_sends_no_statistics() -> None:
    flags = launch.command(8501)
    options = dict(zip(flags[5::2], flags[6::2], strict=True))
    assert options["--server.address"] == "127.0.0.1"
    assert options["--browser.gatherUsageStats"] == "false"
    assert launch.environment("fleet.db", {"A": "1"}) == {"A": "1", "POCKETFED_DATABASE": "fleet.db"}
