"""What each part of a distillation is worth: objectives, strategies and norms at equal steps of the student, several seeds.

    python benchmarks/ablation.py --corpus DATA/text --data DATA/snips,DATA/glue/SST-2 --out ablation.jsonl --seeds 0,1,2,3,4
    python benchmarks/ablation.py --corpus DATA/text --teacher BERT --preset pocket --steps 400 --variants bert --out bert.jsonl
    python benchmarks/ablation.py --table ablation.jsonl

The variants follow tables 8 and 9 of Sun et al. 2020. Without `--teacher` one inverted-bottleneck teacher is trained a seed, and all
variants learn from it; the student has the preset's steps, or `--steps`. Measured are hidden words guessed on held-out text and, after
the same fine-tuning, accuracy on each data set (at most `--examples` of its training examples). Rows are gone on with.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketfed.coordinator import distilling
from pocketfed.model.finetuning import Recipe
from pocketfed.model.rows import append_row, whole_rows
from pocketfed.model.tasks import Dataset, read_dataset
from pocketfed.model.trials import Plan, Start, run_trials

Row = dict[str, Any]
PLAIN = {"strategy": "progressive", "feature_maps": False, "attention": False}
# What is set in the schedule; "student": what is set in the student.
OBJECTIVES: Mapping[str, Mapping[str, Any]] = {
    "masked words alone": {"strategy": "none"},
    "+ PD": PLAIN,
    "+ PD + FMT": PLAIN | {"feature_maps": True},
    "+ PD + FMT + AT (progressive)": {"strategy": "progressive"},
}
STRATEGIES = {"auxiliary": {"strategy": "auxiliary"}, "joint": {"strategy": "joint"}}
NORMS = {
    "LayerNorm and GELU": {  # as table 8's row without the operational optimizations
        "strategy": "progressive",
        "student": {"normalization_type": "layer_norm", "hidden_act": "gelu"},
    }
}
BERT = {
    "sentence vectors alone": {"strategy": "auxiliary", "feature_maps": False, "attention": False},
    "+ FMT": {"strategy": "auxiliary", "attention": False},
    "+ FMT + AT (auxiliary)": {"strategy": "auxiliary"},
    "joint": {"strategy": "joint"},
    "progressive": {"strategy": "progressive"},
}
SETS = {"paper": {**OBJECTIVES, **STRATEGIES, **NORMS}, "bert": BERT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--data", default="", help="data sets to fine-tune on, separated by commas")
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--variants", choices=sorted(SETS), default="paper")
    parser.add_argument("--steps", type=int, help="of the student; by default the preset's")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--examples", type=int, default=4000, help="of each data set's training split")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of `pocketfed distill`")
    parser.add_argument("--out", type=Path, default=Path("ablation.jsonl"))
    parser.add_argument("--table", type=Path, help="print the table of a file of rows, and do nothing else")
    arguments = parser.parse_args()
    if arguments.table:
        print_table(whole_rows(arguments.table))
        return
    if arguments.corpus is None:
        parser.error("--corpus is missing; name a folder of texts")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    datasets = [_read(Path(name), arguments.examples) for name in filter(None, arguments.data.split(","))]
    with tempfile.TemporaryDirectory(prefix="pocketfed-") as work:
        for seed in map(int, arguments.seeds.split(",")):
            run_seed(arguments, seed, Path(work), datasets)
    print_table(whole_rows(arguments.out))


def run_seed(arguments: argparse.Namespace, seed: int, work: Path, datasets: Sequence[Dataset]) -> None:
    """All variants with one teacher; those that the file of rows has are left out."""
    done = {(row["variant"], row["seed"]) for row in whole_rows(arguments.out)}
    missing = {name: v for name, v in SETS[arguments.variants].items() if (name, seed) not in done}
    if not missing:
        return
    overrides = dict(part.split("=", 1) for part in arguments.set)
    options = distilling.DistillOptions(teacher=arguments.teacher)
    material = distilling.prepare_distillation(
        [arguments.corpus],
        arguments.preset,
        work,
        arguments.steps if arguments.teacher else None,
        seed,
        overrides,
        options,
    )
    if arguments.teacher is None:
        begun = time.process_time()
        tensors, score = train_teacher(material)
        material = dataclasses.replace(material, teacher_weights=tensors)
        if arguments.steps:
            schedule = material.schedule.scaled(arguments.steps, material.student.num_hidden_layers, taught_first=False)
            material = dataclasses.replace(material, schedule=schedule)
        print(f"seed {seed}: teacher {score}, {time.process_time() - begun:.0f} s", flush=True)
    for name, variant in missing.items():
        changes = {k: v for k, v in variant.items() if k != "student"}
        chosen = dataclasses.replace(
            material,
            schedule=dataclasses.replace(material.schedule, **changes),
            student=material.student.with_changes(**variant.get("student", {})),
        )
        begun = time.process_time()
        result = chosen.start(None, None).run()
        start = Start(name, chosen.student, result.student, chosen.vocabulary)
        row: Row = {
            "variant": name,
            "seed": seed,
            "preset": arguments.preset,
            "steps": chosen.schedule.student_steps,
            **{f"held-out {k}": v for k, v in dataclasses.asdict(result.scores["student"]).items()},
            **fine_tuned(start, datasets, arguments, seed),
            "cpu_s": time.process_time() - begun,
        }
        append_row(arguments.out, row)
        print(row, flush=True)


def train_teacher(material: distilling.Material) -> tuple[dict[str, Tensor], str]:
    """The teacher's stage alone: a run whose student has next to nothing to do."""
    least = {"transfer_steps": 0, "distillation_steps": 1, "strategy": "progressive"}
    short = dataclasses.replace(material, schedule=dataclasses.replace(material.schedule, **least))
    result = short.start(None, None).run()
    return result.teacher, f"{result.scores['teacher']}"


def fine_tuned(start: Start, datasets: Iterable[Dataset], arguments: argparse.Namespace, seed: int) -> dict[str, float]:
    recipe = Recipe(epochs=arguments.epochs, batch_size=32, learning_rate=arguments.learning_rate, max_length=64)
    measured = {}
    for dataset in datasets:
        (row,) = run_trials(dataset, [start], Plan(recipe, (seed,)))
        measured[dataset.name] = row["test"][dataset.metric]
    return measured


def _read(path: Path, count: int) -> Dataset:
    return read_dataset(path).with_test(seed=0).with_fewer(count)


def print_table(rows: Sequence[Row]) -> None:
    """Mean and standard deviation over the seeds, a line a variant."""
    names = [k for k in (rows[0] if rows else {}) if k not in ("variant", "seed", "preset", "steps")]
    print("| variant | seeds | steps | " + " | ".join(names) + " |")
    print("|---|---|---|" + "---|" * len(names))
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        cells = []
        for name in names:
            values = [row[name] for row in mine if row.get(name) is not None]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        print(f"| {variant} | {len(mine)} | {mine[0]['steps']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
