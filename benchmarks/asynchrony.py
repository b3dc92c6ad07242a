"""Synchronous rounds, over-selection and FedBuff on one fleet: fleet time, device time and bytes until a target accuracy.

    python benchmarks/asynchrony.py --data DATA --out result.jsonl --seeds 0,1,2,3,4

Every finished run is a line of the file; a second call goes on where the first was stopped, and prints the table at its end.
All ask as many devices at a time as they can use: sync asks `--cohort`, over-selection twice as many and goes on once `--cohort`
have answered, FedBuff keeps as many at work as over-selection asks and goes on at every `--buffer`-th answer.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pocketfed.coordinator.config import LocalTraining, RunConfig
from pocketfed.coordinator.progress import Interrupted, RoundResult
from pocketfed.model.rows import append_row, whole_rows
from pocketfed.simulations.run import SimulationConfig, simulate

MODES = ("sync", "over-selection", "fedbuff")
WEEK_S = 7 * 86400.0


def settings(mode: str, cohort: int, over: float, buffer: int) -> dict[str, Any]:
    """What is different between the three."""
    if mode == "sync":
        return {"cohort": cohort}
    if mode == "over-selection":
        return {"cohort": cohort, "over_selection": over}
    return {"mode": "fedbuff", "cohort": round(cohort * (1 + over)), "buffer": buffer}


def run_once(arguments: argparse.Namespace, mode: str, seed: int) -> dict[str, Any]:
    """A run until the target is reached or the rounds are used up, as a line of the result."""
    # A buffer is a smaller step than a round: the same number of updates for all.
    per_round = arguments.buffer if mode == "fedbuff" else arguments.cohort
    run = RunConfig(
        rounds=-(-arguments.updates // per_round),
        min_devices=arguments.cohort,
        wait_s=WEEK_S,
        deadline_s=arguments.deadline,
        seed=seed,
        release=False,
        local=LocalTraining(learning_rate=arguments.learning_rate, epochs=arguments.local_epochs, max_length=32),
        **settings(mode, arguments.cohort, arguments.over_selection, arguments.buffer),
    )
    config = SimulationConfig(
        arguments.data,
        arguments.model,
        arguments.devices,
        arguments.partition,
        arguments.train,
        run=run,
        fleet=arguments.fleet,
    )
    rounds: list[RoundResult] = []

    def reached() -> bool:
        return bool(rounds) and (rounds[-1].accuracy or 0.0) >= arguments.target

    started = time.process_time()
    with contextlib.suppress(Interrupted):  # the target was reached: what comes after is not asked for
        simulate(config, on_round=rounds.append, should_stop=reached)
    curve, passed, worked, up, down = [], 0.0, 0.0, 0, 0
    for r in rounds:
        passed, worked = passed + (r.virtual_s or 0.0), worked + (r.device_s or 0.0)
        up, down = up + r.bytes_up, down + r.bytes_down
        curve.append([round(passed, 3), round(r.accuracy or 0.0, 4), round(worked, 1), up, down])
    dropped: dict[str, int] = {}
    for r in rounds:
        for why, count in (r.dropped or {}).items():
            dropped[why] = dropped.get(why, 0) + count
    return {
        "mode": mode,
        "seed": seed,
        "settings": described(arguments),
        "curve": curve,  # seconds of fleet time, accuracy, device-seconds, bytes up and down, all since the beginning
        "updates": sum(r.devices for r in rounds),
        "failed_rounds": sum(r.status == "failed" for r in rounds),
        "dropped": dropped,
        "cpu_s": round(time.process_time() - started, 1),
    }


def described(arguments: argparse.Namespace) -> dict[str, Any]:
    """What has to be the same for two lines to stand in one table."""
    kept = {k: v for k, v in vars(arguments).items() if k not in ("out", "seeds", "modes", "data")}
    return kept | {"data": arguments.data.name}


def at_target(line: dict[str, Any], target: float) -> list[float] | None:
    """The first point of the curve at which it was reached.

    >>> at_target({"curve": [[0, 0.1, 0, 0, 0], [30, 0.9, 5, 1, 2], [60, 0.8, 9, 2, 3]]}, 0.85)
    [30, 0.9, 5, 1, 2]
    """
    return next((point for point in line["curve"] if point[1] >= target), None)


def table(lines: Sequence[dict[str, Any]], targets: Sequence[float]) -> str:
    """Markdown: median [smallest, largest] over the seeds that got there."""
    columns = ("minutes of fleet time", "device-hours", "MB up", "MB down", "reached by")
    out = ["| target | | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for target in targets:
        for mode in MODES:
            mine = [line for line in lines if line["mode"] == mode]
            points = [point for line in mine if (point := at_target(line, target)) is not None]
            cells = [
                spread([point[i] / unit for point in points])
                for i, unit in ((0, 60.0), (2, 3600.0), (3, 1e6), (4, 1e6))
            ]
            out.append(f"| {target:g} | {mode} | {' | '.join(cells)} | {len(points)} of {len(mine)} |")
    return "\n".join(out)


def spread(values: Sequence[float]) -> str:
    """
    >>> spread([3.0, 1.0, 2.0]), spread([])
    ('2.00 [1.00, 3.00]', '')
    """
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]" if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fleet", default="long-tail")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--train", default="full")
    parser.add_argument("--devices", type=int, default=100)
    parser.add_argument("--partition", default="dirichlet:0.3")
    parser.add_argument("--cohort", type=int, default=20)
    # Of n asked n * 0.7 * 0.9 answer fast in long-tail: with half as many more a round would wait for the slow all the same.
    parser.add_argument("--over-selection", type=float, default=1.0)
    parser.add_argument("--buffer", type=int, default=10)
    parser.add_argument("--updates", type=int, default=1000, help="that a run may use at most")
    parser.add_argument("--target", type=float, default=0.95, help="accuracy at which a run ends")
    parser.add_argument("--deadline", type=float, default=600.0, help="seconds, of a round")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--local-epochs", type=int, default=3)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--modes", default=",".join(MODES))
    arguments = parser.parse_args()
    for seed in map(int, arguments.seeds.split(",")):
        for mode in arguments.modes.split(","):
            same = [line for line in whole_rows(arguments.out) if line["settings"] == described(arguments)]
            if any((line["mode"], line["seed"]) == (mode, seed) for line in same):
                continue
            line = run_once(arguments, mode, seed)
            append_row(arguments.out, line)
            last = line["curve"][-1]
            print(
                f"{mode}, seed {seed}: {last[1]:.3f} after {last[0] / 60:.1f} min, {line['cpu_s']} s of CPU", flush=True
            )
    lines = [line for line in whole_rows(arguments.out) if line["settings"] == described(arguments)]
    targets = [t for t in (0.8, 0.9) if t < arguments.target]
    print(table(lines, [*targets, arguments.target]))


if __name__ == "__main__":
    main()
