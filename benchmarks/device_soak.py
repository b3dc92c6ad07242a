"""A device through a day in which its conditions come and go: does it work only when it may, and stay the same size?

python benchmarks/device_soak.py [--hours 24] [--seed 0]

The real device loop and a real coordinator, in one process over loopback gRPC, with a clock that jumps over every pause: charger,
battery, network, heat, and whether somebody uses the device change every few minutes, also between two training steps. One
line an hour; the last one is JSON: rounds done, rounds broken off, steps that should not have been, and what grew.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
from collections import Counter
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from pocketfed.client_sdk import Conditions, Device, Progress, Readings
from pocketfed.client_sdk.clock import Clock
from pocketfed.coordinator.artifacts import BuiltArtifact, build_artifact, publish_artifact
from pocketfed.coordinator.config import LocalTraining, RunConfig
from pocketfed.coordinator.grid import FleetGrid
from pocketfed.coordinator.limits import Limits
from pocketfed.coordinator.progress import create_run
from pocketfed.coordinator.rounds import RunError, drive_run
from pocketfed.coordinator.server import CoordinatorServer, ServerConfig
from pocketfed.coordinator.store import Store
from pocketfed.model.config import STUDENTS
from pocketfed.model.tokenization import train_vocabulary

ASKED = Conditions(
    charging=True, battery=40, unmetered=True, idle=True, max_temperature_c=42, min_separation_s=300, patience_s=600
)
STEP_S = 40.0  # of the day that a training step takes
TURN_S = 20.0  # and an empty check-in: a long poll
CHANGE_S = 420.0  # how often the weather changes


class Day(Clock):
    """A clock that jumps over pauses, and the weather at every moment of it."""

    poll_s = 0.0

    def __init__(self, seed: int) -> None:
        self.since, self._seed = 0.0, seed
        self._start = datetime(2026, 3, 1)

    def passed(self) -> float:
        return self.since

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self.since)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        self.since += max(seconds, TURN_S)
        return event.wait(0.001)

    def readings(self) -> Readings:
        draw = np.random.default_rng([self._seed, int(self.since / CHANGE_S)])
        plugged, free, unused, battery, heat = draw.random(5)
        return Readings(plugged < 0.85, 30 + 80 * battery, free > 0.85, unused < 0.9, 30 + 14 * heat)

    def good(self) -> bool:
        now = self.readings()
        cool = now.temperature_c is not None and now.temperature_c <= ASKED.max_temperature_c
        return bool(now.charging and now.idle and cool and now.battery is not None and now.battery >= ASKED.battery)


class Log:
    """What the device did, seen from outside."""

    def __init__(self, day: Day) -> None:
        self._day, self.said, self.wrong, self._lost = day, Counter[str](), 0, -1.0

    def hear(self, status: str) -> None:
        self.said[status.split(" ")[0]] += 1
        self.said["broken off"] += "is broken off" in status
        self.said["kept"] += "is kept; waits" in status
        self.said["gave back"] += status.startswith("gave round")

    def follow(self, progress: Progress) -> None:
        """Told after every step; the step takes its time, and what was lost before it must have prevented it."""
        if progress.phase == "training":
            self.wrong += self._lost == self._day.since
            self._day.since += STEP_S
            self._lost = -1.0 if self._day.good() else self._day.since


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def build(folder: Path) -> BuiltArtifact:
    texts = [f"{a} {b}" for a in ("play", "stop", "dim", "call") for b in ("music", "lights", "home")]
    vocabulary = train_vocabulary(texts, 80)
    config = STUDENTS["nano"].with_changes(vocab_size=len(vocabulary))
    return build_artifact(
        folder / "artifact", config=config, state={}, vocabulary=vocabulary, labels=("a", "b"), trainable_sets=("norms",),
        quantized=True, max_length=16, preset="nano", seed=1,
    )  # fmt: skip


def live(hours: float, seed: int, folder: Path, built: BuiltArtifact, rounds: int = 0) -> dict[str, Any]:
    """So many hours of a device; what it did and how it grew from the first quarter on.

    The coordinator's rounds take the machine's time, not the day's: a slow machine closes fewer of them in the same hours. Who
    needs a number of rounds asks for `rounds`, and the last quarter of an hour lasts until so many were handed in.
    """
    from pocketfed.client_sdk import status

    status.OFTEN_S = 0.0  # hear of every step
    store = Store(str(folder / "fleet.db"))
    with store.write() as session:
        publish_artifact(session, built, "stable", "norms")
    quick = Limits(calls_per_s=1e4, calls_burst=1e4)
    server = CoordinatorServer(store, ServerConfig("127.0.0.1:0", lease_s=60.0, limits=quick), folder / "spool")
    address, stopped = f"127.0.0.1:{server.start()}", threading.Event()
    local = LocalTraining(epochs=2, batch_size=2, max_length=16)
    config = RunConfig(
        rounds=100000, min_devices=1, wait_s=3600.0, local=local, max_failed_rounds=1000, retain_rounds=5
    )
    run_id = create_run(store, config)
    size = int(built.manifest["trainable_sets"]["norms"]["size"])
    grid = FleetGrid(server.assignments, run_id, lambda: server.online("stable"), size, 10.0)

    def drive() -> None:
        with suppress(RunError):
            drive_run(store, run_id, grid, config, None, lambda result: None, server.assignments.forget, stopped.is_set)

    runs = threading.Thread(target=drive)
    runs.start()
    day = Day(seed)
    log = Log(day)
    grown: list[tuple[float, int]] = []
    with Device(address, folder / "home", name="phone", conditions=ASKED, readings=day.readings, clock=day,
                on_status=log.hear, on_progress=log.follow) as device:  # fmt: skip
        device.add_examples(
            (f"{a} {b}", label) for a in ("play", "stop", "dim") for b, label in (("music", "a"), ("home", "b"))
        )
        device.start()
        for quarter in range(1, 4 * max(1, int(hours)) + 1):
            last = quarter == 4 * max(1, int(hours))
            while day.since < quarter * hours * 3600 / (4 * max(1, int(hours))) or (
                last and log.said["handed"] < rounds
            ):
                if stopped.wait(0.02):
                    break
            grown.append((resident_mb(), len(os.listdir("/proc/self/fd"))))
            if quarter % 4 == 0:
                told = dict(sorted(log.said.items()))
                print(f"{day.now():%H:%M}  {grown[-1][0]:6.1f} MB  {grown[-1][1]} files  {told}", flush=True)
        device.stop()
        files = {p.name for p in (folder / "home").iterdir()}
    stopped.set()
    server.stop()
    runs.join()
    store.close()
    after = grown[len(grown) // 4 :]
    return {
        "hours": hours,
        "handed_in": log.said["handed"],
        "broken_off": log.said["broken off"],
        "kept": log.said["kept"],
        "gave_back": log.said["gave back"],
        "wrong_steps": log.wrong,
        "growth_mb": round(after[-1][0] - after[0][0], 2),
        "growth_files": after[-1][1] - after[0][1],
        "home": sorted(files),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--hours", type=float, default=24)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pocketfed-") as folder:
        print(json.dumps(live(arguments.hours, arguments.seed, Path(folder), build(Path(folder)))))


if __name__ == "__main__":
    main()
