"""Who may look and who may act: log-ins, roles, the audit of both, and a database that may only be read."""

from __future__ import annotations

import doctest
import hashlib
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fleet_database
import pytest
import sqlalchemy as sa
from streamlit.testing.v1 import AppTest

from pocketfed.coordinator.operators import Actor, audit_lines, disable_operator, hash_password, log_in, set_operator
from pocketfed.coordinator.store import Operator, Release, Store
from pocketfed.dashboard import acts, launch, login, opening

ROOT = Path(__file__).resolve().parents[1]
VIEWS = ("now", "learning", "round", "fleet", "models", "security", "compare", "system")
PASSWORD = "correct horse battery"
ROLES = {"vera": "viewer", "olga": "operator", "adam": "admin"}


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small fleet with three operators; each test has a copy."""
    path = tmp_path_factory.mktemp("seeded") / "fleet.db"
    fleet_database.fill(str(path), devices=12, rounds=2, planned=4)
    store = Store(str(path))
    with store.write() as session:
        for name, role in ROLES.items():
            set_operator(session, name, role, PASSWORD)
    store.close()
    return path


@pytest.fixture
def store(tmp_path: Path, seeded: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    path = tmp_path / "fleet.db"
    shutil.copyfile(seeded, path)
    monkeypatch.setenv(launch.DATABASE_VARIABLE, str(path))
    monkeypatch.setenv(launch.OPEN_VARIABLE, "1")
    login._tries.clear()
    opened = Store(str(path))
    yield opened
    opened.close()


def page(view: str) -> AppTest:
    app = AppTest.from_file(str(ROOT / "dashboard" / "views" / f"{view}.py"), default_timeout=30).run()
    assert not app.exception, app.exception
    return app


def try_log_in(app: AppTest, name: str, password: str = PASSWORD) -> AppTest:
    app.text_input[0].set_value(name)
    app.text_input[1].set_value(password)
    next(b for b in app.button if b.label == "Log in").click().run()
    assert not app.exception, app.exception
    return app


def audited(store: Store, act: str) -> list[tuple[str, str, str]]:
    with store.read() as session:
        return [(a.who, a.target, a.outcome) for a in audit_lines(session) if a.act == act and a.who in (*ROLES, "eve")]


@pytest.mark.parametrize("view", VIEWS)
def test_fault_35_without_a_log_in_a_page_shows_the_form_and_nothing_of_the_fleet(store: Store, view: str) -> None:
    app = page(view)
    assert [t.value for t in app.title] == ["Log in"]
    assert not app.dataframe
    assert not app.get("vega_lite_chart")
    assert not app.sidebar.selectbox


def test_a_viewer_logs_in_sees_the_page_and_is_named_and_both_tries_are_audited(store: Store) -> None:
    app = try_log_in(page("now"), "vera", "wrong horse battery")
    assert "do not go together" in app.error[0].value
    assert app.title[0].value == "Log in"
    try_log_in(app, "vera")
    assert app.title[0].value == "Now"
    assert "vera, viewer" in [t.value for t in app.sidebar.text]
    assert audited(store, "log-in") == [("vera", "", "done"), ("vera", "", "refused")]


def test_while_a_password_is_hashed_others_write_and_what_they_changed_counts(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    scrypt, between = hashlib.scrypt, [lambda session: None]

    def hashing(*given: Any, **how: Any) -> bytes:
        writer = sqlite3.connect(str(store.file), timeout=0)  # waits for nobody
        writer.execute("BEGIN IMMEDIATE")
        between[0](writer)
        writer.commit()
        writer.close()
        return scrypt(*given, **how)

    monkeypatch.setattr(hashlib, "scrypt", hashing)
    assert log_in(store, "vera", PASSWORD) == Actor("vera", "viewer")
    between[0] = lambda writer: writer.execute("UPDATE operators SET role = 'operator' WHERE name = 'vera'")
    assert log_in(store, "vera", PASSWORD) == Actor("vera", "operator")
    between[0] = lambda writer: writer.execute("UPDATE operators SET disabled_at = '2025-01-01' WHERE name = 'vera'")
    assert log_in(store, "vera", PASSWORD) is None
    assert [outcome for _, _, outcome in audited(store, "log-in")] == ["refused", "done", "done"]


def test_who_is_disabled_is_out_at_the_next_look(store: Store) -> None:
    app = try_log_in(page("now"), "vera")
    with store.write() as session:
        disable_operator(session, "vera")
    app.run()
    assert app.title[0].value == "Log in"


def test_another_password_ends_what_was_logged_in_with_the_old_one(store: Store) -> None:
    app, other = try_log_in(page("now"), "vera"), try_log_in(page("now"), "olga")
    with store.write() as session:
        set_operator(session, "vera", "viewer", "another horse battery")
    assert app.run().title[0].value == "Log in"
    assert other.run().title[0].value == "Now"
    assert try_log_in(app, "vera", "another horse battery").title[0].value == "Now"


def test_logging_out_brings_back_the_form(store: Store) -> None:
    app = try_log_in(page("fleet"), "vera")
    app.sidebar.button("log out").click().run()
    assert app.title[0].value == "Log in"


def test_after_five_failures_a_name_has_to_wait_and_the_audit_does_not_grow(store: Store) -> None:
    app = page("now")
    for _ in range(login.TRIES):
        try_log_in(app, "eve", "guess number one")
    try_log_in(app, "eve", PASSWORD)
    assert "too many failed log-ins; try again in 15 minutes" in app.error[0].value
    assert len(audited(store, "log-in")) == login.TRIES
    try_log_in(app, "vera")  # another name is not locked out by it
    assert app.title[0].value == "Now"


def test_failures_are_forgotten_after_a_while_and_limited_over_all_names() -> None:
    at = [0.0]
    tries = login.Tries(lambda: at[0])
    assert {tries.begin("eve") for _ in range(login.TRIES)} == {0.0}
    assert tries.begin("eve") == login.WITHIN_S
    assert tries.begin("vera") == 0
    at[0] = login.WITHIN_S + 1
    assert tries.begin("eve") == 0
    assert {tries.begin(f"name {number}") for number in range(login.TRIES_OF_ALL - 1)} == {0.0}
    assert tries.begin("vera") == login.WITHIN_S


def test_a_try_counts_from_its_beginning_and_no_more_once_it_has_succeeded() -> None:
    tries = login.Tries(lambda: 0.0)
    assert [tries.begin("vera") for _ in range(login.TRIES + 1)] == [0.0] * login.TRIES + [login.WITHIN_S]
    tries.succeeded("vera")
    assert [tries.begin("vera") for _ in range(2)] == [0.0, login.WITHIN_S]


def test_a_database_without_operators_is_open_on_this_machine_only(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store.write() as session:
        session.execute(sa.delete(Operator))
    assert page("now").title[0].value == "Now"
    monkeypatch.setenv(launch.OPEN_VARIABLE, "0")
    app = page("now")
    text = "\n".join(element.proto.body for element in app.get("html"))
    assert "Nobody can log in yet" in text
    assert "pocketfed operator set" in text
    assert not app.dataframe


# ---- acts ------------------------------------------------------------------------------------------------------------


def do(app: AppTest, what: str, release: int, typed: str, percent: float = 100.0) -> AppTest:
    next(s for s in app.selectbox if s.label == "What").set_value(what)
    app.selectbox("release to act on").set_value(release)
    next(n for n in app.number_input if n.label == "Percent of the devices").set_value(percent)
    next(t for t in app.text_input if "to confirm" in t.label).set_value(typed)
    next(b for b in app.button if b.label == "Do it").click().run()
    assert not app.exception, app.exception
    return app


def state_of(store: Store, release: int) -> tuple[str, float]:
    with store.read() as session:
        found = session.get_one(Release, release)
        return found.state, found.percent


def test_a_viewer_is_refused_an_act_and_the_try_is_audited(store: Store) -> None:
    app = do(try_log_in(page("models"), "vera"), "promote", 3, "3", 50.0)
    assert "Refused: vera is viewer; promote needs operator" in app.error[0].value
    assert state_of(store, 3) == ("staged", 20.0)
    assert audited(store, "promote") == [("vera", "3 50 %", "refused")]


def test_an_operator_promotes_pauses_and_rolls_back_and_each_act_is_audited(store: Store) -> None:
    app = try_log_in(page("models"), "olga")
    do(app, "promote", 3, "")
    assert "Nothing was done" in app.warning[0].value  # it was not confirmed
    assert state_of(store, 3) == ("staged", 20.0)
    do(app, "promote", 3, "3", 50.0)
    assert "Done: release 3 is staged for 50 %" in app.success[0].value
    do(app, "pause", 3, "3")
    assert state_of(store, 3) == ("paused", 50.0)
    do(app, "promote", 3, "3", 10.0)
    assert "Refused: release 3 has 50 % of the devices" in app.error[0].value
    do(app, "rollback", 1, "1")
    assert "Done: release 4 is live" in app.success[0].value
    assert state_of(store, 3)[0] == "rolled_back"
    assert audited(store, "rollback") == [("olga", "1", "done")]
    assert audited(store, "promote") == [("olga", "3 10 %", "failed"), ("olga", "3 50 %", "done")]


def test_a_role_that_was_lowered_meanwhile_counts_at_once(store: Store) -> None:
    app = try_log_in(page("models"), "olga")
    with store.write() as session:
        session.execute(sa.update(Operator).where(Operator.name == "olga").values(role="viewer"))
    do(app, "promote", 3, "3")
    assert "Refused: olga is viewer" in app.error[0].value


def test_a_signed_fleet_is_not_rolled_back_without_the_publishers_keys(store: Store) -> None:
    from pocketfed.coordinator.store import KeyList

    with store.write() as session:
        session.add(KeyList(sequence=1, publisher="00" * 32, statement=b"{}", signature=b"x"))
    said = acts.act(store, Actor("olga", "operator"), "rollback", 1)
    assert said.startswith("Refused: there are no publisher's keys in")
    assert state_of(store, 3) == ("staged", 20.0)


# ---- a role that may only read ---------------------------------------------------------------------------------------


def test_pages_read_through_a_connection_that_cannot_write(store: Store) -> None:
    page("now")
    with opening.store().read() as session, pytest.raises(sa.exc.OperationalError, match="readonly"):
        session.execute(sa.delete(Operator))


def test_with_a_read_only_database_all_but_the_acts_work(store: Store) -> None:
    """The operating system's part is played by triggers, which no account gets past."""
    with sqlite3.connect(str(store.file)) as connection:
        for table in ("audit", "releases", "release_events"):
            for change in ("INSERT", "UPDATE"):
                connection.execute(
                    f"CREATE TRIGGER no_{change}_{table} BEFORE {change} ON {table} "
                    "BEGIN SELECT RAISE(ABORT, 'attempt to write a readonly database'); END"
                )
    connection.close()
    app = try_log_in(page("models"), "olga")
    assert app.title[0].value == "Models"
    do(app, "pause", 3, "3")
    assert "this account cannot write to the database" in app.error[0].value
    assert state_of(store, 3) == ("staged", 20.0)
    try_log_in(page("now"), "olga", "wrong horse battery")
    assert audited(store, "log-in") == []


def test_a_role_of_postgresql_that_may_only_select_looks_and_logs_in_but_does_not_act(
    postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Store(postgres)
    with made.write() as session:
        set_operator(session, "olga", "operator", PASSWORD)
        session.execute(sa.text("CREATE ROLE looks LOGIN"))
        session.execute(sa.text("GRANT USAGE ON SCHEMA public TO looks"))
        session.execute(sa.text("GRANT SELECT ON ALL TABLES IN SCHEMA public TO looks"))
    made.close()
    monkeypatch.setenv(launch.DATABASE_VARIABLE, postgres.replace("pocketfed@", "looks@"))
    monkeypatch.setenv(launch.OPEN_VARIABLE, "0")
    login._tries.clear()
    app = try_log_in(page("system"), "olga")
    assert app.title[0].value == "System"
    assert "postgresql" in "\n".join(element.proto.body for element in app.get("html"))
    assert login.check("olga", "wrong horse battery") is None
    with opening.writing() as opened, pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
        acts.act(opened, Actor("olga", "operator"), "pause", 1)


# ---- the organisation's own log-in -----------------------------------------------------------------------------------


def test_an_identity_counts_only_if_its_provider_vouches_for_the_address_of_an_operator() -> None:
    operators = {"a@b.org": "viewer"}
    assert login.operator_of({"email": "a@b.org", "email_verified": True}, operators) == "a@b.org"
    for claims in (
        {}, {"email": "a@b.org"}, {"email": "a@b.org", "email_verified": "true"}, {"email_verified": True},
        {"email": "A@b.org", "email_verified": True}, {"email": ["a@b.org"], "email_verified": True},
    ):  # fmt: skip
        assert login.operator_of(claims, operators) is None


def test_where_oidc_is_configured_the_form_offers_it_even_without_operators(store: Store) -> None:
    with store.write() as session:
        session.execute(sa.delete(Operator))
    app = AppTest.from_file(str(ROOT / "dashboard" / "views" / "now.py"), default_timeout=30)
    app.secrets["auth"] = {"client_id": "x"}
    app.run()
    assert not app.exception
    assert "Log in with your organisation" in [b.label for b in app.button]
    assert not app.dataframe


def test_the_examples_of_the_log_in_hold_and_no_password_is_in_a_line_of_the_audit(store: Store) -> None:
    for module in (login, launch):
        assert doctest.testmod(module).failed == 0
    try_log_in(page("now"), "vera", "a very wrong password")
    with sqlite3.connect(str(store.file)) as connection:
        dump = "\n".join(connection.iterdump())
    connection.close()
    assert "a very wrong password" not in dump
    assert PASSWORD not in dump
    assert hash_password(PASSWORD) != hash_password(PASSWORD)  # salted
