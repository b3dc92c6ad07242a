"""What a simulation costs beside the model: CPU milliseconds a virtual device and round, in one process.

    python benchmarks/overhead.py --model STUDENT --devices 1000 --rounds 5

Made-up examples, as many a device as one step takes. What the model computes (gradients and the frozen prefix, most of it in the
first round, which is left out) is taken off; what is left is messages, the local loop and optimizer, screening, aggregating, SQL.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from virtual import drive

from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Batch, Ids
from pocketfed.coordinator.config import LocalTraining, RunConfig
from pocketfed.coordinator.progress import RoundResult
from pocketfed.model.parameters import Vector
from pocketfed.simulations.data import assistant_dataset
from pocketfed.simulations.run import device_names, encode_examples, prepare_artifact


class Clocked(PlanTrainer):
    """Counts the CPU seconds that the model takes; ONNX Runtime has one thread, this one."""

    seconds = 0.0

    def prepare(self, rows: Sequence[Ids], should_stop: Callable[[], bool] = lambda: False) -> None:
        began = time.thread_time()
        super().prepare(rows, should_stop)
        self.seconds += time.thread_time() - began

    def gradient(self, theta: Vector, batch: Batch) -> tuple[float, int, Vector]:
        began = time.thread_time()
        told = super().gradient(theta, batch)
        self.seconds += time.thread_time() - began
        return told


def measure(model: str, train: str, devices: int, rounds: int, examples: int, seed: int) -> dict[str, Any]:
    """Medians over all rounds but the first, in ms of CPU a device."""
    dataset = assistant_dataset(seed, users=40, utterances_per_user=max(1, devices * examples // 40))
    moments: list[tuple[float, float]] = []
    with TemporaryDirectory(prefix="pocketfed-") as folder:
        artifact = prepare_artifact(model, dataset, train, Path(folder) / "artifact", seed, 32)
        trainer = Clocked(artifact, next(iter(artifact.manifest.sets)))
        encoded = encode_examples(trainer, dataset.train, 32)
        local = {
            name: encoded.take([(i * examples + j) % len(encoded) for j in range(examples)])
            for i, name in enumerate(device_names(devices))
        }
        config = RunConfig(rounds=rounds, min_devices=1, seed=seed, local=LocalTraining(1, examples, max_length=32))

        def remember(result: RoundResult) -> None:
            moments.append((time.process_time(), trainer.seconds))

        drive(trainer, local, config, on_round=remember)
    spent = [(b - a, d - c) for (a, c), (b, d) in itertools.pairwise(moments[1:])]
    whole, model_s = ([pair[i] / devices * 1e3 for pair in spent] for i in (0, 1))
    rest = [w - m for w, m in zip(whole, model_s, strict=True)]
    return {
        "devices": devices,
        "train": train,
        "parameters": trainer.size,
        "ms_device_round": round(statistics.median(whole), 3),
        "ms_model": round(statistics.median(model_s), 3),
        "ms_beside": round(statistics.median(rest), 3),
        "ms_beside_range": [round(min(rest), 3), round(max(rest), 3)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--train", default="head")
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--examples", type=int, default=16, help="of each device, in one step")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    print(json.dumps(measure(a.model, a.train, a.devices, a.rounds, a.examples, a.seed)))


if __name__ == "__main__":
    main()
