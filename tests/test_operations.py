"""What docs/operations.md tells an operator to type is typed here, or exists at least with the options it shows."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from pocketfed.coordinator.artifacts import BuiltArtifact
from pocketfed.coordinator.store import Device, Store, database_url

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "operations.md").read_text()


def sections() -> dict[str, list[list[str]]]:
    """Heading -> the commands of its blocks, in order."""
    found = {}
    for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]:
        blocks = re.findall(r"```sh\n(.*?)```", part, re.DOTALL)
        lines = [line for block in blocks for line in block.splitlines() if line]
        found[part.splitlines()[0]] = [shlex.split(line, comments=True) for line in lines]
    return found


def run(words: list[str], folder: Path) -> str:
    command = [sys.executable, "-m", "pocketfed.cli", *words[1:]] if words[0] == "pocketfed" else words
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


def test_every_command_in_a_sentence_exists_with_the_options_that_are_shown() -> None:
    import typer.main

    from pocketfed.cli.commands import app

    shown = [shlex.split(text) for text in re.findall(r"`(pocketfed [^`]*)`", TEXT)]
    assert len(shown) > 5
    for words in shown:
        command: Any = typer.main.get_command(app)
        rest = words[1:]
        while hasattr(command, "commands"):
            command, *rest = command.commands[rest[0]], *rest[1:]
        known = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known, words


@pytest.fixture
def fleet(tmp_path: Path, nano_built: BuiltArtifact) -> Path:
    """A folder in which the first commands of `Start` have been typed, with one enrolled device."""
    (tmp_path / "alice.txt").write_text("a long enough password\n")
    certs, create, publish, key, operator, _ = sections()["Start"]
    publish = [*publish[:2], str(nano_built.folder), *publish[3 : publish.index("--labels")]]  # it is built already
    for words in (certs, create, publish, key, operator):
        run(words, tmp_path)
    store = Store(str(tmp_path / "fleet.db"))
    with store.write() as session:
        session.add(Device(name="phone", token_hash="0" * 64))
    store.close()
    return tmp_path


def test_a_first_fleet_is_backed_up_upgraded_rotated_and_restored_as_written(fleet: Path) -> None:
    commands = sections()
    for words in commands["Back up"]:
        if words[0] == "pocketfed":
            run(words, fleet)
    for words in commands["Upgrade"]:
        run(words, fleet)
    signing = ""
    for words in commands["Rotate"]:
        said = run([signing if word == "KEY" else word for word in words], fleet)
        if words[1:3] == ["keys", "list"]:
            signing = re.findall(r"\b[0-9a-f]{16}\b", said)[0]
    assert devices(fleet) == [("phone", True)]
    restore = commands["Recover"]
    assert restore[0][:2] == ["rm", "-rf"]
    for words in restore:
        run(words, fleet)
    assert devices(fleet) == [("phone", False)]  # it was revoked after the copy was made
    run(["pocketfed", "release", "list", "--channel", "stable", "--database", "fleet.db"], fleet)


def devices(fleet: Path) -> list[tuple[str, bool]]:
    store = Store(str(fleet / "fleet.db"))
    with store.read() as session:
        rows = session.execute(sa.select(Device.name, Device.revoked_at)).all()
    store.close()
    return [(row.name, row.revoked_at is not None) for row in rows]


def test_a_backup_is_taken_while_somebody_writes_and_holds_no_half_transaction(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "fleet.db"))
    with store.write() as session:
        session.add(Device(name="before", token_hash="0" * 64))
    backup = ["pocketfed", "db", "backup", "--database", "fleet.db", "--out", "backup.db"]
    with store.write() as session:
        session.add(Device(name="half-way", token_hash="1" * 64))
        session.flush()
        run(backup, tmp_path)
    copy = Store(str(tmp_path / "backup.db"))
    with copy.read() as session:
        assert session.scalars(sa.select(Device.name)).all() == ["before"]
    copy.close()
    store.close()
    again = subprocess.run(
        [sys.executable, "-m", "pocketfed.cli", *backup[1:]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert again.returncode == 1
    assert "backup.db is there already" in again.stderr


def test_pg_dump_and_pg_restore_bring_a_fleet_back(postgres: str, tmp_path: Path) -> None:
    if not (shutil.which("pg_dump") and shutil.which("pg_restore")):
        pytest.skip("there is no pg_dump here")
    dump = next(words for words in sections()["Back up"] if words[0] == "pg_dump")
    restore = shlex.split(re.findall(r"`(pg_restore [^`]*)`", TEXT)[0])
    assert dump[-1] == restore[-2].removeprefix("--dbname=")
    url = str(database_url(postgres).set(drivername="postgresql").render_as_string(hide_password=False))
    engine = sa.create_engine(postgres)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("CREATE DATABASE operations"))
    engine.dispose()
    own = postgres.replace("@/postgres?", "@/operations?")
    url = url.replace("@/postgres?", "@/operations?")
    store = Store(own)
    with store.write() as session:
        session.add(Device(name="phone", token_hash="0" * 64))
    run([*dump[:-1], url], tmp_path)
    with store.write() as session:
        session.add(Device(name="later", token_hash="1" * 64))
    store.close()
    run([*restore[:-2], f"--dbname={url}", restore[-1]], tmp_path)
    store = Store(own)
    with store.read() as session:
        assert session.scalars(sa.select(Device.name)).all() == ["phone"]
    store.close()
