"""From spooled updates to one: CPU time and memory, ours against Flower's stock FedAvg on the same bytes, interleaved.

    python benchmarks/aggregation.py --devices 1000 --mb 0.35 --repeats 5
    python benchmarks/aggregation.py --devices 1000 --mb 1 --memory

"sum": what arithmetic takes, from files to new parameters, finiteness and norms included. "ours": the same through Flower's
messages, the screen and StreamingFedAvg. "grid": all that the coordinator does once the last update is in, so with the
database, too: SQLite with a row a device. "Flower": the same values as the 96 tensors that a Flower client sends, through
stock FedAvg with its list of replies, no database and no check of what they hold. CPU seconds of this process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import sqlalchemy as sa

from pocketfed.coordinator import flwr_compat

# isort: split
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict

from pocketfed.coordinator.aggregation import Delta, RunningMean, apply, norm
from pocketfed.coordinator.assignments import Assignments
from pocketfed.coordinator.config import RunConfig
from pocketfed.coordinator.grid import Cohort, FleetGrid
from pocketfed.coordinator.screening import Tally, screen
from pocketfed.coordinator.store import Artifact, Assignment, Run, Store, Update, device_named
from pocketfed.coordinator.strategy import THETA, DeltaArray, make_strategy
from pocketfed.coordinator.validation import Limits
from pocketfed.model.parameters import Vector, encode_vector

TENSORS = 96  # that Flower's clients send a model as: a LoRA set has about as many
DISTINCT = 100  # different updates; the spool holds a file for every device all the same


def write_spool(folder: Path, devices: int, size: int) -> tuple[list[Path], list[Path]]:
    """The same updates as our devices upload them and as Flower's arrays, one file a device each."""
    generator = np.random.default_rng(0)
    rows = [(0.01 * generator.standard_normal(size)).astype(np.float32) for _ in range(min(devices, DISTINCT))]
    ours, flowers = [], []
    for i in range(devices):
        ours.append(folder / f"{i}.update")
        ours[-1].write_bytes(encode_vector("delta", rows[i % len(rows)]))
        flowers.append(folder / f"{i}.npy")
        flowers[-1].write_bytes(b"".join(Array(part).data for part in np.split(rows[i % len(rows)], TENSORS)))
    return ours, flowers


@cache
def asked(i: int) -> Message:
    """What a reply is to; the round has made them long before the first update comes."""
    return flwr_compat.name_message(Message(RecordDict(), i + 1, MessageType.TRAIN), f"d{i}")


def reply(i: int, arrays: ArrayRecord, update: ConfigRecord | None = None) -> Message:
    metrics = MetricRecord({"num-examples": 10 + i % 7, "loss": 1.0, "accuracy": 0.5})
    content = {"arrays": arrays, "metrics": metrics} | ({} if update is None else {"update": update})
    return Message(RecordDict(content), reply_to=asked(i))


def ours(paths: list[Path], theta: Vector) -> Vector:
    def replies() -> Iterator[Message]:
        for i, path in enumerate(paths):
            arrays = ArrayRecord()
            arrays[THETA] = DeltaArray(theta, Delta(path, len(theta)))
            yield reply(i, arrays, ConfigRecord({"bytes": 0, "digest": str(i)}))

    passed = screen(replies(), theta, Limits.of(len(theta), RunConfig()), Tally())
    arrays, _ = make_strategy("StreamingFedAvg", {}).aggregate_train(1, passed)
    return np.asarray(arrays[THETA].numpy())


def asked_of_all(folder: Path, paths: list[Path], theta: Vector) -> FleetGrid:
    """A coordinator's grid in whose database every device was asked, and has handed in its file."""
    store = Store(str(folder / "fleet.db"))
    with store.write() as session:
        session.add(Artifact(version="v", manifest={"trainable_sets": {"s": {"size": len(theta)}}}, bytes=0))
        session.flush()
        made = Run(name="r", channel="c", config={}, artifact_version="v", trainable_set="s", seed=0, rounds_planned=1)
        session.add(made)
        session.flush()
        run_id, nodes = made.id, {device_named(session, f"d{i:05}").id: f"d{i:05}" for i in range(len(paths))}
    grid = FleetGrid(Assignments(store, folder / "spool"), run_id, dict, len(theta), lease_s=3600.0)
    grid.enter(Cohort(1, 1, nodes))
    content = RecordDict({"arrays": ArrayRecord({THETA: Array(theta)}), "config": ConfigRecord({"server-round": 1})})
    ids = list(grid.push_messages(Message(content, node, MessageType.TRAIN) for node in nodes))
    for status in ("accepted", "uploaded"):
        with store.write() as session:
            for row in session.scalars(sa.select(Assignment)).all():
                row.status = status
    told = {"loss": 1.0, "accuracy": 0.5}
    with store.write() as session:
        for i, row_id in enumerate(ids):
            session.add(Update(assignment_id=row_id, num_examples=10 + i % 7, bytes=0, digest=str(i), metrics=told))
    for row_id, path in zip(ids, paths, strict=True):
        os.link(path, grid.assignments.upload_path(row_id))
    return grid


def whole(grid: FleetGrid, theta: Vector) -> Vector:
    passed = screen(grid.replies(dict(grid._sent)), theta, Limits.of(len(theta), RunConfig()), Tally())
    arrays, _ = make_strategy("StreamingFedAvg", {}).aggregate_train(1, passed)
    return np.asarray(arrays[THETA].numpy())


def bare(paths: list[Path], theta: Vector) -> Vector:
    running = RunningMean(len(theta))
    for i, path in enumerate(paths):
        delta = Delta(path, len(theta))
        assert np.isfinite(norm(delta.raw()))
        running.add(delta, 10 + i % 7)
    return apply(theta, running.result())


def flowers(paths: list[Path], theta: Vector) -> Vector:
    """The tensors of a file lie one after another, of equal length, each as Flower serializes it."""

    def arrays_of(path: Path) -> ArrayRecord:
        data = path.read_bytes()
        step = len(data) // TENSORS
        shape = (len(theta) // TENSORS,)
        parts = (data[i * step : (i + 1) * step] for i in range(TENSORS))
        return ArrayRecord({f"{i:03}": Array("float32", shape, "numpy.ndarray", part) for i, part in enumerate(parts)})

    replies = [reply(i, arrays_of(path)) for i, path in enumerate(paths)]
    arrays, _ = make_strategy("FedAvg", {}).aggregate_train(1, replies)
    return theta + np.concatenate([arrays[name].numpy() for name in sorted(arrays)]).astype(np.float32)


def measure_cpu(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return 1000 * (time.process_time() - begun)


def peak_mb() -> float:
    """This process's own peak; ru_maxrss would begin with the peak of the process that started it. Linux only."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--mb", type=float, default=0.35, help="of float32 values an update")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="the peak of extra memory, each in a process of its own")
    parser.add_argument("--only", choices=("sum", "ours", "Flower"), help=argparse.SUPPRESS)
    parser.add_argument("--spool", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = int(arguments.mb * 1e6 / 4 / TENSORS) * TENSORS
    theta = np.random.default_rng(1).standard_normal(size).astype(np.float32)
    flwr_compat.enter_run(1)
    ways = {"sum": bare, "ours": ours, "Flower": flowers}
    if arguments.only:
        names = [
            arguments.spool / f"{i}.{'npy' if arguments.only == 'Flower' else 'update'}"
            for i in range(arguments.devices)
        ]
        ways[arguments.only](names[:1], theta)  # what is imported lazily
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = peak_mb()
        ways[arguments.only](names, theta)
        print(f"{peak_mb() - before:.0f}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        ours_files, flower_files = write_spool(Path(scratch), arguments.devices, size)
        files = {"sum": ours_files, "ours": ours_files, "Flower": flower_files}
        results = {name: way(files[name], theta) for name, way in ways.items()}
        assert results["sum"].tobytes() == results["ours"].tobytes()
        grid = asked_of_all(Path(scratch), ours_files, theta)
        assert whole(grid, theta).tobytes() == results["ours"].tobytes()
        print(f"largest difference from Flower's: {np.abs(results['ours'] - results['Flower']).max():.1e}")
        if arguments.memory:
            for name in ways:
                command = [sys.executable, __file__, "--only", name, "--spool", scratch]
                command += ["--devices", str(arguments.devices), "--mb", str(arguments.mb)]
                told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
                print(f"{name}: {told} MB above what it had before")
            grid.store.close()
            return
        runs = {name: partial(way, files[name], theta) for name, way in ways.items()}
        runs["grid"] = partial(whole, grid, theta)
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(arguments.repeats):
            for name, work in runs.items():
                taken[name].append(measure_cpu(work))
        grid.store.close()
        for name, values in taken.items():
            ratios = [f / v for f, v in zip(taken["Flower"], values, strict=True)]
            print(
                f"{name}: {statistics.median(values):.0f} ms of CPU [{min(values):.0f}, {max(values):.0f}]; "
                f"Flower / this {statistics.median(ratios):.1f}"
            )


if __name__ == "__main__":
    main()
