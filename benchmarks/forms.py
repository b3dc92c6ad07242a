"""What the form of an update costs: bytes up and down a device and round, and test accuracy, codec by codec.

    python benchmarks/forms.py --data DATA --model STUDENT --forms full/float32,full/topk:0.003,lora:8/int8 --seeds 0,1,2 \\
        --out forms.jsonl
    python benchmarks/forms.py --table forms.jsonl

A form is TRAINABLE_SET/CODEC. All forms of a seed train the same student on the same examples on the same devices. Runs that
`--out` has already are not done again. The ratio is to full/float32 of the same data: what FedAvg of the whole model sends.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from virtual import Row, asked, difference, drive, options, spread

from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import evaluate
from pocketfed.coordinator.config import LocalTraining, RunConfig, UpdateForm
from pocketfed.coordinator.progress import RoundResult
from pocketfed.model.parameters import Vector
from pocketfed.model.rows import append_row, whole_rows
from pocketfed.model.tasks import Dataset, read_dataset
from pocketfed.simulations.partition import partition
from pocketfed.simulations.run import device_names, encode_examples, prepare_artifact

BASE = "full/float32"


def some_of(dataset: Dataset, train: int, test: int, seed: int) -> Dataset:
    """At most so many training and test examples, drawn by the seed (the test examples are the same for every seed)."""
    drawn = np.random.Generator(np.random.PCG64(seed)).permutation(len(dataset.train))[: train or None]
    tested = np.random.Generator(np.random.PCG64(0)).permutation(len(dataset.test))[: test or None]
    return dataclasses.replace(
        dataset, train=tuple(dataset.train[i] for i in drawn), test=tuple(dataset.test[i] for i in tested)
    )


def run_forms(arguments: argparse.Namespace, seed: int, forms: Sequence[str]) -> None:
    """All forms of one seed, those of one trainable set one after another: they share the artifact and the cache."""
    dataset = read_dataset(arguments.data).with_test(seed=0)
    dataset = some_of(dataset, arguments.examples, arguments.test_examples, seed)
    parts = partition(dataset.train, arguments.partition, arguments.devices, seed)
    for name in dict.fromkeys(form.split("/")[0] for form in forms):
        with tempfile.TemporaryDirectory(prefix="pocketfed-") as scratch:
            folder = Path(scratch)
            artifact = prepare_artifact(arguments.model, dataset, name, folder / "artifact", seed, arguments.max_length)
            trainer = PlanTrainer(artifact, name)
            examples = encode_examples(trainer, dataset.train, arguments.max_length)
            test = encode_examples(trainer, dataset.test, arguments.max_length)
            local = dict(zip(device_names(len(parts)), (examples.take(p) for p in parts), strict=True))
            for form in (f for f in forms if f.split("/")[0] == name):
                row = run_form(arguments, seed, form, trainer, local, test)
                append_row(arguments.out, row)
                print(json.dumps(row), flush=True)


def run_form(arguments: argparse.Namespace, seed: int, form: str, trainer: PlanTrainer, local: Any, test: Any) -> Row:
    name, codec = form.split("/", 1)
    rate = arguments.full_learning_rate if name == "full" else arguments.learning_rate
    training = LocalTraining(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=rate,
        max_length=arguments.max_length,
    )
    config = RunConfig(
        name=form, rounds=arguments.rounds, min_devices=1, seed=seed, local=training, update=UpdateForm(codec=codec)
    )
    started = time.process_time()
    rounds: list[RoundResult] = []
    curve: dict[int, float] = {}

    def sometimes(theta: Vector) -> dict[str, float]:
        """Called after every round, and before the first."""
        number = len(rounds)
        if not number or (number % 10 and number != arguments.rounds):
            return {}
        curve[number] = evaluate(trainer, theta, test)["accuracy"]
        return {"accuracy": curve[number]}

    driven = drive(trainer, local, config, sometimes, rounds.append)  # the artifact comes once, whatever the form
    return {
        "data": arguments.data.name,
        "form": form,
        "seed": seed,
        "devices": len(local),
        "rounds": arguments.rounds,
        "examples": sum(map(len, local.values())),
        "parameters": trainer.size,
        "accuracy": curve[arguments.rounds],
        "curve": curve,
        "test_examples": len(test),
        "bytes_up": driven.mean_bytes("up"),
        "bytes_down": driven.mean_bytes("down"),
        "learning_rate": rate,
        "epochs": arguments.epochs,
        "partition": arguments.partition,
        "cpu_s": round(time.process_time() - started, 1),
    }


def table(rows: Sequence[Row]) -> str:
    """Markdown: a block a data set; accuracy as mean [smallest, largest] over seeds."""
    out: list[str] = []
    for data in dict.fromkeys(r["data"] for r in rows):
        mine = [r for r in rows if r["data"] == data]
        base = [r for r in mine if r["form"] == BASE]
        out += [
            f"\n{data}: {mine[0]['examples']} examples on {mine[0]['devices']} devices, {mine[0]['rounds']} rounds\n"
        ]
        out += ["| form | seeds | bytes up | times fewer | bytes down | accuracy | against float32 | against full |"]
        out += ["|---|---|---|---|---|---|---|---|"]
        for form in dict.fromkeys(r["form"] for r in mine):
            those = [r for r in mine if r["form"] == form]
            up = statistics.mean(r["bytes_up"] for r in those)
            down = statistics.mean(r["bytes_down"] for r in those)
            plain = [r for r in mine if r["form"] == f"{form.split('/')[0]}/float32"]
            ratio = f"{statistics.mean(r['bytes_up'] for r in base) / up:.0f}" if base else ""
            out.append(
                f"| {form} | {len(those)} | {up:,.0f} | {ratio} | {down:,.0f} | "
                f"{spread([100 * r['accuracy'] for r in those])} | {difference(those, plain, 'accuracy')} | "
                f"{difference(those, base, 'accuracy')} |"
            )
    return "\n".join(out)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--model", default="micro")
    parser.add_argument("--forms", default=f"{BASE},full/topk:0.01,full/topk:0.003")
    parser.add_argument("--devices", type=int, default=20)
    parser.add_argument("--partition", default="dirichlet:1.0")
    parser.add_argument("--examples", type=int, default=2000, help="of the training set, for all devices; 0: all")
    parser.add_argument("--test-examples", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--full-learning-rate", type=float, default=3e-3)
    arguments = asked(parser, table)
    if arguments is None:
        return
    done = {(r["data"], r["form"], r["seed"]) for r in whole_rows(arguments.out)}
    for seed in map(int, arguments.seeds.split(",")):
        forms = [f for f in arguments.forms.split(",") if (arguments.data.name, f, seed) not in done]
        if forms:
            run_forms(arguments, seed, forms)
    print(table([r for r in whole_rows(arguments.out) if r["data"] == arguments.data.name]))


if __name__ == "__main__":
    main()
