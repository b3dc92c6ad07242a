"""What a student is worth where devices train little of it: several tasks and seeds in one place, by the device's own plans.

    python benchmarks/students.py --model shipped --data DATA/snips,DATA/banking77 --train head,last:2 --seeds 0,1,2,3,4 --out rows.jsonl
    python benchmarks/students.py --table rows.jsonl

Beside it stands TF-IDF of words and pairs of words with logistic regression, on the same examples. A seed decides the order of
the examples; what lies below everything that is trained is computed once a text and serves all seeds. Test is the data set's test
split or, where that has no labels, its dev; nothing is chosen on it. Rows are gone on with. `DATA@5` trains for 5 epochs there.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples, TrainConfig, make_batch
from pocketfed.model.metrics import classification_scores
from pocketfed.model.parameters import Vector
from pocketfed.model.rows import append_row, whole_rows
from pocketfed.model.shipped import SHIPPED
from pocketfed.model.tasks import Dataset, read_dataset
from pocketfed.model.tfidf import tfidf_guesses
from pocketfed.simulations.central import train_centrally
from pocketfed.simulations.run import encode_examples, prepare_artifact

FLOOR = "TF-IDF, logistic regression"
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED)
    parser.add_argument("--data", default="", help="data sets, separated by commas; @EPOCHS after one")
    parser.add_argument("--train", default="head")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("students.jsonl"))
    parser.add_argument("--table", type=Path, help="print the table of a file of rows, and do nothing else")
    arguments = parser.parse_args()
    if arguments.table:
        print_table(whole_rows(arguments.table))
        return
    for named in filter(None, arguments.data.split(",")):
        name, _, epochs = named.partition("@")
        dataset = read_dataset(Path(name)).with_test(seed=0)
        measure_floor(dataset, arguments.out)
        for train in arguments.train.split(","):
            measure(dataset, train, int(epochs or arguments.epochs), arguments)
    print_table(whole_rows(arguments.out))


def measure_floor(dataset: Dataset, out: Path) -> None:
    if any(row["start"] == FLOOR and row["data"] == dataset.name for row in whole_rows(out)):
        return
    scores = classification_scores(tfidf_guesses(dataset), [e.label or "" for e in dataset.test], dataset.labels)
    append_row(
        out, {"data": dataset.name, "start": FLOOR, "train": "", "metric": dataset.metric, "seed": 0, "test": scores}
    )


def measure(dataset: Dataset, train: str, epochs: int, arguments: argparse.Namespace) -> None:
    key = {
        "data": dataset.name,
        "start": arguments.model,
        "train": train,
        "epochs": epochs,
        "rate": arguments.learning_rate,
    }
    done = {row["seed"] for row in whole_rows(arguments.out) if key.items() <= row.items()}
    missing = [seed for seed in map(int, arguments.seeds.split(",")) if seed not in done]
    if not missing:
        return
    expected = [e.label or "" for e in dataset.test]
    with tempfile.TemporaryDirectory(prefix="pocketfed-") as folder:
        artifact = prepare_artifact(arguments.model, dataset, train, Path(folder) / "artifact", 0, arguments.max_length)
        trainer = PlanTrainer(artifact, train)
        examples = encode_examples(trainer, dataset.train, arguments.max_length)
        test = encode_examples(trainer, dataset.test, arguments.max_length)
        for seed in missing:
            begun = time.process_time()
            config = TrainConfig(
                epochs=epochs,
                batch_size=arguments.batch_size,
                learning_rate=arguments.learning_rate,
                seed=seed,
                max_length=arguments.max_length,
                schedule="linear",
                warmup=0.1,
            )
            theta = train_centrally(trainer, examples, config)
            guessed = guesses(trainer, theta, test, dataset.labels)
            row: Row = key | {
                "metric": dataset.metric,
                "seed": seed,
                "test": classification_scores(guessed, expected, dataset.labels),
                "trainable": len(theta),
                "cpu_s": time.process_time() - begun,
            }
            append_row(arguments.out, row)
            print(row, flush=True)


def guesses(trainer: PlanTrainer, theta: Vector, examples: Examples, labels: Sequence[str]) -> list[str]:
    """The likeliest label of each example, in their order."""
    said = np.zeros(len(examples), np.int64)
    order = np.argsort([len(row) for row in examples.rows], kind="stable")
    for start in range(0, len(order), 64):
        places = order[start : start + 64]
        batch = make_batch(examples, places)
        said[places] = trainer.logits(theta, batch.ids, batch.mask).argmax(1)
    return [labels[i] for i in said]


def print_table(rows: Sequence[Row]) -> None:
    """Mean and standard deviation over the seeds of each data set's own measure, a line a start."""
    datasets = list(dict.fromkeys((row["data"], row["metric"]) for row in rows))
    print("| start | trained | " + " | ".join(f"{data}, {metric}" for data, metric in datasets) + " |")
    print("|---|---|" + "---|" * len(datasets))
    for start, train in dict.fromkeys((row["start"], row["train"]) for row in rows):
        cells = []
        for data, metric in datasets:
            mine = [r["test"][metric] for r in rows if (r["start"], r["train"], r["data"]) == (start, train, data)]
            spread = f" ± {statistics.stdev(mine):.3f} ({len(mine)})" if len(mine) > 1 else ""
            cells.append(f"{statistics.mean(mine):.3f}{spread}" if mine else "")
        print(f"| {start} | {train} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
