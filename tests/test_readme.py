"""What the README promises is run, as it stands there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pocketfed.coordinator.artifacts import publish_artifact
from pocketfed.coordinator.server import CoordinatorServer, ServerConfig
from pocketfed.coordinator.store import Store

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
WAIT_S = 60


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(block: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("pocketfed ")]


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "pocketfed.cli", *arguments[1:]],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_S * 4,
    )
    assert done.returncode == 0, done.stderr
    return done


@contextmanager
def running(arguments: list[str], folder: Path, log: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with (folder / log).open("w") as stream:
        child = subprocess.Popen(
            [sys.executable, "-m", "pocketfed.cli", *arguments[1:]],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            env=environment,
        )
        try:
            yield child
        finally:
            child.terminate()
            child.wait(WAIT_S)
            assert child.stdout is not None
            child.stdout.close()


def until(child: subprocess.Popen[str], text: str) -> str:
    """The first line that holds the text."""
    assert child.stdout is not None
    for line in child.stdout:
        if text in line:
            return line
    raise AssertionError(f"{child.args} ended without saying {text!r}")


def with_option(arguments: list[str], name: str, value: str) -> list[str]:
    place = arguments.index(name)
    return [*arguments[: place + 1], value, *arguments[place + 2 :]]


def test_the_ten_lines_on_a_device_run_as_written(tmp_path, monkeypatch, nano_built, tiny_dataset):
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    store = Store(str(tmp_path / "fleet.db"))
    with store.write() as session:
        publish_artifact(session, nano_built, "stable")
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    with CoordinatorServer(store, ServerConfig("127.0.0.1:0")) as server:
        code = example.replace("127.0.0.1:8765", f"127.0.0.1:{server.port}")
        assert code != example
        names: dict[str, object] = {"print": lambda text: said.append(str(text))}
        exec(compile(code, "README.md", "exec"), names)
        names["device"].close()  # type: ignore[attr-defined]
    store.close()
    assert said[0] in nano_built.manifest["labels"]
    assert len(said) == 2
    assert said[1]


@pytest.mark.slow
def test_the_commands_for_a_fleet_run_as_written(tmp_path):
    from pocketfed.simulations.data import assistant_dataset

    rows = [e for e in assistant_dataset(seed=1).train if e.label in ("play_music", "set_alarm")][:60]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"text": e.text, "label": e.label}) + "\n" for e in rows))
    (toml,) = blocks("toml")
    (tmp_path / "run.toml").write_text(toml)
    (block,) = [b for b in blocks("sh") if "pocketfed publish" in b]
    publish, serve, device, dashboard = commands(block)

    run(publish, tmp_path)
    serve = [*with_option(serve, "--listen", "127.0.0.1:0"), "--set", "rounds=2", "--exit-when-done"]
    with running(serve, tmp_path, "serve.log") as coordinator:
        address = until(coordinator, "listening on").split()[-1]
        first = with_option(device, "--coordinator", address)
        second = with_option(first, "--home", "home-2")
        with running(first, tmp_path, "first.log"), running(second, tmp_path, "second.log"):
            assert "released on 'stable'" in until(coordinator, "finished")
            assert coordinator.wait(WAIT_S) == 0
    with running([*dashboard, "--port", str(free_port())], tmp_path, "dashboard.log") as board:
        assert "http://127.0.0.1:" in until(board, "dashboard on")


@pytest.mark.slow
def test_a_student_of_ones_own_is_made_as_written(tmp_path):
    import transformers

    from pocketfed.model.tokenization import train_vocabulary
    from pocketfed.simulations.data import assistant_corpus

    lines = assistant_corpus(seed=1, lines=300)
    (tmp_path / "TEXT").mkdir()
    (tmp_path / "TEXT" / "corpus.txt").write_text("\n".join(lines) + "\n")
    words = train_vocabulary(lines, 300)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 48}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path / "BERT")
    words.save(tmp_path / "BERT" / "vocab.txt")
    (block,) = [b for b in blocks("sh") if "pocketfed distill" in b]
    distill, quantize = commands(block)
    assert "cosine" in run([*distill, "--steps", "3"], tmp_path).stdout
    run(quantize, tmp_path)
    assert (tmp_path / "student-int8" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_simulation_runs_as_written(tmp_path):
    from pocketfed.simulations.data import assistant_dataset, write_dataset

    write_dataset(assistant_dataset(seed=1, users=6, utterances_per_user=40, test_utterances=50), tmp_path / "DATA")
    ((arguments,),) = [commands(b) for b in blocks("sh") if "pocketfed simulate" in b]
    done = run(with_option(arguments, "--rounds", "1"), tmp_path)
    assert "accuracy" in done.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["rounds"]) == 2
    assert result["final"]["test_examples"] == 50


def test_the_evaluation_runs_as_written(tmp_path):
    from pocketfed.simulations.data import assistant_dataset, write_dataset

    write_dataset(assistant_dataset(seed=1, users=4, utterances_per_user=20, test_utterances=20), tmp_path / "DATA")
    ((arguments,),) = [commands(b) for b in blocks("sh") if "pocketfed evaluate" in b]
    assert arguments[2:4] == ["shipped", "--data"]
    arguments[2] = "nano"  # quicker, and so is a smaller one beside it
    done = run(with_option(with_option(arguments, "--seeds", "0,1"), "--from-scratch", "micro"), tmp_path)
    assert "accuracy" in done.stdout
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) >= 2
    assert "TF-IDF" in (tmp_path / "rows.md").read_text()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_every_file_that_the_documents_link_to_is_there():
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#\s]+)\)", document.read_text()):
            assert target.startswith("http") or (document.parent / target).exists(), (
                f"{document.name} links to {target}"
            )
