"""`pocketfed simulate`: four commands in one that ignore nothing, and a run that is stopped and goes on."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from pocketfed.cli.main import main

SMALL = ("--model", "nano", "--devices", "3", "--rounds", "2", "--train", "head", "--set", "local.max_length=16")


class Screen(io.StringIO):
    """Ctrl-C comes when this is shown."""

    def __init__(self, at: str = "") -> None:
        super().__init__()
        self.at = at

    def write(self, text: str) -> int:
        if self.at and self.at in text:
            self.at = ""
            raise KeyboardInterrupt
        return super().write(text)


def simulate(*arguments: object, stop_at: str = "") -> tuple[int, str]:
    """Its exit code and all that it says."""
    screen = Screen(stop_at)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        patch.setattr(sys, "argv", ["pocketfed", "simulate", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(str(ended.value.code)), screen.getvalue()


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("--data d --picture gone/p.svg", "--picture gone/p.svg cannot be written, there is no folder"),
        ("--data d --picture folder", "--picture folder is a folder; name a file"),
        ("--data d --report file/x", "--report file/x cannot be made,"),
        ("--data d --report file", "--report file is a file; name a folder"),
        ("--compare a b --report file", "--report file is a file; name a folder"),
        ("--table --queue q --report file", "--report file is a file; name a folder"),
        ("--data d --sweep seed=0,1 --queue file", "--queue file is a file; name a folder"),
        ("--compare a b --report r --data d", "--compare lays reports .* alone; leave out --data"),
        ("--compare a b --report r --seed 0", "leave out --seed"),
        ("--table --queue q --picture p.svg", "--table prints what a queue has, .*; leave out --picture"),
        ("--table --queue q --fleet phones", "leave out --fleet"),
        ("--table --queue q --sweep seed=0", "leave out --sweep"),
        (
            "--data d --sweep seed=0,1 --queue q --picture p.svg",
            "--queue has a report of each run .* leave out --picture",
        ),
        ("--data d --queue q --resume", "leave out --resume"),
        ("--data d --sweep seed=0 --queue q --json j", "leave out --json"),
        ("--data d --resume --database b.db --sweep seed=0", "--resume goes on with one run, .*; leave out --sweep"),
        ("--data d --seed 3 --seeds 0,1 --queue q", "seed is given and is to be varied as well; leave out one"),
        ("--data d --set devices=3 --sweep devices=4,5 --queue q", "devices is given and is to be varied as well"),
        ("--data d --set energy=3", "energy is 3; it must be a table, such as energy.watts = 3"),
        ("--resume", "give it with --database or --report"),
        ("--resume --report r", "in r no run was left to go on with; leave out --resume"),
        ("a b", "got an unexpected argument 'a'; reports are compared with --compare"),
    ],
)
def test_what_would_be_ignored_or_fail_in_the_end_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    code, said = simulate(*command.split())
    assert code in (1, 2)
    assert said.startswith("pocketfed: ")
    assert said.count("\n") == 1
    assert re.search(told, said), said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def final(path: Path) -> Any:
    return json.loads(path.read_text())["final"]


def test_a_run_that_only_a_report_is_wanted_of_is_stopped_and_goes_on(tiny_folder: Path, tmp_path: Path) -> None:
    asked = ("--data", tiny_folder, *SMALL, "--baselines", "none", "--report")
    whole, page = tmp_path / "whole", tmp_path / "stopped"
    assert simulate(*asked, whole, "--picture", tmp_path / "p.svg")[0] == 0
    assert (tmp_path / "p.svg").read_text() == (whole / "partition.svg").read_text()
    assert sorted(p.suffix for p in whole.iterdir()) == [".html", ".json", ".md", ".svg", ".svg", ".svg", ".svg"]

    code, said = simulate(*asked, page, stop_at="         1")  # within the first round's line
    assert code == 130
    assert [p.name for p in page.glob("*.db")] == ["unfinished.db"]
    code, refused = simulate(*asked, page, "--seed", 7)
    assert (code, refused.count("pocketfed: ")) == (1, 1)
    assert "begun with seed = '0', not '7'; give that, or begin anew with another --report" in refused
    (goes_on,) = [line.partition(": ")[2] for line in said.splitlines() if line.startswith("left for later; ")]
    words = shlex.split(goes_on)
    assert words[:2] == ["pocketfed", "simulate"]
    code, said = simulate(*words[2:])
    assert code == 0
    assert "going on with run 1 after round 1 of 2" in said
    assert final(page / "run.json") == final(whole / "run.json")
    assert list(page.glob("*.db*")) == []


@pytest.mark.parametrize("kept", ["--report", "--database"])
def test_who_stops_before_the_run_has_begun_is_promised_nothing_and_left_nothing(
    tiny_folder: Path, tmp_path: Path, kept: str
) -> None:
    code, said = simulate("--data", tiny_folder, *SMALL, kept, tmp_path / "kept", stop_at="tokenizing")
    assert code == 130
    assert "left for later" not in said
    assert said.endswith("pocketfed: stopped\n")
    assert kept == "--database" or list(tmp_path.iterdir()) == []


def test_a_run_in_a_database_says_which_command_goes_on_with_it(tiny_folder: Path, tmp_path: Path) -> None:
    asked = ("--data", tiny_folder, *SMALL, "--backend", "batched", "--database", tmp_path / "a b.db")
    code, said = simulate(*asked, stop_at="         1")
    assert code == 130
    assert (
        f"left for later; this goes on with it: {shlex.join(['pocketfed', 'simulate', *map(str, asked)])} --resume"
        in said
    )
