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

from pocketfed.client_sdk.flower_app import make_client_app
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import evaluate
from pocketfed.coordinator.artifacts import publish_artifact, read_artifact
from pocketfed.coordinator.config import LocalTraining, RunConfig, UpdateForm
from pocketfed.coordinator.rounds import create_run, drive_run
from pocketfed.coordinator.store import Store, device_named
from pocketfed.model.parameters import Vector
from pocketfed.model.tasks import Dataset, read_dataset
from pocketfed.simulations.grids import InProcessGrid
from pocketfed.simulations.partition import partition
from pocketfed.simulations.run import device_names, encode_examples, prepare_artifact

Row = dict[str, Any]
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
                row = run_form(arguments, seed, form, trainer, local, test, folder)
                with arguments.out.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


def run_form(
    arguments: argparse.Namespace, seed: int, form: str, trainer: PlanTrainer, local: Any, test: Any, folder: Path
) -> Row:
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
    store = Store(str(folder / f"{codec.replace(':', '-')}.db"))
    with store.write() as session:
        publish_artifact(session, read_artifact(trainer.artifact.folder), config.channel, name)
        nodes = {device_named(session, device).id: device for device in local}
    run_id = create_run(store, config)
    app = make_client_app(
        lambda: trainer, lambda c: (str(c.node_config["device"]), local[str(c.node_config["device"])])
    )
    rounds: list[Any] = []
    grid = InProcessGrid(store, run_id, app, nodes, 0)  # the artifact comes once, whatever the form
    curve: dict[int, float] = {}

    def sometimes(theta: Vector) -> dict[str, float]:
        """Called after every round, and before the first."""
        number = len(rounds)
        if not number or (number % 10 and number != arguments.rounds):
            return {}
        curve[number] = evaluate(trainer, theta, test)["accuracy"]
        return {"accuracy": curve[number]}

    drive_run(store, run_id, grid, config, sometimes, rounds.append)
    store.close()
    trained = [r for r in rounds if r.number > 0]
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
        "bytes_up": statistics.mean(r.bytes_up / r.devices for r in trained),
        "bytes_down": statistics.mean(r.bytes_down / r.devices for r in trained),
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
            values = [100 * r["accuracy"] for r in those]
            plain = [r for r in mine if r["form"] == f"{form.split('/')[0]}/float32"]
            ratio = f"{statistics.mean(r['bytes_up'] for r in base) / up:.0f}" if base else ""
            out.append(
                f"| {form} | {len(those)} | {up:,.0f} | {ratio} | {down:,.0f} | {statistics.mean(values):.1f} "
                f"[{min(values):.1f}, {max(values):.1f}] | {difference(those, plain)} | {difference(those, base)} |"
            )
    return "\n".join(out)


def difference(those: Sequence[Row], others: Sequence[Row]) -> str:
    """Of accuracies in points, seed by seed: mean ± standard deviation."""
    other = {r["seed"]: r["accuracy"] for r in others}
    points = [100 * (r["accuracy"] - other[r["seed"]]) for r in those if r["seed"] in other]
    if not points:
        return ""
    spread = f" ± {statistics.stdev(points):.1f}" if len(points) > 1 else ""
    return f"{statistics.mean(points):+.1f}{spread}"


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="print what a file of results says, and end")
    parser.add_argument("--data", type=Path)
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
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(read_rows(arguments.table)))
        return
    if arguments.data is None or arguments.out is None:
        parser.error("give --data and --out, or --table")
    done = {(r["data"], r["form"], r["seed"]) for r in read_rows(arguments.out)}
    for seed in map(int, arguments.seeds.split(",")):
        forms = [f for f in arguments.forms.split(",") if (arguments.data.name, f, seed) not in done]
        if forms:
            run_forms(arguments, seed, forms)
    print(table([r for r in read_rows(arguments.out) if r["data"] == arguments.data.name]))


if __name__ == "__main__":
    main()
