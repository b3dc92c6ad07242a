"""The whole path once, on one machine: distill, quantize, publish, and a fleet of real SDK processes over loopback gRPC."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketfed.cli.output import (
    ROUND_COLUMNS,
    console,
    format_bytes,
    print_table,
    progress_bar,
    sizes_rows,
    stage_teller,
)
from pocketfed.model.shipped import FOLDER, SHIPPED
from pocketfed.model.tasks import Dataset, majority_accuracy, read_dataset
from pocketfed.simulations.data import assistant_corpus, assistant_dataset, write_dataset
from pocketfed.simulations.partition import partition

DEVICES, SEED = 4, 0
PRESET = "nano"


@dataclass(frozen=True)
class Student:
    """What the devices start from, and what of it they train at which rate."""

    model: str
    trainable_set: str
    learning_rate: float


class DemoError(RuntimeError):
    """A step of the demo that did not do what it should; its log says more."""


def run_demo(folder: Path, rounds: int, distill: bool, steps: int | None, data: Path | None = None) -> None:
    """Everything the demo writes lies in `folder`; an earlier demo there is replaced.

    Args:
        distill: make a student from the data's own text first, in `steps`; else the shipped one is published.
        data: labelled texts in place of the demo's own; its training texts are the corpus as well.

    Raises:
        DataError: from `data`. DemoError: the folder is somebody's own, or a step failed.
    """
    started = time.monotonic()
    out = console()
    folder = folder.absolute()

    out.rule("1  the data")
    if data is None:
        dataset, lines = assistant_dataset(seed=SEED), assistant_corpus(seed=SEED)
    else:
        dataset = read_dataset(data).with_test(seed=SEED)
        lines = [text for e in dataset.train for text in (e.text, e.text_pair) if text]
    make_folder(folder)
    by_person = all(e.user for e in dataset.train) and len({e.user for e in dataset.train}) >= DEVICES
    files = write_device_files(dataset, folder, "by:user" if by_person else "dirichlet:0.3")
    out.print(
        f"{len(dataset.train)} texts with {len(dataset.labels)} labels, dealt to {DEVICES} devices "
        f"{'by person' if by_person else 'with skewed labels'}; {len(dataset.test)} others for the test."
    )
    out.print(f"Always guessing the commonest intent is right in {majority_accuracy(dataset):.1%} of them.")

    out.rule("2  distill and quantize, on the coordinator" if distill else "2  the student that comes with the package")
    student = make_student(folder, lines, steps) if distill else shipped_student()

    out.rule("3  publish, and serve over gRPC")
    database = folder / "fleet.db"
    published = run_json(
        "publish",
        student.model,
        "--channel",
        "stable",
        "--database",
        str(database),
        "--labels",
        str(folder / "data"),
        "--train",
        student.trainable_set,
    )
    out.print(f"artifact {published['version'][:12]}: {format_bytes(published['bytes'])}, released on channel 'stable'")

    out.rule(f"4  {DEVICES} device processes fine-tune; their text stays with them")
    rows = run_fleet(folder, database, files, rounds, student.learning_rate)
    print_table("rounds", list(ROUND_COLUMNS), rows)
    out.print(f"\nDone in {time.monotonic() - started:.0f} s. See it in the browser:")
    out.print(f"  {Path(sys.executable).with_name('pocketfed')} dashboard --database {database}", style="bold")


def make_folder(folder: Path) -> None:
    """An empty folder with the demo's mark; one without the mark is somebody's own and stays.

    Raises:
        DemoError: the folder holds something else.
    """
    mark = folder / ".pocketfed-demo"
    if folder.exists() and not mark.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise DemoError(f"{folder} is there and not from an earlier demo; give another --folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark.touch()


def write_device_files(dataset: Dataset, folder: Path, deal: str) -> list[Path]:
    """One file a device, as an app on it would have collected; and the data set for the coordinator's test."""
    write_dataset(dataset, folder / "data")
    files = []
    for i, part in enumerate(partition(dataset.train, deal, DEVICES, SEED)):
        path = folder / f"device-{i}.jsonl"
        mine = [dataset.train[j] for j in part]
        rows = ({"text": e.text, "label": e.label} | ({"text_pair": e.text_pair} if e.text_pair else {}) for e in mine)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(path)
    return files


def shipped_student() -> Student:
    """The package's own student, as it is: eight bits, and only a little of it to train."""
    from pocketfed.coordinator import pipeline

    seen = pipeline.inspect(SHIPPED)
    console().print(
        f"{seen['parameters']:,} parameters, distilled from a pre-trained BERT and quantized; its card is {FOLDER / 'README.md'}"
    )
    print_table("student", ["weights", "bytes", ""], sizes_rows(seen["bytes"]))
    return Student(SHIPPED, "head", 0.01)


def make_student(folder: Path, lines: Sequence[str], steps: int | None) -> Student:
    """Distill from unlabelled text, then quantize."""
    from pocketfed.coordinator import distilling, pipeline

    corpus = folder / "corpus.txt"
    corpus.write_text("".join(" ".join(line.split()) + "\n" for line in lines))
    with progress_bar() as bar:
        report = distilling.distill([corpus], PRESET, folder / "student", steps, SEED, progress=stage_teller(bar))
    teacher, student = report["teacher_parameters"], report["model"]["parameters"]
    console().print(
        f"teacher {teacher:,} parameters -> student {student:,}; hidden words guessed: teacher "
        f"{report['scores']['teacher']['accuracy']:.1%}, student {report['scores']['student']['accuracy']:.1%}"
    )
    pipeline.quantize(folder / "student", folder / "student-int8")
    print_table("student", ["weights", "bytes", ""], sizes_rows(report["model"]["bytes"]))
    return Student(str(folder / "student-int8"), "full", 0.003)


def run_fleet(
    folder: Path, database: Path, files: Sequence[Path], rounds: int, learning_rate: float
) -> list[list[str]]:
    """A coordinator process and one process a device, until the run has ended. Returns the rounds as table rows."""
    (folder / "run.toml").write_text(
        f'name = "demo"\nrounds = {rounds}\nround_schedule = "linear"\nmin_devices = {len(files)}\nseed = {SEED}\n'
        f"test_data = {json.dumps(str(folder / 'data' / 'test.jsonl'))}\n"
        f"lease_s = 10.0\n\n[local]\nepochs = 1\nbatch_size = 16\nlearning_rate = {learning_rate}\n"
    )
    serve = [
        "serve",
        "--database",
        str(database),
        "--listen",
        "127.0.0.1:0",
        "--run",
        str(folder / "run.toml"),
        "--exit-when-done",
    ]
    rows: list[list[str]] = []
    with process(folder / "coordinator.log", *serve, read=True) as coordinator, progress_bar() as bar:
        address = wait_for(coordinator, "listening on ", folder / "coordinator.log").removeprefix("listening on ")
        members = [
            process(
                folder / f"device-{i}.log",
                "device",
                "--coordinator",
                address,
                "--data",
                str(file),
                "--home",
                str(folder / f"home-{i}"),
                "--name",
                f"device-{i:03d}",
            )
            for i, file in enumerate(files)
        ]
        with ExitStack() as fleet:
            for member in members:
                fleet.enter_context(member)
            task = bar.add_task("rounds", total=rounds, note="")
            for line in lines_of(coordinator, folder / "coordinator.log"):
                cells = round_row(line)
                if cells:
                    rows.append(cells)
                    bar.update(task, completed=int(cells[0]), note=f"accuracy {cells[1]}")
            if coordinator.wait() != 0:
                raise DemoError(f"the coordinator ended early; see {folder / 'coordinator.log'}")
    return rows


def round_row(line: str) -> list[str] | None:
    """A printed round as cells: sizes are a number and a unit."""
    words = line.split()
    if len(words) < 10 or not words[0].isdigit():
        return None
    return [*words[:5], f"{words[5]} {words[6]}", f"{words[7]} {words[8]}", words[9]]


# ---- processes -------------------------------------------------------------------------------------------------------------


def pocketfed(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pocketfed.cli", *arguments]


def run_json(*arguments: str) -> Any:
    """A command's JSON.

    Raises:
        DemoError: it failed; the message is its own.
    """
    done = subprocess.run(pocketfed(*arguments, "--json"), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DemoError(done.stderr.strip() or f"pocketfed {arguments[0]} failed")
    return json.loads(done.stdout)


@contextmanager
def process(log: Path, *arguments: str, read: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A command under way, ended in good order when the block is left."""
    with log.open("w") as stream:
        child = subprocess.Popen(
            pocketfed(*arguments),
            stdout=subprocess.PIPE if read else stream,
            stderr=subprocess.STDOUT if read else stream,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        )
        try:
            yield child
        finally:
            if child.poll() is None:
                child.terminate()
            child.wait()
            if child.stdout is not None:
                child.stdout.close()


def lines_of(child: subprocess.Popen[str], log: Path) -> Iterator[str]:
    """What a process prints, line by line, kept in its log too."""
    assert child.stdout is not None
    with log.open("a") as stream:
        for line in child.stdout:
            stream.write(line)
            stream.flush()
            yield line.rstrip("\n")


def wait_for(child: subprocess.Popen[str], beginning: str, log: Path) -> str:
    """The first line that begins so.

    Raises:
        DemoError: the process ended before.
    """
    for line in lines_of(child, log):
        if line.startswith(beginning):
            return line
    raise DemoError(f"the coordinator did not start; see {log}")
