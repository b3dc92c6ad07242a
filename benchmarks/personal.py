"""Global against personal heads, speaker by speaker: what the devices gain, and what those gain that are served worst.

    python benchmarks/personal.py --data DATA/mrda --model STUDENT --seeds 0,1,2,3,4 --out personal.jsonl
    python benchmarks/personal.py --table personal.jsonl

A device is a speaker with at least `--test + --least` utterances; `--test` of them, drawn by the seed, are what it is measured
on and never trained on, at most `--examples` others are its data. All ways of a seed begin with the same student and the same devices:

    global             one model for all (FedAvg)
    personal head      the classifier stays on the device (FedPer; Arivazhagan et al. 2019, section 3)
    global, tuned      the global model, then `--tune` epochs of its head on the device alone, from the end of the run
    alone              the same number of epochs on the device alone

The worst decile is the mean accuracy of the tenth of the devices with the lowest, whichever these are for that way.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from virtual import Row, asked, difference, drive, options, spread

from pocketfed.client_sdk.order import derive_seed
from pocketfed.client_sdk.outgoing import UpdateForm as DeviceForm
from pocketfed.client_sdk.perform import Task, perform
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples, TrainConfig, evaluate, train
from pocketfed.coordinator.config import LocalTraining, RunConfig, UpdateForm
from pocketfed.model.parameters import Vector, split_private
from pocketfed.model.rows import append_row, whole_rows
from pocketfed.model.tasks import Dataset, read_dataset
from pocketfed.simulations.run import encode_examples, prepare_artifact

HEAD = ("classifier",)
GLOBAL = "global"
WAYS = (GLOBAL, "personal head", "global, tuned", "alone")


@dataclasses.dataclass(frozen=True)
class Fleet:
    trainer: PlanTrainer
    local: Mapping[str, Examples]
    test: Mapping[str, Examples]


def make_fleet(arguments: argparse.Namespace, seed: int, folder: Path) -> Fleet:
    dataset: Dataset = read_dataset(arguments.data)
    spoken: dict[str, list[int]] = {}
    for i, example in enumerate(dataset.train):
        if example.user:
            spoken.setdefault(example.user, []).append(i)
    generator = np.random.Generator(np.random.PCG64(seed))
    has, tests = dict[str, list[int]](), dict[str, list[int]]()
    for user in sorted(spoken):
        drawn = generator.permutation(spoken[user]).tolist()
        if len(drawn) >= arguments.test + arguments.least:
            tests[user], has[user] = drawn[: arguments.test], drawn[arguments.test :][: arguments.examples]
    artifact = prepare_artifact(arguments.model, dataset, arguments.train, folder, seed, arguments.max_length)
    trainer = PlanTrainer(artifact, arguments.train)

    def encoded(chosen: Mapping[str, Sequence[int]]) -> dict[str, Examples]:
        return {
            user: encode_examples(trainer, [dataset.train[i] for i in some], arguments.max_length)
            for user, some in chosen.items()
        }

    return Fleet(trainer, encoded(has), encoded(tests))


def run_seed(arguments: argparse.Namespace, seed: int) -> Row:
    begun = time.process_time()
    with tempfile.TemporaryDirectory(prefix="pocketfed-") as scratch:
        fleet = make_fleet(arguments, seed, Path(scratch) / "artifact")
        trainer, split = fleet.trainer, split_private(fleet.trainer.layout, HEAD)
        local = LocalTraining(
            epochs=arguments.epochs,
            batch_size=16,
            learning_rate=arguments.learning_rate,
            max_length=arguments.max_length,
        )
        config = RunConfig(rounds=arguments.rounds, min_devices=1, cohort=arguments.cohort, seed=seed, local=local)
        shared = drive(trainer, fleet.local, config)
        personal = drive(trainer, fleet.local, dataclasses.replace(config, update=UpdateForm(private=HEAD)))
        how = TrainConfig(**dataclasses.asdict(local), seed=seed)

        def own(name: str) -> Vector:
            kept = personal.contexts[name].state["kept"]["private"].numpy() if name in personal.contexts else ()
            return split.overlay(personal.theta, kept) if len(kept) else personal.theta

        def tuned(name: str) -> Vector:
            body = tuple(p.name for p in trainer.layout if not p.name.startswith(HEAD))
            asked = dataclasses.replace(how, epochs=arguments.tune)
            task = Task("train", shared.theta, asked, arguments.rounds + 1, name, DeviceForm(frozen=body))
            moved: Vector = shared.theta + perform(trainer, task, fleet.local[name]).delta
            return moved

        def alone(name: str) -> Vector:
            asked = dataclasses.replace(how, epochs=arguments.rounds * how.epochs, seed=derive_seed(seed, 0, name))
            start = trainer.initial_theta()
            trained: Vector = start + train(trainer, start, fleet.local[name], asked).delta
            return trained

        models: dict[str, Callable[[str], Vector]] = dict(
            zip(WAYS, (lambda name: shared.theta, own, tuned, alone), strict=True)
        )
        accuracies = {
            way: {name: evaluate(trainer, of(name), fleet.test[name])["accuracy"] for name in fleet.local}
            for way, of in models.items()
        }
    return {
        "data": arguments.data.name,
        "train": arguments.train,
        "seed": seed,
        "devices": len(fleet.local),
        "examples": [len(e) for e in fleet.local.values()],
        "test_examples": arguments.test,
        "rounds": arguments.rounds,
        "accuracies": accuracies,
        "bytes_up": {GLOBAL: shared.mean_bytes("up"), "personal head": personal.mean_bytes("up")},
        "cpu_s": round(time.process_time() - begun, 1),
    }


def told(accuracies: Mapping[str, float]) -> dict[str, float]:
    """
    >>> told({"a": 0.5, "b": 0.9, "c": 1.0})
    {'mean': 0.8, 'p10': 0.58, 'worst decile': 0.5}
    """
    values = sorted(accuracies.values())
    worst = values[: math.ceil(len(values) / 10)]
    numbers = {"mean": statistics.mean(values), "p10": float(np.quantile(values, 0.1))}
    return {name: round(value, 6) for name, value in (numbers | {"worst decile": statistics.mean(worst)}).items()}


def table(rows: Sequence[Row]) -> str:
    """Markdown: accuracy in percent over the devices as mean [smallest, largest] over seeds, and the gain over `global`."""
    out: list[str] = []
    for data, trained in dict.fromkeys((r["data"], r["train"]) for r in rows):
        mine = [r for r in rows if (r["data"], r["train"]) == (data, trained)]
        counts = [n for r in mine for n in r["examples"]]
        out += [
            f"\n{data}, {trained}: {mine[0]['devices']} devices of {min(counts)} to {max(counts)} examples, "
            f"{mine[0]['test_examples']} to measure each on, {mine[0]['rounds']} rounds, {len(mine)} seeds\n"
        ]
        out += ["| | mean | p10 | worst decile | mean gain | worst decile's gain | devices better / worse |"]
        out += ["|---" * 7 + "|"]
        for way in WAYS:
            numbers = [{"seed": r["seed"], **told(r["accuracies"][way])} for r in mine]
            base = [{"seed": r["seed"], **told(r["accuracies"][GLOBAL])} for r in mine]
            cells = [spread([100 * n[key] for n in numbers]) for key in ("mean", "p10", "worst decile")]
            gains = ["" if way == GLOBAL else difference(numbers, base, key) for key in ("mean", "worst decile")]
            pairs = [(a, r["accuracies"][GLOBAL][name]) for r in mine for name, a in r["accuracies"][way].items()]
            better, worse = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
            cells += [*gains, "" if way == GLOBAL else f"{better} / {worse} of {len(pairs)}"]
            out += [f"| {way} | " + " | ".join(cells) + " |"]
    return "\n".join(out)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--train", default="last:1")
    parser.add_argument("--examples", type=int, default=400, help="that a device trains on, at most")
    parser.add_argument("--least", type=int, default=40, help="that a device trains on, at least")
    parser.add_argument("--test", type=int, default=100, help="that a device is measured on")
    parser.add_argument("--cohort", type=int, default=0, help="devices a round; 0: all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--tune", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    arguments = asked(parser, table)
    if arguments is None:
        return
    done = {(r["data"], r["train"], r["seed"]) for r in whole_rows(arguments.out)}
    for seed in map(int, arguments.seeds.split(",")):
        if (arguments.data.name, arguments.train, seed) not in done:
            row = run_seed(arguments, seed)
            append_row(arguments.out, row)
            means = {way: told(a) for way, a in row["accuracies"].items()}
            print(f"seed {seed}, {row['devices']} devices, {row['cpu_s']} s of CPU: {means}", flush=True)
    print(table(whole_rows(arguments.out)))


if __name__ == "__main__":
    main()
