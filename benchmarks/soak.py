"""Thousands of tiny rounds in one coordinator: do memory, file descriptors and the database stay flat?

python benchmarks/soak.py --rounds 10000 [--retain-rounds 100] [--every 1000] [--minutes 25] [--database URL]

Two devices of 16 parameters each, without a model: they take their assignments and hand in updates as gRPC calls would, spool
and all, from a thread of this process. Prints a line every so many rounds, and the growth from the second line to the last.
Of the database the file and its write-ahead log are counted; of the time what the rounds since the line before took.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from pocketfed.coordinator.assignments import Assignments, Header
from pocketfed.coordinator.config import RunConfig
from pocketfed.coordinator.grid import FleetGrid
from pocketfed.coordinator.progress import Interrupted, RoundResult, create_run
from pocketfed.coordinator.rounds import drive_run
from pocketfed.coordinator.store import Release, Store, device_named, put_artifact, put_blob
from pocketfed.model.parameters import encode_vector

SIZE = 16


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def database_mb(store: Store) -> float:
    file = store.file
    if file is None:
        return 0.0
    return sum(p.stat().st_size for p in (file, file.with_name(file.name + "-wal")) if p.exists()) / 1e6


def prepare(store: Store) -> dict[int, str]:
    """An artifact of nothing but its starting parameters, released, and two devices."""
    initial = encode_vector("theta", np.zeros(SIZE, np.float32))
    files = {"theta": {"sha256": hashlib.sha256(initial).hexdigest()}}
    manifest = {"trainable_sets": {"all": {"initial": "theta", "size": SIZE}}, "files": files}
    with store.write() as session:
        put_artifact(session, manifest, "v1", [initial])
        digest = put_blob(session, initial)
        session.add(Release(channel="stable", artifact_version="v1", trainable_set="all", parameters=digest))
        return {device_named(session, name, examples=5).id: name for name in ("a", "b")}


def serve_devices(
    assignments: Assignments, nodes: dict[int, str], offered: threading.Semaphore, done: threading.Event, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    while offered.acquire() and not done.is_set():
        for node in nodes:
            found = assignments.next_for(node, 60.0)
            if found is None:
                continue
            data = encode_vector("delta", draw.standard_normal(SIZE).astype(np.float32))
            header = Header(found.id, len(data), hashlib.sha256(data).hexdigest(), 0, 5, {"loss": 1.0})
            assignments.append(header, data)
            assignments.finish(node, header)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--retain-rounds", type=int, default=100)
    parser.add_argument("--every", type=int, default=1000, help="rounds between two lines")
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after so long; 0: when all rounds are done")
    parser.add_argument("--strategy", default="FedAdam")
    parser.add_argument("--database")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pocketfed-") as scratch:
        store = Store(given.database or f"{scratch}/soak.db")
        nodes = prepare(store)
        config = RunConfig(
            rounds=given.rounds,
            strategy=given.strategy,
            retain_rounds=given.retain_rounds,
            seed=given.seed,
            release=False,
        )
        run_id = create_run(store, config)
        assignments, offered = Assignments(store, Path(scratch) / "spool"), threading.Semaphore(0)
        assignments.on_offer.append(offered.release)
        done = threading.Event()
        devices = threading.Thread(target=serve_devices, args=(assignments, nodes, offered, done, given.seed))
        devices.start()
        measured: list[dict[str, float]] = []
        started, spent = time.perf_counter(), [time.perf_counter(), time.process_time()]

        def look(result: RoundResult) -> None:
            if result.number and result.number % given.every == 0:
                wall, cpu = time.perf_counter(), time.process_time()
                measured.append(
                    {
                        "round": result.number,
                        "rss_mb": round(resident_mb(), 1),
                        "open_files": open_files(),
                        "database_mb": round(database_mb(store), 2),
                        "ms_a_round": round(1000 * (wall - spent[0]) / given.every, 1),
                        "cpu_ms_a_round": round(1000 * (cpu - spent[1]) / given.every, 1),
                    }
                )
                spent[:] = wall, cpu
                print(json.dumps(measured[-1]), flush=True)

        def should_stop() -> bool:
            return bool(given.minutes) and time.perf_counter() - started > 60 * given.minutes

        grid = FleetGrid(assignments, run_id, lambda: nodes, SIZE, 60.0)
        with contextlib.suppress(Interrupted):
            drive_run(
                store, run_id, grid, config, on_round=look, on_settled=assignments.forget, should_stop=should_stop
            )
        done.set()
        offered.release()
        devices.join()
        if len(measured) > 2:
            second, last = measured[1], measured[-1]
            growth = {name: round(last[name] - second[name], 2) for name in ("rss_mb", "open_files", "database_mb")}
            print(json.dumps({"rounds": last["round"] - second["round"], "growth": growth}))
        store.close()


if __name__ == "__main__":
    main()
