"""Federations of LoRA on 3, 10 and 50 devices: naive averaging, FFA-LoRA, RoLoRA, exact, and exact with unequal ranks.

    python benchmarks/lora_federation.py --data DATA/snips --model STUDENT --seeds 0,1,2,3,4 --out lora.jsonl
    python benchmarks/lora_federation.py --table lora.jsonl

The same examples are dealt out to fewer or more devices; all strategies of a seed train the same student on the same devices,
`--epochs` local epochs a round, all at one `--learning-rate` (another one gets a table of its own). Runs that `--out` already
has are not done again. "Lost": the share of the mean product's norm that rank r cannot hold, the mean over rounds. "Exact,
unequal": every second device trains and sends rank 2.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forms import some_of
from virtual import Row, asked, difference, drive, options, spread

from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import evaluate
from pocketfed.coordinator.config import LocalTraining, RunConfig
from pocketfed.model.rows import append_row, whole_rows
from pocketfed.model.tasks import read_dataset
from pocketfed.simulations.partition import partition
from pocketfed.simulations.run import device_names, encode_examples, prepare_artifact

NAIVE = "naive"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    NAIVE: ("StreamingFedAvg", {}),
    "FFA": ("FFALoRA", {}),
    "RoLoRA": ("RoLoRA", {}),
    "exact": ("ExactLoRA", {}),
    "exact, unequal": ("ExactLoRA", {"ranks": {"*[02468]": 2}}),
}


def run_seed(arguments: argparse.Namespace, devices: int, seed: int, variants: Sequence[str]) -> None:
    dataset = read_dataset(arguments.data).with_test(seed=0)
    dataset = some_of(dataset, arguments.examples, arguments.test_examples, seed)
    parts = partition(dataset.train, arguments.partition, devices, seed)
    with tempfile.TemporaryDirectory(prefix="pocketfed-") as scratch:
        length = arguments.max_length
        folder = Path(scratch) / "artifact"
        artifact = prepare_artifact(arguments.model, dataset, arguments.train, folder, seed, length)
        trainer = PlanTrainer(artifact, arguments.train)
        examples, test = (encode_examples(trainer, some, length) for some in (dataset.train, dataset.test))
        local = dict(zip(device_names(devices), (examples.take(p) for p in parts), strict=True))
        for variant in variants:
            strategy, options = VARIANTS[variant]
            training = LocalTraining(
                epochs=arguments.epochs, batch_size=16, learning_rate=arguments.learning_rate, max_length=length
            )
            config = RunConfig(
                rounds=arguments.rounds,
                min_devices=1,
                seed=seed,
                strategy=strategy,
                strategy_options=options,
                local=training,
            )
            begun = time.process_time()
            driven = drive(trainer, local, config, lambda theta: evaluate(trainer, theta, test))
            lost = driven.metrics.get("train_lora_residual", {})
            row = {
                "data": arguments.data.name,
                "partition": arguments.partition,
                "train": arguments.train,
                "devices": devices,
                "variant": variant,
                "seed": seed,
                "rounds": arguments.rounds,
                "examples": len(examples),
                "accuracy": driven.rounds[-1].accuracy,
                "curve": [r.accuracy for r in driven.rounds],
                "bytes_up": driven.mean_bytes("up"),
                "bytes_down": driven.mean_bytes("down"),
                "lost": statistics.mean(lost.values()) if lost else None,
                "learning_rate": arguments.learning_rate,
                "cpu_s": round(time.process_time() - begun, 1),
            }
            append_row(arguments.out, row)
            print({k: v for k, v in row.items() if k != "curve"}, flush=True)


def table(rows: Sequence[Row]) -> str:
    """Markdown, for each data set and partition: accuracy in percent as mean [smallest, largest] over seeds."""
    out: list[str] = []
    for key in dict.fromkeys((r["data"], r["partition"], r["train"], r["learning_rate"]) for r in rows):
        mine = [r for r in rows if (r["data"], r["partition"], r["train"], r["learning_rate"]) == key]
        counts = sorted({r["devices"] for r in mine})
        data, kind, train, rate = key
        sizes = f"{mine[0]['examples']} examples, {mine[0]['rounds']} rounds"
        out += [f"\n{data}, {kind}, {train} at learning rate {rate:g}: {sizes}\n"]
        heads = [f"{n} devices | against naive" for n in counts]
        out += ["| | seeds | " + " | ".join(heads) + " | bytes up | lost |", "|---" * (4 + 2 * len(counts)) + "|"]
        for variant in (v for v in VARIANTS if any(r["variant"] == v for r in mine)):
            cells, those = [], [r for r in mine if r["variant"] == variant]
            for count in counts:
                here, naive = (
                    [r for r in mine if (r["variant"], r["devices"]) == (v, count)] for v in (variant, NAIVE)
                )
                cells += [spread([100 * r["accuracy"] for r in here])]
                cells += ["" if variant == NAIVE else difference(here, naive, "accuracy")]
            lost = [r["lost"] for r in those if r["lost"] is not None]
            cells += [f"{statistics.mean(r['bytes_up'] for r in those):,.0f}", spread(lost, 3)]
            out += [f"| {variant} | {len({r['seed'] for r in those})} | " + " | ".join(cells) + " |"]
    return "\n".join(out)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--train", default="lora:8")
    parser.add_argument("--devices", default="3,10,50")
    parser.add_argument("--variants", default="", help=f"some of {'; '.join(VARIANTS)}, with ; between")
    parser.add_argument("--partition", default="dirichlet:0.5")
    parser.add_argument("--examples", type=int, default=2000, help="of the training set, for all devices; 0: all")
    parser.add_argument("--test-examples", type=int, default=0, help="0: all")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    arguments = asked(parser, table)
    if arguments is None:
        return
    chosen = arguments.variants.split(";") if arguments.variants else list(VARIANTS)
    done = {
        (r["data"], r["partition"], r["train"], r["learning_rate"], r["devices"], r["seed"], r["variant"])
        for r in whole_rows(arguments.out)
    }
    for seed in map(int, arguments.seeds.split(",")):
        for devices in map(int, arguments.devices.split(",")):
            key = (arguments.data.name, arguments.partition, arguments.train, arguments.learning_rate, devices, seed)
            missing = [v for v in chosen if (*key, v) not in done]
            if missing:
                run_seed(arguments, devices, seed, missing)
    print(table(whole_rows(arguments.out)))


if __name__ == "__main__":
    main()
