"""certs, keys, enrolment-key, devices, release, operator, audit as commands, and a fleet with TLS as processes."""

from __future__ import annotations

import contextlib
import getpass
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pocketfed.coordinator.artifacts import BuiltArtifact
from pocketfed.model.tasks import Dataset

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 120.0


def pocketfed(*arguments: object) -> tuple[int, str, str]:
    """The command in this process, through its own entry point."""
    from pocketfed.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["pocketfed", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0), out.getvalue(), err.getvalue()


def works(*arguments: object) -> str:
    code, out, err = pocketfed(*arguments)
    assert (code, err) == (0, ""), err
    return out


def refused(*arguments: object) -> str:
    """The one sentence of a command that must fail."""
    code, _, err = pocketfed(*arguments)
    assert code != 0
    assert err.count("\n") == 1
    assert err.startswith("pocketfed: ")
    return err


def listed(*arguments: object) -> Any:
    return json.loads(works(*arguments, "--json"))


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "fleet.db"


def test_publish_signs_with_keys_that_it_makes_and_every_act_is_in_the_audit(
    database: Path, nano_built: BuiltArtifact
) -> None:
    report = listed("publish", nano_built.folder, "--channel", "stable", "--database", database)
    shown = listed("keys", "list", "--database", database)
    assert report["publisher"] == shown["publisher"]
    assert len(shown["keys"]) == 1
    assert (database.with_name("fleet.db.keys") / "root.key").is_file()
    assert listed("release", "list", "--database", database)[0]["signed_by"] == shown["keys"][0]["key"]
    works("keys", "rotate", "--database", database)
    says = works("keys", "revoke", shown["keys"][0]["key"], "--sign-again", "--database", database)
    assert says == f"revoked {shown['keys'][0]['key']}; signed again: stable\n"
    states = [k["state"] for k in listed("keys", "list", "--database", database)["keys"]]
    assert states == ["revoked", "good"]
    assert "no key 'nope'" in refused("keys", "revoke", "nope", "--database", database)
    acts = [(a["act"], a["outcome"]) for a in reversed(listed("audit", "--database", database))]
    assert acts == [
        ("key.create", "done"),
        ("publish", "done"),
        ("key.rotate", "done"),
        ("key.revoke", "done"),
        ("key.revoke", "failed"),
    ]
    assert {a["who"] for a in listed("audit", "--database", database)} == {f"{getpass.getuser()}@cli"}


def test_enrolment_keys_and_devices_are_made_shown_and_revoked(database: Path) -> None:
    from pocketfed.coordinator.enrolment import enrol
    from pocketfed.coordinator.store import Store

    made = listed(
        "enrolment-key", "create", "--database", database, "--quota", 2, "--cohort", "pilot", "--round-cap", 1
    )
    key = works("enrolment-key", "create", "--database", database, "--quota", 1, "--expires", "never").strip()
    store = Store(str(database))
    enrol(store, "phone", "stable", "", "A" * 43, made["key"])
    enrol(store, "tablet", "stable", "", "B" * 43, key)
    store.close()
    rows = listed("enrolment-key", "list", "--database", database)
    assert [(r["cohort"], r["used"], r["quota"], r["round_cap"]) for r in rows] == [("pilot", 1, 2, 1), ("", 1, 1, 0)]
    assert rows[0]["expires_at"]
    assert rows[1]["expires_at"] is None
    works("enrolment-key", "revoke", made["id"], "--database", database)
    works("devices", "revoke", "phone", "--database", database)
    devices = {d["name"]: d for d in listed("devices", "list", "--database", database)}
    assert devices["phone"]["revoked_at"]
    assert devices["tablet"]["revoked_at"] is None
    assert "there is no device 'nobody'" in refused("devices", "revoke", "nobody", "--database", database)
    assert "is not a time; give a number with m, h, d or w" in refused(
        "enrolment-key", "create", "--database", database, "--quota", 1, "--expires", "soon"
    )


def test_a_password_is_asked_for_twice_and_a_files_line_end_is_no_part_of_it(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocketfed.coordinator.operators import Actor, log_in
    from pocketfed.coordinator.store import Store

    typed = iter(["correct horse", "corect horse", "correct horse", "correct horse"])
    monkeypatch.setattr(getpass, "getpass", lambda prompt: next(typed))
    words = ("--role", "viewer", "--database", database)
    assert "the two passwords are not the same" in refused("operator", "set", "vera", *words)
    assert works("operator", "set", "vera", *words).startswith("vera may log in as viewer to sqlite:///")
    (tmp_path / "password").write_bytes(b"correct horse\r\n")
    works("operator", "set", "adam", "--password-file", tmp_path / "password", *words)
    store = Store(str(database))
    assert [log_in(store, name, "correct horse") for name in ("vera", "adam")] == [
        Actor("vera", "viewer"), Actor("adam", "viewer"),
    ]  # fmt: skip
    store.close()


def test_a_password_that_is_piped_in_once_changes_nothing_and_the_file_is_named(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter(["correct horse"])

    def ask(prompt: str) -> str:
        for line in typed:
            return line
        raise EOFError

    monkeypatch.setattr(getpass, "getpass", ask)
    assert "--password-file" in refused("operator", "set", "vera", "--role", "viewer", "--database", database)
    assert listed("operator", "list", "--database", database) == []


def test_operators_are_set_from_a_file_and_disabled(database: Path, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("correct horse\n")
    works(
        "operator", "set", "ada", "--role", "operator", "--password-file", tmp_path / "password", "--database", database
    )
    works("operator", "disable", "ada", "--database", database)
    (row,) = listed("operator", "list", "--database", database)
    assert (row["name"], row["role"], bool(row["disabled_at"])) == ("ada", "operator", True)
    assert "correct horse" not in json.dumps(listed("audit", "--database", database))
    wrong = (
        "operator",
        "set",
        "bob",
        "--role",
        "king",
        "--password-file",
        tmp_path / "password",
        "--database",
        database,
    )
    assert "there is no role 'king'" in refused(*wrong)


def test_a_run_that_cannot_start_and_a_rollback_to_nothing_are_in_the_audit(
    database: Path, nano_built: BuiltArtifact
) -> None:
    told = refused("serve", "--database", database, "--listen", "127.0.0.1:0", "--set", "name=early")
    assert "nothing is published on channel 'stable'" in told
    works("publish", nano_built.folder, "--channel", "stable", "--database", database)
    refused("release", "rollback", "f00d", "--database", database)
    lines = [(a["act"], a["target"], a["outcome"]) for a in reversed(listed("audit", "--database", database))]
    assert lines[0] == ("run.start", "early", "failed")
    assert lines[-1] == ("rollback", "stable f00d", "failed")


def test_an_upgrade_of_the_schema_is_in_the_audit_and_what_needs_none_is_not(database: Path) -> None:
    from alembic import command
    from alembic.config import Config

    from pocketfed.coordinator.store import MIGRATIONS, Store

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    store = Store(str(database))
    with store.engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "-1")
    store.close()
    works("db", "upgrade", "--database", database)
    (line,) = listed("audit", "--database", database)
    assert (line["act"], line["outcome"]) == ("db.upgrade", "done")
    works("db", "upgrade", "--database", database)
    assert len(listed("audit", "--database", database)) == 1


def test_a_simulation_that_is_kept_is_in_the_audit(database: Path, tmp_path: Path, tiny_dataset: Dataset) -> None:
    for name, examples in (("train", tiny_dataset.train), ("test", tiny_dataset.test)):
        lines = [json.dumps({"text": e.text, "label": e.label}) + "\n" for e in examples]
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(lines))
    words = ("--model", "nano", "--devices", 2, "--rounds", 1, "--train", "head", "--database", database)
    works("simulate", "--data", tmp_path / "data", *words)
    lines = [(a["who"], a["act"], a["target"], a["outcome"]) for a in listed("audit", "--database", database)]
    assert lines == [
        (f"{getpass.getuser()}@cli", "simulate", "simulate data", "done"),
        ("coordinator", "run.finish", "simulate data", "done"),
    ]


def test_fault_20_serve_does_not_go_where_others_can_come_without_certificates(database: Path, tmp_path: Path) -> None:
    told = refused("serve", "--database", database, "--listen", "0.0.0.0:0")
    assert "there is no certificate to encrypt with; make one with `pocketfed certs`" in told
    told = refused("serve", "--database", database, "--listen", "0.0.0.0:0", "--certs", tmp_path)
    assert f"there is no certificate in {tmp_path}" in told
    assert not database.exists()


def test_the_commands_of_the_security_page_exist() -> None:
    import typer

    from pocketfed.cli.commands import app
    from pocketfed.cli.device import parser

    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "SECURITY.md").read_text(), re.DOTALL)
    used = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    assert len(used) >= 8
    for _, *words in used:
        command: Any = typer.main.get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        known = {name for parameter in command.params for name in parameter.opts}
        if command.name == "device":
            known |= {name for action in parser()._actions for name in action.option_strings}
        assert {word for word in words if word.startswith("--")} <= known, words


def test_a_release_goes_out_in_stages_by_commands_and_each_is_in_the_audit(
    database: Path, nano_built: BuiltArtifact
) -> None:
    from pocketfed.coordinator.enrolment import enrol
    from pocketfed.coordinator.store import Device, Store

    version = nano_built.version
    published = ("publish", nano_built.folder, "--channel", "stable", "--database", database, "--train")
    staged = ("--rollout", 10, "--margin", 0.05, "--min-devices", 3, "--min-sdk", "0.2")
    assert "the first release goes to all of them" in refused(*published, "head", *staged)
    works(*published, "head")
    assert "nobody judges cannot go on by itself" in refused(*published, "norms", "--auto")
    told = works(*published, "norms", *staged)
    assert "on 10 % of 'stable', training norms" in told
    store = Store(str(database))
    for number, holds in ((1, 1), (2, 2), (3, 1), (4, None)):
        enrol(store, f"phone-{number}", "stable", "", f"{number}" * 43)
        with store.write() as session:
            session.get_one(Device, number).release_id = holds
    store.close()
    columns = ("id", "state", "percent", "parent", "devices", "share", "trains")
    rows = [tuple(row[c] for c in columns) for row in listed("release", "list", "--database", database)]
    assert rows == [(2, "staged", 10, 1, 1, 0.25, "norms"), (1, "live", 100, None, 2, 0.5, "head")]
    shown = listed("release", "show", 2, "--database", database)
    assert (shown["margin"], shown["loss_margin"], shown["min_devices"], shown["min_sdk"]) == (0.05, 0.1, 3, "0.2")
    assert (shown["cohorts"], [h["state"] for h in shown["history"]]) == ([], ["staged"])
    assert works("release", "pause", 2, "--database", database) == "release 2 is paused at 10 % of 'stable'\n"
    told = works("release", "promote", 2, "--percent", 50, "--auto", "--database", database)
    assert told == "release 2 is staged for 50 % of 'stable', and goes on by itself\n"
    assert "has 50 % of the devices, more than 20" in refused(
        "release", "promote", 2, "--percent", 20, "--database", database
    )
    assert works("release", "promote", 2, "--database", database) == "release 2 is live for 100 % of 'stable'\n"
    assert "as release 3" in works("release", "rollback", 1, "--database", database)
    assert "there is no release 9" in refused("release", "show", 9, "--database", database)
    shown = works("release", "list", "--database", database)
    assert all(text in shown for text in ("superseded", "rolled_back", "1 of 4", version[:12]))
    assert all(text in works("release", "show", 2, "--database", database) for text in ("paused 10 %", "staged 50 %"))
    acts = [(a["act"], a["target"], a["outcome"]) for a in reversed(listed("audit", "--database", database))]
    assert acts == [
        ("publish", f"stable {version}", "failed"), ("key.create", f"{database}.keys", "done"),
        ("publish", f"stable {version}", "done"), ("publish", f"stable {version}", "done"), ("pause", "2", "done"),
        ("promote", "2 50 % auto", "done"),
        ("promote", "2 20 %", "failed"), ("promote", "2", "done"), ("rollback", "stable 1", "done"),
    ]  # fmt: skip


@contextlib.contextmanager
def process(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        [sys.executable, "-m", "pocketfed.cli", *map(str, arguments)], cwd=ROOT / "tests", text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield child
    finally:
        child.terminate()
        child.communicate(timeout=PATIENCE_S)


def read_until(child: subprocess.Popen[str], text: str) -> str:
    assert child.stdout is not None
    for line in child.stdout:
        if text in line:
            return line
    raise AssertionError(f"{child.args} ended without saying {text!r}")


@pytest.mark.slow
def test_a_fleet_with_tls_keys_and_a_pinned_publisher_goes_through_a_run(
    database: Path, tmp_path: Path, nano_built: BuiltArtifact, tiny_dataset: Dataset
) -> None:
    works("certs", "--out", tmp_path / "certs", "--host", "127.0.0.1")
    published = ("publish", nano_built.folder, "--channel", "stable", "--database", database, "--train", "head")
    publisher = listed(*published)["publisher"]
    key = works("enrolment-key", "create", "--database", database, "--quota", 1).strip()
    rows = [{"text": e.text, "label": e.label} for e in tiny_dataset.train[:24]]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    serving = (
        "serve", "--database", database, "--listen", "127.0.0.1:0", "--certs", tmp_path / "certs", "--exit-when-done",
        "--set", "rounds=1", "--set", "min_devices=1",
    )  # fmt: skip
    with process(*serving) as coordinator:
        address = re.findall(r"127\.0\.0\.1:\d+", read_until(coordinator, "listening on"))[0]
        common = ("device", "--coordinator", address, "--data", tmp_path / "mine.jsonl", "--enrolment-key", key)
        with process(*common, "--home", tmp_path / "plain") as plain:
            read_until(plain, "cannot be reached")  # plaintext to a port with TLS
        ca = ("--ca", tmp_path / "certs" / "ca.pem")
        with process(*common[:-1], "wrong", *ca, "--home", tmp_path / "stranger") as stranger:
            read_until(stranger, "the enrolment key is wrong")
        with process(*common, *ca, "--home", tmp_path / "home", "--name", "ann", "--publisher", publisher) as ann:
            read_until(ann, "handed in")
        assert coordinator.wait(PATIENCE_S) == 0
    assert [d["name"] for d in listed("devices", "list", "--database", database)] == ["ann"]
    acts = [(a["act"], a["outcome"]) for a in reversed(listed("audit", "--database", database))]
    assert acts[1:] == [
        ("publish", "done"),
        ("enrolment-key.create", "done"),
        ("run.start", "done"),
        ("run.finish", "done"),
    ]
