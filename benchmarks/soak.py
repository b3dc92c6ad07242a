"""Thousands of tiny rounds in one coordinator: do memory, file descriptors and the database stay flat?

python benchmarks/soak.py --rounds 10000 [--retain-rounds 100] [--database URL]

Two devices of 16 parameters each, without a model: they take their assignments and hand in updates as gRPC calls would, spool
and all, from a thread of this process. Prints one line a tenth of the way, and the growth from the second to the last.
"""

from __future__ import annotations

import argparse
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
from pocketfed.coordinator.progress import RoundResult, create_run
from pocketfed.coordinator.rounds import drive_run
from pocketfed.coordinator.store import Release, Store, device_named, put_artifact, put_blob
from pocketfed.model.parameters import encode_vector

SIZE = 16


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


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


def serve_devices(assignments: Assignments, nodes: dict[int, str], offered: threading.Semaphore, seed: int) -> None:
    draw = np.random.default_rng(seed)
    while True:
        offered.acquire()
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
        threading.Thread(target=serve_devices, args=(assignments, nodes, offered, given.seed), daemon=True).start()
        measured: list[dict[str, float]] = []
        started = time.perf_counter()

        def look(result: RoundResult) -> None:
            if result.number and result.number % max(1, given.rounds // 10) == 0:
                size = store.file.stat().st_size / 1e6 if store.file else 0.0
                measured.append(
                    {
                        "round": result.number,
                        "rss_mb": round(resident_mb(), 1),
                        "open_files": open_files(),
                        "database_mb": round(size, 2),
                        "seconds": round(time.perf_counter() - started, 1),
                    }
                )
                print(json.dumps(measured[-1]), flush=True)

        grid = FleetGrid(assignments, run_id, lambda: nodes, SIZE, 60.0)
        drive_run(store, run_id, grid, config, on_round=look, on_settled=assignments.forget)
        second, last = measured[1], measured[-1]
        growth = {name: round(last[name] - second[name], 2) for name in ("rss_mb", "open_files", "database_mb")}
        print(json.dumps({"growth_from_the_second_line_to_the_last": growth}))
        store.close()


if __name__ == "__main__":
    main()
