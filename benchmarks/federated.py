"""Federated against central and one-device training: the same student, data, plans and local loop.

    python benchmarks/federated.py --data DATA --devices 20 --partition dirichlet:0.3 --rounds 10 --seeds 0,1,2 \\
        --out result.json --svg curves.svg

A round is one local epoch on every device, set beside one epoch of central training and one epoch on a device alone. The
optimizer of central and one-device training goes on over the epochs; that of a federated device begins anew every round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pocketfed.client_sdk.optimizers import make_optimizer
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples, TrainConfig, epoch_batches, evaluate
from pocketfed.coordinator.config import LocalTraining, RunConfig
from pocketfed.model.tasks import majority_accuracy, read_dataset
from pocketfed.simulations.partition import partition
from pocketfed.simulations.run import SimulationConfig, encode_examples, prepare_artifact, simulate

LINES = ("federated", "central", "one device")
COLOURS = {
    "federated": "#0072b2",
    "central": "#009e73",
    "one device": "#d55e00",
}  # Okabe & Ito: told apart without red and green


def epochs_of(
    trainer: PlanTrainer, examples: Examples, test: Examples, config: TrainConfig, epochs: int, measured: Sequence[int]
) -> dict[int, float]:
    """Test accuracy after the epochs in `measured`, one training that goes on."""
    theta = trainer.initial_theta()
    optimizer = make_optimizer(config.optimizer, config.learning_rate, config.momentum, config.weight_decay)
    accuracies = {0: evaluate(trainer, theta, test)["accuracy"]} if 0 in measured else {}
    for epoch in range(1, epochs + 1):
        for batch in epoch_batches(examples, config.batch_size, config.seed, epoch):
            _, _, gradient = trainer.gradient(theta, batch)
            norm = float(np.linalg.norm(gradient))
            if norm > config.max_grad_norm:
                gradient *= np.float32(config.max_grad_norm / norm)
            optimizer.step(theta, gradient)
        if epoch in measured:
            accuracies[epoch] = evaluate(trainer, theta, test)["accuracy"]
    return accuracies


def run_seed(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    local = LocalTraining(learning_rate=arguments.learning_rate, batch_size=arguments.batch_size, max_length=64)
    run = RunConfig(name=f"federated seed {seed}", rounds=arguments.rounds, min_devices=1, seed=seed, local=local)
    config = SimulationConfig(
        arguments.data, arguments.model, arguments.devices, arguments.partition, arguments.train, run
    )
    started = time.process_time()
    result = simulate(config, arguments.database)
    seconds = {"federated": time.process_time() - started}
    curves: dict[str, dict[int, float]] = {"federated": {r.number: float(r.accuracy or 0) for r in result.rounds}}

    dataset = read_dataset(arguments.data).with_test(seed=seed)
    parts = partition(dataset.train, arguments.partition, arguments.devices, seed)
    train_config = TrainConfig(
        learning_rate=arguments.learning_rate, batch_size=arguments.batch_size, max_length=64, seed=seed
    )
    with tempfile.TemporaryDirectory() as scratch:
        artifact = prepare_artifact(arguments.model, dataset, arguments.train, Path(scratch) / "artifact", seed, 64)
        trainer = PlanTrainer(artifact, next(iter(artifact.manifest.sets)))
        train_examples, test = encode_examples(trainer, dataset.train, 64), encode_examples(trainer, dataset.test, 64)
        started = time.process_time()
        curves["central"] = epochs_of(
            trainer, train_examples, test, train_config, arguments.rounds, range(arguments.rounds + 1)
        )
        seconds["central"] = time.process_time() - started
        some = sorted({0, 1, 2, 3, 5, 8, arguments.rounds} & set(range(arguments.rounds + 1)))
        started = time.process_time()
        alone = [
            epochs_of(trainer, train_examples.take(part), test, train_config, arguments.rounds, some) for part in parts
        ]
        seconds["one device"] = time.process_time() - started
    curves["one device"] = {e: statistics.mean(a[e] for a in alone) for e in some}
    best = max(a[arguments.rounds] for a in alone)
    up = sum(r.bytes_up for r in result.rounds) / arguments.devices / arguments.rounds
    return {
        "seed": seed,
        "curves": curves,
        "best_single_device": best,
        "cpu_seconds": {k: round(v, 1) for k, v in seconds.items()},
        "bytes_up_per_device_round": round(up),
        "parameters_sha256": result.to_dict()["final"]["parameters_sha256"],
        "model": dict(result.model) | {"config": None},
        "majority": majority_accuracy(dataset),
        "test_examples": len(dataset.test),
    }


def table(runs: Sequence[dict[str, Any]], rounds: int) -> str:
    """Markdown: mean [smallest, largest] over the seeds."""
    rows = ["| round | " + " | ".join(LINES) + " |", "|---|---|---|---|"]
    for number in range(rounds + 1):
        cells = []
        for line in LINES:
            values = [r["curves"][line][number] for r in runs if number in r["curves"][line]]
            cells.append(f"{statistics.mean(values):.4f} [{min(values):.4f}, {max(values):.4f}]" if values else "")
        rows.append(f"| {number} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def draw(runs: Sequence[dict[str, Any]], rounds: int, title: str) -> str:
    """The three lines as SVG, with a band from the smallest to the largest seed."""
    left, top, width, height = 60, 40, 560, 300

    def x(number: float) -> float:
        return left + width * number / rounds

    def y(accuracy: float) -> float:
        return top + height * (1 - accuracy)

    out = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 400" font-family="system-ui, sans-serif" font-size="13">',
        '<rect width="760" height="400" fill="#fff"/>',
        f'<text x="{left}" y="22" font-size="15">{title}</text>',
    ]
    for tick in range(0, 11, 2):
        out.append(
            f'<path d="M{left} {y(tick / 10):.1f}h{width}" stroke="#d0d7de"/>'
            f'<text x="{left - 8}" y="{y(tick / 10) + 4:.1f}" text-anchor="end">{tick / 10:.1f}</text>'
        )
    for number in range(0, rounds + 1, max(1, rounds // 10)):
        out.append(f'<text x="{x(number):.1f}" y="{top + height + 18}" text-anchor="middle">{number}</text>')
    out.append(f'<text x="{left + width / 2}" y="{top + height + 40}" text-anchor="middle">round (epoch)</text>')
    out.append(
        f'<text transform="translate(18 {top + height / 2}) rotate(-90)" text-anchor="middle">test accuracy</text>'
    )
    for i, line in enumerate(LINES):
        numbers = sorted(set.intersection(*(set(r["curves"][line]) for r in runs)))
        values = [[r["curves"][line][n] for r in runs] for n in numbers]
        upper = " ".join(f"{x(n):.1f},{y(max(v)):.1f}" for n, v in zip(numbers, values, strict=True))
        lower = " ".join(f"{x(n):.1f},{y(min(v)):.1f}" for n, v in reversed(list(zip(numbers, values, strict=True))))
        middle = " ".join(f"{x(n):.1f},{y(statistics.mean(v)):.1f}" for n, v in zip(numbers, values, strict=True))
        colour = COLOURS[line]
        out.append(
            f'<polygon points="{upper} {lower}" fill="{colour}" opacity="0.18"/>'
            f'<polyline points="{middle}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        out.append(
            f'<text x="{left + width + 12}" y="{top + 20 + 22 * i}" fill="{colour}">{line} {statistics.mean(values[-1]):.3f}</text>'
        )
    return "\n".join([*out, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="micro")
    parser.add_argument("--train", default="")
    parser.add_argument("--devices", type=int, default=20)
    parser.add_argument("--partition", default="dirichlet:0.3")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--database")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--svg", type=Path)
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for seed in map(int, arguments.seeds.split(",")):
        runs.append(run_seed(arguments, seed))
        final = {line: round(curve[arguments.rounds], 4) for line, curve in runs[-1]["curves"].items()}
        print(f"seed {seed}: {final} {runs[-1]['cpu_seconds']}", flush=True)
        arguments.out.write_text(json.dumps(runs, indent=1) + "\n")
    print(table(runs, arguments.rounds))
    if arguments.svg:
        title = f"{arguments.data.name}, {arguments.devices} devices, {arguments.partition}, {len(runs)} seeds"
        arguments.svg.write_text(draw(runs, arguments.rounds, title))


if __name__ == "__main__":
    main()
