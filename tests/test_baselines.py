"""What a run is compared with, kept beside it: by simulations, by a command, on both kinds of database."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from pocketfed.coordinator.baselines import BaselineError, baselines_of, record_baseline
from pocketfed.coordinator.operators import audit_lines
from pocketfed.coordinator.store import Artifact, Device, Run, Store


def with_run(database: str) -> Store:
    store = Store(database)
    with store.write() as session:
        session.add(Artifact(version="a1", manifest={}, bytes=1))
        session.flush()
        run = {"name": "r", "channel": "stable", "config": {}, "artifact_version": "a1", "trainable_set": "head"}
        session.add(Run(id=1, seed=0, rounds_planned=3, **run))
    return store


def test_a_baseline_is_kept_by_kind_and_the_newest_takes_the_place_of_the_one_before(database: str) -> None:
    store = with_run(database)
    with store.write() as session:
        record_baseline(session, 1, "central", {"accuracy": 0.8, "loss": 0.5})
        record_baseline(session, 1, "local", {"accuracy": 0.4, "loss": None})
        record_baseline(session, 1, "central", {"accuracy": 0.9})
    with store.read() as session:
        assert baselines_of(session, 1) == {"central": {"accuracy": 0.9}, "local": {"accuracy": 0.4}}
        assert baselines_of(session, 2) == {}
    store.close()


@pytest.mark.parametrize(
    ("run_id", "kind", "metrics", "why"),
    [
        (2, "central", {"accuracy": 0.5}, "holds no run 2"),
        (10**20, "central", {"accuracy": 0.5}, "holds no run 10"),
        (1, "best", {"accuracy": 0.5}, "no baseline 'best'; choose one of central, local, previous"),
        (1, "central", {"accuracy": 93.0}, "accuracy is 93; give a share between 0 and 1"),
        (1, "central", {"loss": float("nan")}, "loss is nan; give a finite number"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_nothing_is_changed(
    database: str, run_id: int, kind: str, metrics: dict[str, float], why: str
) -> None:
    store = with_run(database)
    with store.write() as session:
        record_baseline(session, 1, "central", {"accuracy": 0.8})
    with pytest.raises(BaselineError, match=why), store.write() as session:
        record_baseline(session, run_id, kind, metrics)
    with store.read() as session:
        assert baselines_of(session, 1) == {"central": {"accuracy": 0.8}}
    store.close()


def pocketfed(*arguments: object) -> tuple[int, str]:
    from pocketfed.cli.main import main

    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        patch.setattr(sys, "argv", ["pocketfed", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0), out.getvalue()


def test_a_simulation_keeps_its_lines_and_its_devices_tiers_and_a_command_replaces_one_of_them(
    tiny_folder: Path, tmp_path: Path
) -> None:
    database = tmp_path / "fleet.db"
    (tmp_path / "fleet.toml").write_text(
        'needs_charging = false\n[[tiers]]\nname = "old"\nshare = 0.5\n[[tiers]]\nname = "new"\nshare = 0.5\n'
    )
    words = ("--data", tiny_folder, "--model", "nano", "--train", "head", "--devices", 4, "--rounds", 1)
    words = (*words, "--fleet", tmp_path / "fleet.toml", "--baselines", "all", "--set", "local.max_length=16")
    report = tmp_path / "run.json"
    code, said = pocketfed("simulate", *words, "--database", database, "--json", report)
    assert code == 0, said
    lines = json.loads(report.read_text())["lines"]
    store = Store(str(database))
    with store.read() as session:
        kept = baselines_of(session, 1)
        tiers = session.scalars(sa.select(Device.tier).order_by(Device.id)).all()
    assert sorted(filter(None, tiers)) == ["new", "new", "old", "old"]
    assert sorted(kept) == ["central", "local", "previous"]
    for kind, told in kept.items():
        assert (told["accuracy"], told["loss"]) == (lines[kind]["accuracy"], lines[kind]["loss"])
    assert kept["local"]["devices"] == 4

    where = ("--database", database)
    assert pocketfed("baseline", "record", 1, "central", "--accuracy", 0.75, *where) == (0, "")
    assert json.loads(pocketfed("baseline", "list", 1, *where, "--json")[1])[0] == {
        "kind": "central", "metric": "accuracy", "value": 0.75,
    }  # fmt: skip
    assert "give --accuracy, --loss or both" in pocketfed("baseline", "record", 1, "local", *where)[1]
    code, said = pocketfed("baseline", "record", 9, "local", "--loss", 1, *where)
    assert (code, "holds no run 9" in said) == (1, True)
    missing = tmp_path / "missing.db"
    code, said = pocketfed("baseline", "record", 1, "local", "--loss", 1, "--database", missing)
    assert (code, "there is no database" in said, missing.exists()) == (1, True, False)
    with store.read() as session:
        acts = [(a.act, a.target, a.outcome) for a in audit_lines(session) if a.act == "baseline.record"]
    assert acts == [("baseline.record", "run 9 local", "failed"), ("baseline.record", "run 1 central", "done")]
    store.close()
