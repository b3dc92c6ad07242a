"""Every page in every state it was designed for, run by Streamlit itself without a browser."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import fleet_database
import pytest
import sqlalchemy as sa
from streamlit.testing.v1 import AppTest

from pocketfed.coordinator.store import (
    Assignment,
    Audit,
    Device,
    Lease,
    Metric,
    ReleaseEvent,
    Round,
    Run,
    Store,
    Update,
)
from pocketfed.dashboard import launch

ROOT = Path(__file__).resolve().parents[1]
VIEWS = ("now", "learning", "round", "fleet", "models", "security", "compare", "system")
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


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "fleet.db"
    monkeypatch.setenv(launch.DATABASE_VARIABLE, str(path))
    monkeypatch.setenv(launch.OPEN_VARIABLE, "1")
    return path


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once; each test has a copy of its own."""
    path = tmp_path_factory.mktemp("seeded") / "fleet.db"
    fleet_database.fill(str(path), devices=60, rounds=3, planned=5)
    return path


@pytest.fixture
def filled(database: Path, seeded: Path) -> Path:
    shutil.copyfile(seeded, database)
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
    assert "Healthy. Running: round 3 of 5" in text
    assert "the deadline is in" in text
    assert "assistant intents" in text
    assert "of 60 enrolled" in text
    assert "release 2" in text  # live; the third is on trial


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
    # accuracy, loss, the devices' own by cohort, step_norm
    assert len(app.get("vega_lite_chart")) == 4
    app.multiselect[0].set_value([2, 1]).run()
    assert not app.exception
    assert len(app.dataframe[0].value) == 8  # four rounds of each run


def test_round_shows_the_funnel_and_pages_its_devices(filled: Path) -> None:
    app = drawn("round", lambda app: app.query_params.update(round="2"))
    assert "Round 2: finished" in html_of(app)
    assert "attempt 1 failed: 0 of at least 1 updates were usable" in tables(app)
    assert len(app.get("vega_lite_chart")) == 5  # funnel, reasons, phases, times, norms
    assert len(app.dataframe[-1].value) == 50
    app.number_input[0].set_value(2).run()
    assert not app.exception
    assert len(app.dataframe[-1].value) == 10  # the rest of 60


def test_a_buffered_round_shows_how_late_its_updates_were(filled: Path) -> None:
    app = drawn("round", lambda app: app.query_params.update(run="1", round="2"))
    assert "How late the updates were" in [s.value for s in app.subheader]


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
    models, releases, judged, events = (frame.value for frame in app.dataframe)
    assert list(models["fp32"]) == [4 * 622_208 / 1e6, 4 * 184_320 / 1e6]
    assert models["Made from"][0] == models["Version"][1]
    assert list(releases["State"]) == ["staged 20 %", "live", "superseded"]
    assert list(releases["Current"]) == [False, True, False]
    assert releases["Devices"].sum() == 60
    assert list(events["Release"][:2]) == [3, 3]
    assert len(app.get("vega_lite_chart")) == 2  # lineage, sizes
    assert (judged["Devices"] >= 5).all()  # smaller cohorts are not shown
    assert judged["Devices"].sum() < 12  # which some are: 12 devices have the trial


def test_security_names_reasons_offenders_and_who_tried_to_log_in(filled: Path) -> None:
    app = drawn("security")
    text = tables(app)
    assert "theta holds a value that is not finite" in text
    assert "mallory" in text
    assert "so there is no ε to account for" in app.info[0].value
    acts = next(m for m in app.multiselect if m.label == "Act")
    acts.set_value(["log-in"]).run()
    assert not app.exception
    assert set(app.dataframe[-1].value["Act"]) == {"log-in"}
    assert len(app.dataframe[-1].value) == 3


def test_compare_shows_settings_that_differ_and_what_runs_cost(filled: Path) -> None:
    app = drawn("compare", lambda app: app.query_params.update(runs="1,2"))
    cost, settings = (frame.value for frame in app.dataframe)
    assert len(cost) == 2
    assert "mode" in set(settings["Setting"])
    assert "seed" not in set(settings["Setting"])
    app.multiselect[0].set_value([1]).run()
    assert "second run" in app.info[0].value


def test_system_says_who_serves_and_draws_the_figures(filled: Path) -> None:
    app = drawn("system")
    assert "host-a:4711" in html_of(app)
    assert len(app.get("vega_lite_chart")) == 6
    counts = app.dataframe[0].value.set_index("Table")["Rows, about"]
    assert counts["devices"] == 60


def test_one_device_is_found_by_its_number(filled: Path) -> None:
    app = drawn("fleet", lambda app: app.query_params.update(device="8"))
    assert "phone-00007" in html_of(app)
    assert set(app.dataframe[1].value["Run"]) <= {1, 2}
    assert "There is no device 999" in drawn("fleet", lambda app: app.query_params.update(device="999")).info[0].value
    for nonsense in ("0", "-1", "٣"):
        app = drawn("fleet", lambda app, text=nonsense: app.query_params.update(device=text))  # type: ignore[misc]
        assert app.number_input(key="device").value is None


@pytest.mark.parametrize("view", VIEWS)
def test_fault_35_a_missing_database_is_named_and_not_made(database: Path, view: str) -> None:
    text = html_of(drawn(view))
    assert "There is no database" in text
    assert database.name in text
    assert not database.exists()


@pytest.mark.parametrize("view", VIEWS)
def test_fault_35_an_empty_database_says_what_to_do(database: Path, view: str) -> None:
    Store(str(database)).close()
    app = drawn(view)
    if view in ("security", "system"):  # an audit and a database there are from the beginning
        assert any(words in info.value for info in app.info for words in ("No run yet", "No figures of this time"))
        return
    assert any(f"No {noun} yet" in html_of(app) for noun in ("run", "device", "model"))
    assert "looks again every" in html_of(app)


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
        for name in ("runs", "artifacts", "devices", "audit", "vitals"):
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
    fleet_database.fill(str(database), devices=5, rounds=1, planned=2, cohort=5)
    app.run()
    assert not app.exception
    assert "There is no database" not in html_of(app)
    assert app.dataframe or "Running" in html_of(app)


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
def test_fault_35_hostile_text_is_shown_as_short_plain_text(filled: Path, view: str) -> None:
    store = Store(str(filled))
    every = len(HOSTILE)
    with store.write() as session:
        for place, name in enumerate(HOSTILE):
            some = {"name": f"{name}{place}", "sdk_version": name, "cohort": name}
            session.execute(sa.update(Device).where(Device.id == place + 1).values(**some))
            mine = sa.and_(Assignment.device_id % every == place, Assignment.kind == "train")
            session.execute(sa.update(Assignment).where(mine).values(error=name, phase=name))
            theirs = sa.select(Assignment.id).where(mine)
            session.execute(sa.update(Update).where(Update.assignment_id.in_(theirs)).values(reason=name))
            session.add(Audit(who=name, act=name[:50], target=name, outcome="done", detail=name))
            session.add(Metric(run_id=2, round=2, name=f"{name[:90]}{place}", value=1.0))
        for run_id, name in ((1, HOSTILE[0] + HOSTILE[2]), (2, HOSTILE[1] + HOSTILE[3] + HOSTILE[4] + HOSTILE[5])):
            config = {**session.get_one(Run, run_id).config, "name": name, name[:50]: name}
            session.execute(sa.update(Run).where(Run.id == run_id).values(name=name, reason=name, config=config))
            session.execute(sa.update(Round).where(Round.run_id == run_id).values(reason=name))
        session.execute(sa.update(Lease).values(holder=HOSTILE[1] + HOSTILE[4]))
        session.execute(sa.update(ReleaseEvent).values(who=HOSTILE[0], reason=HOSTILE[4]))
    store.close()
    app = drawn(view)
    markdown = "\n".join(
        str(getattr(element, "value", ""))
        for kind in ("title", "caption", "subheader", "markdown", "info", "error", "success")
        for element in app.get(kind)
    )
    page = html_of(app)
    for raw in ("<script>", "<img", "z" * 400):
        assert raw not in page + markdown
    assert "javascript:" not in markdown
    assert ":red[" not in markdown
    charts = "".join(chart.proto.spec for chart in app.get("vega_lite_chart"))
    assert "\u202e" not in page + tables(app) + markdown + charts


def test_app_offers_the_eight_pages_and_opens_on_now(filled: Path) -> None:
    app = AppTest.from_file(str(launch.APP), default_timeout=30).run()
    assert not app.exception
    assert app.title[0].value == "Now"
    assert sorted(path.stem for path in (ROOT / "dashboard" / "views").glob("[a-z]*.py")) == sorted(VIEWS)


def test_the_command_stays_on_loopback_and_sends_no_statistics() -> None:
    flags = launch.command(8501)
    options = dict(zip(flags[5::2], flags[6::2], strict=True))
    assert options["--server.address"] == "127.0.0.1"
    assert options["--browser.gatherUsageStats"] == "false"
    given = {"POCKETFED_DATABASE": "fleet.db", "POCKETFED_DASHBOARD_OPEN": "1"}
    assert launch.environment("fleet.db", base={"A": "1"}) == {"A": "1", **given}
    assert launch.environment("fleet.db", "0.0.0.0", {})["POCKETFED_DASHBOARD_OPEN"] == "0"


def test_off_loopback_the_command_asks_for_tls_and_gives_the_certificate_to_the_server(tmp_path: Path) -> None:
    from pocketfed.cli.dashboard import dashboard
    from pocketfed.cli.output import CommandError

    with pytest.raises(CommandError, match="in plain text; give --certs"):
        dashboard(str(tmp_path / "fleet.db"), 8501, "0.0.0.0", None, False)
    with pytest.raises(CommandError, match="there is no certificate in"):
        dashboard(str(tmp_path / "fleet.db"), 8501, "0.0.0.0", tmp_path, False)
    flags = launch.command(8501, "0.0.0.0", ("fleet.pem", "fleet.key"))
    assert flags[-4:] == ["--server.sslCertFile", "fleet.pem", "--server.sslKeyFile", "fleet.key"]
