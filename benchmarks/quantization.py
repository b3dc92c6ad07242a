"""What each quantization scheme costs a task: a whole student fine-tuned, then rounded and measured again.

    python benchmarks/quantization.py --model STUDENT --data DATA/snips,DATA/banking77 --seeds 0,1,2,3,4 --out rows.jsonl

A model is fine-tuned once for each data set and seed; every scheme rounds that very model. int8-qat goes on training it, and
is compared with the float model that went on for as long ("against").
Measured on the test split (GLUE: dev) by the code of `pocketfed evaluate`. Rows stand in --out and are not made twice; the
table has the points lost, mean and least to greatest over seeds. Costs of accuracy are the same wherever it runs: times are
not measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pocketfed.model.calibration import some_rows
from pocketfed.model.checkpoints import Checkpoint, load, tokens_of
from pocketfed.model.downstream import Trial, quantized, rounding_aware, state_of, train_aware, trial_of, with_state
from pocketfed.model.finetuning import Recipe, fine_tune, make_model
from pocketfed.model.packing import packed
from pocketfed.model.quantization import Storage, quantize_state
from pocketfed.model.rows import append_row, whole_rows
from pocketfed.model.schemes import SCHEMES
from pocketfed.model.task_kinds import read_task

# What is told, and how: a name, a scheme, and layers kept wider.
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "int8": ("int8", ()),
    "int8-dynamic": ("int8-dynamic", ()),
    "int8-static": ("int8-static", ()),
    "int8-qat": ("int8-qat", ()),
    "int4": ("int4", ()),
    "int4-words8": ("int4", ("word_embeddings",)),
}


def rows_of(arguments: argparse.Namespace, data: Path, seed: int, done: set[str]) -> Iterator[dict[str, Any]]:
    """One row for each variant that is not there yet, and one for the float model."""
    stem = _stem(arguments, data, seed)
    wanted = [name for name in arguments.schemes if f"{stem} {name}" not in done]
    if not wanted:
        return
    checkpoint = dataclasses.replace(load(arguments.model), labels=None)
    checkpoint = dataclasses.replace(
        checkpoint, state={n: v for n, v in checkpoint.state.items() if not n.startswith("classifier.")}
    )
    trial = _trial(checkpoint, data, arguments, seed)
    recipe = Recipe(arguments.epochs, arguments.batch, arguments.learning_rate, max_length=arguments.length)
    model = make_model(checkpoint.config, checkpoint.state, tokens_of(checkpoint).sep_id, trial.kind, seed)
    model = fine_tune(model, trial.kind, trial.train, recipe, seed).model  # type: ignore[assignment]
    value = trial.score(model)
    texts = some_rows(trial.train)
    for name in wanted:
        scheme, storage = SCHEMES[VARIANTS[name][0]], Storage(SCHEMES[VARIANTS[name][0]].bits, keep=VARIANTS[name][1])
        if scheme.learnt:
            again = dataclasses.replace(recipe, learning_rate=recipe.learning_rate / 2)
            aware = rounding_aware(checkpoint, storage.keep)
            plain, made, _ = train_aware(aware, model, trial, texts, again, seed)
            longer = make_model(checkpoint.config, {}, tokens_of(checkpoint).sep_id, trial.kind, seed)
            against = trial.score(
                fine_tune(with_state(longer, state_of(model)), trial.kind, trial.train, again, seed).model
            )
        else:
            plain, against = model, value
            made, _ = quantized(model, scheme, storage, texts)
        size = len(packed(quantize_state(state_of(plain), storage)[0]))
        after = trial.score(made)
        yield {
            "key": f"{stem} {name}",
            "model": arguments.model.resolve().name,
            "data": data.name,
            "seed": seed,
            "scheme": name,
            "metric": trial.metric,
            "examples": len(trial.dev.examples),
            "float": value,
            "against": against,
            "value": after,
            "lost": against - after,
            "bytes": size,
        }


def _stem(arguments: argparse.Namespace, data: Path, seed: int) -> str:
    """What rows of one fine-tuned model have in common."""
    settings = [arguments.epochs, arguments.learning_rate, arguments.batch, arguments.length, arguments.examples]
    return f"{arguments.model.resolve().name} {data.name} {seed} {settings}"


def _trial(checkpoint: Checkpoint, data: Path, arguments: argparse.Namespace, seed: int) -> Trial:
    """Measured on test; where there is none, on dev. A part of train, if asked for, is drawn by the seed."""
    dataset = read_task(data).with_test()
    order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(seed)).tolist()
    some = tuple(dataset.train[i] for i in sorted(order[: arguments.examples or None]))
    return trial_of(checkpoint, dataclasses.replace(dataset, train=some, dev=()), arguments.length)


def table(rows: list[dict[str, Any]], schemes: list[str]) -> str:
    """Points lost, a line a data set; what float reaches beside it."""
    lines = [
        "| data | metric | seeds | float | " + " | ".join(schemes) + " |",
        "|---|---|---|---|" + "---|" * len(schemes),
    ]
    for data in dict.fromkeys(row["data"] for row in rows):
        mine = [row for row in rows if row["data"] == data]
        floats = list({row["seed"]: row["float"] for row in mine}.values())
        cells = [data, mine[0]["metric"], str(len(floats)), f"{statistics.mean(floats):.2f}"]
        for scheme in schemes:
            lost = [row["lost"] for row in mine if row["scheme"] == scheme]
            told = f"{statistics.mean(lost):+.2f} ({min(lost):+.2f} to {max(lost):+.2f})" if lost else ""
            cells.append(told)
        lines.append("| " + " | ".join(cells) + " |")
    sizes = {scheme: max((row["bytes"] for row in rows if row["scheme"] == scheme), default=0) for scheme in schemes}
    lines.append("| bytes, most | | | | " + " | ".join(f"{sizes[scheme]:,}" for scheme in schemes) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a float model folder")
    parser.add_argument("--data", required=True, help="data sets, as `evaluate` reads them, by commas")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--schemes", default=",".join(VARIANTS))
    parser.add_argument("--examples", type=int, default=0, help="of train; 0: all")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True, help="a file of JSON rows, gone on with if it is there")
    arguments = parser.parse_args()
    arguments.schemes = arguments.schemes.split(",")
    unknown = next((name for name in arguments.schemes if name not in VARIANTS), None)
    if unknown is not None:
        sys.exit(f"{Path(__file__).name}: there is no {unknown!r}; choose of {', '.join(VARIANTS)}")
    torch.set_num_threads(1)
    wanted: set[str] = set()  # rows of another model or other settings in the file are none of this table's
    for data in map(Path, arguments.data.split(",")):
        for seed in map(int, arguments.seeds.split(",")):
            wanted |= {f"{_stem(arguments, data, seed)} {name}" for name in arguments.schemes}
            done = {row["key"] for row in whole_rows(arguments.out)}
            for row in rows_of(arguments, data, seed, done):
                append_row(arguments.out, row)
                print(
                    f"{row['data']}, seed {seed}, {row['scheme']}: {row['value']:.2f}, lost {row['lost']:+.2f}",
                    flush=True,
                )
    rows = [row for row in whole_rows(arguments.out) if row["key"] in wanted]
    print(table(rows, arguments.schemes))


if __name__ == "__main__":
    main()
