"""The `pocketfed` command: what each sub-command does, and that a mistake is one sentence and leaves nothing behind."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORDS = {"alarm": "wake me at", "lights": "turn on the", "music": "play some"}
NANO = ("--model", "nano", "--devices", "3", "--rounds", "2", "--train", "head")
PROMISED = {  # what the first issue promised, word by word
    "distill": "--corpus --preset --out --steps --seed --set",
    "quantize": "--out --scheme",
    "inspect": "--json",
    "evaluate": "--data --json",
    "publish": "--channel --database",
    "serve": "--database --listen --run",
    "device": "--coordinator --data --home --name",
    "simulate": "--data --devices --rounds --model --partition --train --strategy --cohort --local-epochs --seed "
                "--database --json",
    "dashboard": "--database --port",
}  # fmt: skip


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


def pocketfed(*arguments: object) -> Ran:
    """The command in this process, through its own entry point."""
    from pocketfed.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["pocketfed", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    assert isinstance(ended.value.code, int)
    return Ran(ended.value.code, out.getvalue(), err.getvalue())


def works(*arguments: object) -> str:
    """Standard output of a command that must succeed without a word on stderr."""
    ran = pocketfed(*arguments)
    assert (ran.code, ran.err) == (0, ""), ran
    return ran.out


@contextlib.contextmanager
def process(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """The command as a process of its own, which does not outlive the test."""
    child = subprocess.Popen(
        [sys.executable, "-m", "pocketfed.cli", *map(str, arguments)], cwd=ROOT / "tests", text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        with child:
            try:
                yield child
            finally:
                child.kill()
    finally:
        assert child.returncode is not None


def read_until(child: subprocess.Popen[str], wanted: str) -> str:
    assert child.stdout is not None
    for line in child.stdout:
        if wanted in line:
            return line.strip()
    raise AssertionError(f"the process ended without saying {wanted!r}: {child.stderr.read() if child.stderr else ''}")


def end(child: subprocess.Popen[str]) -> tuple[int, float, str]:
    """Exit code after SIGTERM, seconds until then, and stderr."""
    began = time.monotonic()
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=20)
    return child.returncode, time.monotonic() - began, err


def snapshot(folder: Path) -> dict[str, str]:
    """Every file by its content; folders too."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in sorted(folder.rglob("*"))
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(count: int) -> list[dict[str, Any]]:
    things = ("six", "lamp", "jazz", "noon", "hall", "rock", "dawn")
    intents = sorted(WORDS)
    return [
        {"text": f"{WORDS[intents[i % 3]]} {things[i % 7]}", "label": intents[i % 3], "user": f"u{i % 4}"}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 rows of three labels."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows_of(60))


@pytest.fixture(scope="module")
def student(data: Path) -> Path:
    folder = data.parent / "student"
    works("distill", "--corpus", data, "--preset", "nano", "--steps", 8, "--set", "vocab_size=200", "--out", folder)
    return folder


@pytest.fixture(scope="module")
def quantized(student: Path) -> Path:
    folder = student.with_name("quantized")
    works("quantize", student, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def artifact(quantized: Path, data: Path) -> Path:
    """An artifact's folder that trains the head only: quick to build."""
    folder, database = quantized.with_name("artifact"), quantized.with_name("first.db")
    works("publish", quantized, "--channel", "stable", "--database", database, "--labels", data, "--train", "head",
          "--out", folder)  # fmt: skip
    return folder


# ---- what works -----------------------------------------------------------------------------------------------------


def test_distill_writes_a_model_folder_and_says_what_it_is(data: Path, tmp_path: Path) -> None:
    arguments = ("distill", "--corpus", data, "--preset", "nano", "--steps", 8, "--set", "vocab_size=200", "--json")
    report = json.loads(works(*arguments, "--out", tmp_path / "one"))
    assert report["corpus"]["documents"] == 21, "60 rows, of 3 × 7 distinct texts"
    assert set(report["scores"]) >= {"teacher", "student"}
    assert {p.name for p in (tmp_path / "one").iterdir()} >= {"config.json", "model.safetensors", "vocab.txt"}
    works(*arguments, "--out", tmp_path / "two")
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two"), "the same seed gives the same bytes"


def test_quantize_says_how_much_smaller_the_model_became(student: Path, tmp_path: Path) -> None:
    report = json.loads(works("quantize", student, "--out", tmp_path / "int8", "--json"))
    assert report["bytes_before"] == (student / "model.safetensors").stat().st_size
    assert report["bytes_after"] == (tmp_path / "int8" / "model.safetensors").stat().st_size
    assert report["ratio"] == report["bytes_before"] / report["bytes_after"] > 2


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("mobilebert", 24_581_888),
        ("mobilebert-tiny", 15_485_696),
        ("ib-bert-large", 294_205_184),
        ("bert-base", 109_482_240),
    ],
)
def test_inspect_counts_a_preset(preset: str, parameters: int) -> None:
    report = json.loads(works("inspect", preset, "--json"))
    assert report["parameters"] == parameters
    assert report["bytes"]["fp32"] == 4 * parameters
    assert report["bytes"]["fp16"] == 2 * parameters
    assert parameters < report["bytes"]["int8"] < 1.1 * parameters
    assert f"{parameters:,}" in works("inspect", preset)


def test_inspect_prints_the_papers_sizes_beside_those_counted() -> None:
    rows = {row["name"]: row for row in json.loads(works("inspect", "--table", "--json"))}
    assert len(rows) == 8
    assert rows["mobilebert-paper"]["parameters"] == 25_359_104
    assert rows["mobilebert-paper"]["paper_parameters"] == 25_300_000
    assert rows["mobilebert"]["paper_parameters"] is None  # the paper lists the other wiring
    shown = works("inspect", "--table")
    assert "22.35" in shown
    assert "-0.7%" in shown


def test_inspect_tells_a_folder_by_its_config(quantized: Path) -> None:
    report = json.loads(works("inspect", quantized, "--json"))
    assert report["quantization"] == "int8"
    assert report["tokens"] == 128
    assert report["flops"] > 2 * 128 * 12_288, "at least two a weight and token in 12 matrices of 32 × 32"
    assert report["bytes_on_disk"] == sum(p.stat().st_size for p in quantized.iterdir())
    assert re.search(r"as it is stored .* int8, ", works("inspect", quantized))


def test_evaluate_fine_tunes_a_student_without_a_classifier(student: Path, data: Path) -> None:
    report = json.loads(works("evaluate", student, "--data", data, "--epochs", 1, "--train", "head", "--json"))
    assert report["fine_tuned"]
    assert (report["train_examples"], report["test_examples"]) == (48, 12)
    assert report["test_source"] == "held out"
    assert 0 <= report["accuracy"] <= 1
    assert report["majority_accuracy"] == pytest.approx(1 / 3)


def test_publish_releases_an_artifact_on_a_channel_and_the_same_artifact_again(artifact: Path, tmp_path: Path) -> None:
    database = tmp_path / "fleet.db"
    arguments = ("publish", artifact, "--channel", "beta", "--database", database, "--json")
    first, second = json.loads(works(*arguments)), json.loads(works(*arguments))
    content = (artifact / "manifest.json").read_bytes()
    assert first["version"] == second["version"] == hashlib.sha256(content).hexdigest()
    assert (first["release"], second["release"]) == (1, 2)
    assert (first["channel"], first["trainable_set"]) == ("beta", "head")
    assert first["bytes"] == sum(file["bytes"] for file in json.loads(content)["files"].values())


def without_seconds(path: Path) -> Any:
    report = json.loads(path.read_text())
    for row in report["rounds"]:
        assert row.pop("seconds") >= 0
    report["costs"] = {name: value for name, value in report["costs"].items() if name.startswith("bytes_")}
    return report


def test_simulate_writes_the_promised_json_and_the_same_for_the_same_seed(data: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        works("simulate", "--data", data, *NANO, "--seed", seed, "--json", tmp_path / name)
    raw = json.loads((tmp_path / "one").read_text())
    promised = {"round", "accuracy", "loss", "devices", "failed", "bytes_up", "bytes_down", "seconds"}
    assert [promised - set(row) for row in raw["rounds"]] == [set()] * 3
    assert [row["round"] for row in raw["rounds"]] == [0, 1, 2]
    assert [row["devices"] for row in raw["rounds"]] == [0, 3, 3]
    assert raw["final"]["test_examples"] == 12
    assert raw["final"]["accuracy"] == raw["rounds"][-1]["accuracy"]
    assert raw["model"]["preset"] == "nano"
    assert raw["seed"] == 5
    one, two, three = (without_seconds(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert one["final"]["parameters_sha256"] != three["final"]["parameters_sha256"]


@pytest.mark.parametrize("partition", ["iid", "dirichlet:0.5", "by:user"])
def test_simulate_keeps_the_run_in_a_database(data: Path, tmp_path: Path, partition: str) -> None:
    database = tmp_path / "fleet.db"
    out = works("simulate", "--data", data, *NANO, "--partition", partition, "--database", database)
    assert f"pocketfed dashboard --database {database}" in out
    with contextlib.closing(sqlite3.connect(database)) as connection:
        assert connection.execute("select status, rounds_planned from runs").fetchall() == [("finished", 2)]


def test_simulate_starts_from_a_distilled_folder_with_a_strategy_of_flower(quantized: Path, data: Path) -> None:
    model = ("--model", quantized, "--devices", 2, "--rounds", 1, "--train", "norms", "--strategy", "fedavg")
    assert "accuracy" in works("simulate", "--data", data, *model)


def test_hostile_rows_are_used_or_counted_and_never_fatal(tmp_path: Path) -> None:
    hostile = [
        {"text": "play \0some\0 jazz", "label": "music"}, {"text": "🎺🎷 👩🏽‍🚀 ‮play‬", "label": "music"},
        {"text": "wake " * 20_000, "label": "alarm"}, {"text": "\0 \0", "label": "alarm"},
        {"text": "x" * 1_000_001, "label": "alarm"}, {"text": "no label"}, {"text": "dim", "label": "l" * 201},
        {"text": 7, "label": "music"},
    ]  # fmt: skip
    folder = tmp_path / "hostile"
    folder.mkdir()
    write_rows(folder / "train.jsonl", rows_of(30) + hostile)
    with (folder / "train.jsonl").open("a") as stream:
        stream.write("{not json\n")
    write_rows(folder / "test.jsonl", [*rows_of(9), {"text": "what is this", "label": "never seen"}])
    out = works("simulate", "--data", folder, *NANO, "--json", tmp_path / "out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["skipped"] == {
        "empty text": 1, "text over 1,000,000 characters": 1, "missing label": 1, "label over 200 characters": 1,
        "text is not a string": 1, "not a JSON object": 1, "label not in train": 1,
    }  # fmt: skip
    assert "skipped 7 rows: " in out
    assert report["final"]["test_examples"] == 9
    assert report["rounds"][-1]["devices"] == 3


def test_the_longest_name_of_a_file_is_no_mistake(tmp_path: Path) -> None:
    data = write_rows(tmp_path / f"{'n' * 240}.jsonl", rows_of(30))
    assert "accuracy" in works("simulate", "--data", data, *NANO)


# ---- processes ------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_serve_and_a_device_go_through_a_run_and_end(artifact: Path, data: Path, tmp_path: Path) -> None:
    database, result = tmp_path / "fleet.db", tmp_path / "rounds.json"
    works("publish", artifact, "--channel", "stable", "--database", database)
    (tmp_path / "run.toml").write_text('name = "tiny"\nrounds = 2\nmin_devices = 1\nseed = 3\n')
    serving = (
        "serve", "--database", database, "--listen", "127.0.0.1:0", "--run", tmp_path / "run.toml", "--exit-when-done",
        "--set", f"test_data={data}", "--json", result,
    )  # fmt: skip
    with process(*serving) as coordinator:
        address = read_until(coordinator, "listening on ").removeprefix("listening on ")
        with process(
            "device", "--coordinator", address, "--data", data, "--home", tmp_path / "home", "--name", "ann"
        ) as member:
            assert read_until(member, "ann: ") == "ann: 60 labelled examples"
            out, err = coordinator.communicate(timeout=60)
            assert (coordinator.returncode, err) == (0, ""), out
            assert end(member)[::2] == (0, "")
    report = json.loads(result.read_text())
    ended = [(row["round"], row["devices"], row["failed"]) for row in report["rounds"]]
    assert ended == [(0, 0, 0), (1, 1, 0), (2, 1, 0)]
    assert report["seed"] == 3


def test_a_device_without_coordinator_says_so_keeps_trying_and_ends_when_told(data: Path, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with process("device", "--coordinator", address, "--data", data, "--home", tmp_path / "home") as member:
        told = read_until(member, "will try again: ")
        assert f"the coordinator at {address} cannot be reached" in told
        assert "is it running" in told
        with process("serve", "--database", tmp_path / "fleet.db", "--listen", address) as coordinator:
            read_until(coordinator, "listening on ")
            assert read_until(member, "waiting for work") == "waiting for work"  # it went on trying
        assert member.poll() is None
        code, seconds, err = end(member)
    assert (code, err) == (0, "")
    assert seconds < 10


def test_the_dashboard_answers_and_ends_when_told(tmp_path: Path, data: Path) -> None:
    database, port = tmp_path / "fleet.db", free_port()
    works("simulate", "--data", data, *NANO, "--database", database)
    with process("dashboard", "--database", database, "--port", port) as shown:
        assert read_until(shown, "dashboard on ") == f"dashboard on http://127.0.0.1:{port}"
        read_until(shown, "URL")  # Streamlit says so once it listens
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{port}/_stcore/health", timeout=10) as answer:
            assert answer.read() == b"ok"
        assert end(shown)[0] == 0


# ---- what is promised -----------------------------------------------------------------------------------------------


def options(command: str) -> set[str]:
    import typer

    from pocketfed.cli.commands import app
    from pocketfed.cli.device import parser

    if command == "device":
        return {name for action in parser()._actions for name in action.option_strings}
    group: Any = typer.main.get_command(app)
    return {name for parameter in group.commands[command].params for name in parameter.opts}


@pytest.mark.parametrize("command", PROMISED)
def test_a_command_has_every_promised_option(command: str) -> None:
    assert set(PROMISED[command].split()) - options(command) == set()


@pytest.mark.parametrize("document", ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_documents_name_only_commands_and_options_that_exist(document: str) -> None:
    import typer

    from pocketfed.cli.commands import app

    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    used = [shlex.split(line, comments=True) for line in lines if line.strip().startswith("pocketfed ")]
    if document == "README.md":
        assert len(used) >= 7
    for _, *rest in used:
        if rest[0] == "device":
            assert {w.split("=")[0] for w in rest if w.startswith("--")} <= options("device"), document
            continue
        command: Any = typer.main.get_command(app)
        while hasattr(command, "commands"):  # `release promote` is a command of a command
            assert rest[0] in command.commands, f"{document}: pocketfed {rest[0]}"
            command = command.commands[rest.pop(0)]
        given = {word.split("=")[0] for word in rest if word.startswith("--")}
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert given <= known, f"{document}: {command.name} {given - known}"


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, student: Path, artifact: Path, data: Path) -> Path:
    """A folder with one of everything that is wrong, and `rows.jsonl`, `student`, `artifact`, which are right."""
    folder = tmp_path_factory.mktemp("bad")
    shutil.copy(data, folder / "rows.jsonl")
    for name, good in (("student", student), ("artifact", artifact)):
        shutil.copytree(good, folder / name)
    (folder / "empty.csv").touch()
    (folder / "no-text.csv").write_text("a,b\n1,2\n")
    (folder / "one-label.csv").write_text("text,label\n" + "play,music\n" * 9)
    (folder / "binary.csv").write_bytes(bytes(range(256)))
    shutil.copytree(student, folder / "flipped")
    flip(folder / "flipped" / "model.safetensors", 12)  # in the header
    shutil.copytree(student, folder / "truncated")
    os.truncate(folder / "truncated" / "model.safetensors", 5000)
    shutil.copytree(artifact, folder / "damaged")
    flip(folder / "damaged" / "train-head.onnx", 100)
    shutil.copytree(artifact, folder / "incomplete")
    (folder / "incomplete" / "tokenize.onnx").unlink()
    (folder / "not-a-model").mkdir()
    (folder / "not-a-model" / "thesis.txt").write_text("years of work")
    (folder / "text.db").write_text("this is no database\n" * 100)
    shutil.copy(artifact.with_name("first.db"), folder / "newer.db")
    with contextlib.closing(sqlite3.connect(folder / "newer.db")) as connection, connection:
        connection.execute("update alembic_version set version_num = '9999'")
    (folder / "bad.toml").write_text("rounds = [")
    (folder / "strategy.toml").write_text('strategy = "FedNope"\n')
    return folder


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


SIMULATE = "simulate --model nano --rounds 1 --devices 2 --database fresh.db --json fresh.json"
PUBLISH = "publish student --channel stable --labels a,b --train head --out fresh"
BAD: dict[str, tuple[int, str, tuple[str, ...]]] = {  # exit code, command, what the sentence must name
    "missing data": (1, f"{SIMULATE} --data gone.csv", ("gone.csv", "does not exist", "give")),
    "missing data for a device": (
        1, "device --coordinator 127.0.0.1:1 --home fresh --data gone.csv", ("gone.csv", "does not exist", "give")),
    "empty file": (1, f"{SIMULATE} --data empty.csv", ("empty.csv", "is empty", "give")),
    "no text column": (1, f"{SIMULATE} --data no-text.csv", ("no-text.csv", "no text column", "name one")),
    "one label": (1, f"{SIMULATE} --data one-label.csv", ("one-label.csv", "'music'", "at least two")),
    "binary data": (1, f"{SIMULATE} --data binary.csv", ("binary.csv", "UTF-8", "save")),
    "missing corpus": (1, "distill --corpus gone.txt --out fresh", ("gone.txt",)),
    "empty corpus": (1, "distill --corpus empty.csv --out fresh", ("empty.csv",)),
    "flipped weights": (1, "inspect flipped", ("flipped/model.safetensors", "damaged", "again")),
    "truncated weights": (1, "quantize truncated --out fresh", ("truncated/model.safetensors", "damaged", "again")),
    "damaged model to evaluate": (1, "evaluate truncated --data rows.jsonl", ("truncated", "damaged", "again")),
    "damaged model to simulate": (1, f"{SIMULATE} --data rows.jsonl --model truncated", ("truncated", "damaged")),
    "damaged model to publish": (1, "publish truncated --channel c --database fresh.db --labels a,b", ("damaged",)),
    "damaged artifact": (
        1, "publish damaged --channel c --database fresh.db", ("damaged/train-head.onnx", "damaged", "again")),
    "incomplete artifact": (
        1, "publish incomplete --channel c --database fresh.db", ("incomplete", "tokenize.onnx", "again")),
    "no model folder": (1, "evaluate not-a-model --data rows.jsonl", ("not-a-model", "config.json", "check")),
    "no preset to distill": (
        1, "distill --corpus rows.jsonl --preset nanoo --out fresh", ("'nanoo'", "'nano'", "micro")),
    "nothing to inspect": (1, "inspect", ("preset", "--table")),
    "no preset to inspect": (1, "inspect nanoo", ("'nanoo'", "'nano'", "folder")),
    "no preset to simulate": (1, f"{SIMULATE} --data rows.jsonl --model nanoo", ("'nanoo'", "'nano'", "micro")),
    "no such setting": (
        1, "distill --corpus rows.jsonl --out fresh --set colour=red", ("'colour'", "set KEY")),
    "setting without value": (1, "distill --corpus rows.jsonl --out fresh --set colour", ("'colour'", "KEY=VALUE")),
    "no scheme": (1, "quantize student --out fresh --scheme int3", ("'int3'", "int8")),
    "no partition": (1, f"{SIMULATE} --data rows.jsonl --partition fair", ("'fair'", "iid, dirichlet:ALPHA")),
    "no alpha": (1, f"{SIMULATE} --data rows.jsonl --partition dirichlet:0", ("'dirichlet:0'", "above 0")),
    "no column": (1, f"{SIMULATE} --data rows.jsonl --partition by:city", ("'city'", "label, user")),
    "no strategy": (1, f"{SIMULATE} --data rows.jsonl --strategy FedNope", ("'FedNope'", "FedAvg")),
    "no option of a strategy": (
        1, f"{SIMULATE} --data rows.jsonl --set strategy_options.eta=1", ("'eta'", "StreamingFedAvg")),
    "no trainable set": (1, f"{SIMULATE} --data rows.jsonl --train tail", ("'tail'", "head, norms")),
    "rank too large": (1, f"{SIMULATE} --data rows.jsonl --train lora:999", ("999", "exceeds")),
    "no such label": (1, "publish student --channel c --database fresh.db --labels a", ("'a'", "two labels")),
    "no labels": (1, "publish student --channel c --database fresh.db", ("student", "--labels")),
    "long channel": (1, f"{PUBLISH} --database fresh.db --channel {'c' * 101}", ("ccc", "100 characters")),
    "no devices": (2, f"{SIMULATE} --data rows.jsonl --devices 0", ("'--devices'", "simulate --help")),
    "devices are a number": (2, f"{SIMULATE} --data rows.jsonl --devices many", ("'--devices'", "'many'")),
    "no data": (2, SIMULATE, ("'--data'", "simulate --help")),
    "no such option": (2, "inspect nano --jsn", ("--jsn", "inspect --help")),
    "no such command": (2, "simulat", ("'simulat'", "pocketfed --help")),
    "too many devices": (1, f"{SIMULATE} --data rows.jsonl --devices 999", ("999 devices", "at most 48")),
    "place is taken, distill": (
        1, "distill --corpus rows.jsonl --out not-a-model", ("not-a-model", "thesis.txt", "new or an empty")),
    "place is taken, quantize": (1, "quantize student --out not-a-model", ("not-a-model", "thesis.txt")),
    "place is taken, publish": (
        1, f"{PUBLISH} --database fresh.db --out not-a-model", ("not-a-model", "does not exist")),
    "json into nowhere": (1, f"{SIMULATE} --data rows.jsonl --json gone/r.json", ("gone/r.json", "create it")),
    "json is a folder": (1, f"{SIMULATE} --data rows.jsonl --json student", ("student", "name a file")),
    "json into nowhere, serve": (1, "serve --database fresh.db --json gone/r.json", ("gone/r.json", "create it")),
    "no run file": (1, "serve --database fresh.db --run gone.toml", ("gone.toml", "give a TOML file")),
    "bad run file": (1, "serve --database fresh.db --run bad.toml", ("bad.toml", "not TOML")),
    "bad strategy in a run file": (1, "serve --database fresh.db --run strategy.toml", ("'FedNope'", "FedAvg")),
    "no test data of a run": (1, "serve --database fresh.db --set test_data=gone.csv", ("gone.csv", "does not exist")),
    "no such run setting": (1, "serve --database fresh.db --set colour=red", ("colour", "rounds")),
    "no port": (1, "serve --database fresh.db --listen here", ("'here'", "HOST:PORT")),
    "not our address": (1, "serve --database fresh.db --listen 192.0.2.1:8765", ("192.0.2.1:8765", "choose another")),
}  # fmt: skip
for _name, (_database, _told) in {
    "newer": ("newer.db", ("newer.db", "9999", "upgrade pocketfed")),
    "lost": ("gone/fleet.db", ("gone", "does not exist", "create it")),
    "text": ("text.db", ("text.db", "not a database", "check")),
    "strange": ("nosql://x", ("nosql", "is not a database URL", "use")),
}.items():
    for _command in (f"{SIMULATE} --data rows.jsonl", PUBLISH, "serve --listen 127.0.0.1:0", "dashboard"):
        BAD[f"{_name} database, {_command.split()[0]}"] = (1, f"{_command} --database {_database}", _told)


def refused(ran: Ran, code: int, told: tuple[str, ...]) -> None:
    """One sentence on one line, naming the thing and the remedy."""
    assert ran.code == code, ran
    assert ran.err.startswith("pocketfed: ")
    assert ran.err.count("\n") == 1
    assert ran.err.endswith("\n")
    assert [words for words in told if words not in ran.err] == [], ran.err
    assert not re.search(r"Traceback|unexpected|[╭│]", ran.err), ran.err
    assert len(ran.err) < 500


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_sentence_and_leaves_nothing_behind(
    case: str, bad: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, command, told = BAD[case]
    monkeypatch.chdir(bad)
    before = snapshot(bad)
    refused(pocketfed(*command.split()), code, told)
    assert snapshot(bad) == before


@pytest.mark.parametrize("command", ["serve --listen 127.0.0.1:{}", "dashboard --port {}"])
def test_a_busy_port_is_named(command: str, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ran = pocketfed(*command.format(port).split(), "--database", tmp_path / "fresh.db")
    refused(ran, 1, (f"127.0.0.1:{port}", "already in use", "choose another port"))
    assert snapshot(tmp_path) == {}


def test_an_error_of_no_kind_that_we_know_is_one_line_too() -> None:
    from pocketfed.cli.main import explain

    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: [][1], "unexpected IndexError: list index out of range; POCKETFED_TRACEBACK=1 shows where"),
        (lambda: open("/no/such/file"), "No such file or directory: /no/such/file"),  # noqa: SIM115
        (lambda: int("two\nlines"), "unexpected ValueError: invalid literal for int() with base 10: 'two\\nlines'"),
    ]
    for fail, told in cases:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            fail()
        assert explain(caught.value).startswith(told)
        assert "\n" not in explain(caught.value)


def test_a_corpus_may_be_several_paths_after_one_option(tmp_path: Path) -> None:
    for name, word in (("a.txt", "line"), ("b.txt", "word")):
        (tmp_path / name).write_text(f"one small {word}\nanother {word} here\n")
    arguments = ["distill", "--corpus", str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), "--out", str(tmp_path / "s")]
    done = subprocess.run(
        [sys.executable, "-m", "pocketfed.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "b.txt holds 4 distinct sentences" in done.stderr  # those of both
