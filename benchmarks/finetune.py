"""Fine-tuning on a device: every trainable set, with plans or PyTorch, against what a user would otherwise do.

    python benchmarks/finetune.py --sets last:2,ladder --peers hf-full,peft-best --length 128 --batch 16 --repeats 5
    python benchmarks/finetune.py --model STUDENT --data DATA/snips --examples 0 --learning-rate 2e-3 --sets lora:8@3

A local round is 3 epochs over 128 examples unless said otherwise. Each run is a process of its own, the variants take
turns (A B C, A B C, ...), times are CPU seconds of the whole process, all threads; medians with minimum and maximum. The
artifacts are built beforehand, as the coordinator would. Peers: see peers.py. Needs `pip install 'pocketfed[benchmarks]'`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import LABELS, BenchmarkError, Rows, chosen, interleaved, made_up, peak_rss_mb, ratio, table

COLUMNS = {
    "cpu_s_cold": "CPU s to first step",
    "cpu_s_step": "CPU s a step",
    "cpu_s_round": "CPU s a round",
    "cpu_s_warm": "CPU s, later rounds",
    "peak_rss_mb": "peak MB",
    "update_bytes": "update, bytes",
    "accuracy": "accuracy",
}
TEXTS = "texts.json"  # beside an artifact: what the device holds and what it is tested on


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One local round of ours, in this process, which imports nothing but the SDK (and torch where that trains)."""
    import numpy as np

    from pocketfed.client_sdk.artifacts import open_artifact
    from pocketfed.client_sdk.trainer import Examples, TrainConfig, evaluate, make_batch, train

    artifact = open_artifact(arguments.artifact)
    trainer = _trainer(arguments, artifact)
    held = json.loads((arguments.artifact.parent / TEXTS).read_text())

    def examples(split: str) -> Examples:
        if held[split] and isinstance(held[split][0], str):
            rows: Any = trainer.encode(held[split], None, arguments.length)
        else:
            rows = [np.array(row, np.int64) for row in held[split]]
        return Examples(rows, np.array(held[f"{split}_labels"], np.int64))

    mine = examples("train")
    theta = trainer.initial_theta()
    config = TrainConfig(
        epochs=arguments.epochs,
        batch_size=arguments.batch,
        learning_rate=arguments.learning_rate,
        schedule=arguments.schedule,
        seed=arguments.seed,
        max_length=arguments.length,
    )
    trainer.gradient(theta, make_batch(mine, range(min(arguments.batch, len(mine)))))
    cold = time.process_time()
    steps: list[float] = []
    gradient = trainer.gradient

    def timed(*given: Any) -> Any:
        begun = time.process_time()
        result = gradient(*given)
        steps.append(time.process_time() - begun)
        return result

    trainer.gradient = timed
    if trainer._cache is not None:  # what the first step left there would flatter the round
        trainer._cache.clear()
    begun = time.process_time()
    trained = train(trainer, theta, mine, config)
    first = time.process_time() - begun
    begun = time.process_time()
    if arguments.warm:
        train(trainer, theta + trained.delta, mine, config)
    warm = time.process_time() - begun
    peak = peak_rss_mb()
    test = evaluate(trainer, theta + trained.delta, examples("test")) if held["test"] else {}
    return {
        "set": arguments.set,
        "trainer": arguments.trainer,
        "activations": arguments.activations,
        "batch": arguments.batch,
        "length": arguments.length,
        "threads": arguments.threads,
        "seed": arguments.seed,
        "examples": len(mine),
        "cpu_s_cold": round(cold, 4),
        "cpu_s_step": round(statistics.median(steps), 4),
        "cpu_s_round": round(first, 4),
        "cpu_s_warm": round(warm, 4) if arguments.warm else None,
        "peak_rss_mb": round(peak, 1),
        "update_bytes": 4 * trainer.size,
        "loss": trained.metrics["loss"],
        "accuracy": test.get("accuracy"),
    }


def _trainer(arguments: argparse.Namespace, artifact: Any) -> Any:
    if arguments.trainer == "plan":
        from pocketfed.client_sdk.plan_trainer import PlanTrainer

        return PlanTrainer(artifact, arguments.set, arguments.threads, max_memory_mb=arguments.max_memory_mb)
    import torch

    from pocketfed.client_sdk.torch_trainer import TorchTrainer

    torch.set_num_threads(arguments.threads)
    precision: Any = "auto" if arguments.trainer == "torch-bf16" else "float32"
    return TorchTrainer(artifact, arguments.set, precision)


def build(arguments: argparse.Namespace, sets: list[str], activations: list[str], seed: int, folder: Path) -> None:
    """Artifacts `activations/artifact` with all the sets, and the texts beside them."""
    from pocketfed.coordinator.artifacts import build_artifact
    from pocketfed.model.checkpoints import load, tokens_of
    from pocketfed.model.config import STUDENTS, preset
    from pocketfed.model.tasks import read_dataset
    from pocketfed.model.tokenization import Vocabulary, train_vocabulary

    student = None if arguments.model in STUDENTS else load(Path(arguments.model))
    config = preset(arguments.model) if student is None else student.config
    if arguments.data is None:
        labels = [str(i) for i in range(LABELS)]
        rows, targets = made_up(arguments.examples, arguments.length, config.vocab_size, seed, arguments.mixed)
        held: dict[str, Any] = {"train": rows, "train_labels": targets, "test": [], "test_labels": []}
        fillers = [f"t{i}" for i in range(config.vocab_size - 5)]
        vocabulary = Vocabulary(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *fillers))
    else:
        dataset = read_dataset(arguments.data).with_test(seed=seed)
        labels = list(dataset.labels)
        mine = [dataset.train[i] for i in chosen(len(dataset.train), arguments.examples, seed)]
        held = {}
        for split, texts in (("train", mine), ("test", list(dataset.test))):
            usable = [e for e in texts if e.label in set(labels)]
            held[split] = [e.text for e in usable]
            held[f"{split}_labels"] = [labels.index(e.label or "") for e in usable]
        vocabulary = train_vocabulary(held["train"], config.vocab_size) if student is None else tokens_of(student)
        if student is None:
            config = config.with_changes(vocab_size=len(vocabulary))
    for kind in activations:
        (folder / kind).mkdir()
        (folder / kind / TEXTS).write_text(json.dumps(held))
        build_artifact(
            folder / kind / "artifact",
            config=config,
            state={} if student is None else student.state,
            vocabulary=vocabulary,
            labels=labels,
            trainable_sets=sets,
            quantized=True,
            activations=kind,
            seed=seed,
        )


def commands(arguments: argparse.Namespace, folder: Path, seed: int) -> dict[str, list[str]]:
    """Variant -> what measures it."""
    own = ("sets", "trainers", "peers", "repeats", "set", "trainer", "activations", "artifact", "seed", "model", "data")
    given = [
        word
        for key, value in vars(arguments).items()
        if key not in own and value is not None and value is not False
        for word in ([f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)]))
    ]
    made: dict[str, list[str]] = {}
    for name in filter(None, arguments.peers.split(",")):
        made[name] = [
            sys.executable,
            str(Path(__file__).with_name("peers.py")),
            "--peer",
            name,
            "--model",
            arguments.model,
        ]
        made[name] += ["--seed", str(seed)] + (["--data", str(arguments.data)] if arguments.data else [])
        shared = ("batch", "length", "threads", "examples", "epochs")
        made[name] += [word for key in shared for word in (f"--{key}", str(getattr(arguments, key)))]
        if arguments.peer_rate:
            made[name] += ["--learning-rate", str(arguments.peer_rate)]
    for kind in arguments.activations.split(","):
        for trainer in arguments.trainers.split(","):
            for name in arguments.sets.split(","):
                words = ["--set", name, "--trainer", trainer, "--activations", kind, "--seed", str(seed)]
                words += ["--artifact", str(folder / kind / "artifact")]
                made[f"{name} {trainer} {kind}"] = [sys.executable, os.path.abspath(__file__), *words, *given]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default="norms,lora:8,lora:8@2,last:2,ladder,head")
    parser.add_argument("--trainers", default="plan", help="of plan, torch, torch-bf16")
    parser.add_argument("--activations", default="float32", help="of float32, int8")
    parser.add_argument("--peers", default="", help="of peers.py")
    parser.add_argument("--peer-rate", type=float, help="the peers' learning rate, where not their usual one")
    parser.add_argument("--model", default="mobilebert", help="a preset (random weights) or a model folder")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the first repeat; with --data each has its own")
    parser.add_argument("--examples", type=int, default=128, help="0: all")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--schedule", default="linear")
    parser.add_argument("--mixed", action="store_true", help="made-up rows of 4 to LENGTH tokens")
    parser.add_argument("--max-memory-mb", type=float, default=0.0)
    parser.add_argument("--warm", action="store_true", help="measure a second round too, whose prefix is cached")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--set", help="measure one, in this process")
    parser.add_argument("--trainer", default="plan")
    parser.add_argument("--artifact", type=Path)
    arguments = parser.parse_args()
    if arguments.set:
        print(json.dumps(measure(arguments)))
        return
    results: dict[str, Rows] = {}
    try:
        for repeat in range(arguments.repeats):
            seed = arguments.seed + repeat if arguments.data else arguments.seed
            if repeat == 0 or arguments.data:
                scratch = tempfile.TemporaryDirectory(prefix="finetune-")
                folder = Path(scratch.name)
                build(arguments, arguments.sets.split(","), arguments.activations.split(","), seed, folder)
            done = interleaved(
                commands(arguments, folder, seed),
                1,
                arguments.threads,
                lambda name, row: print(json.dumps({"variant": name} | row), flush=True),
            )
            for name, rows in done.items():
                results.setdefault(name, []).extend(rows)
    except BenchmarkError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    print(table(results, COLUMNS))
    for peer in filter(None, arguments.peers.split(",")):
        for name, rows in results.items():
            if name != peer:
                print(f"{name}: {peer} needs {ratio(rows, results[peer], 'cpu_s_round')} times its CPU a round")


if __name__ == "__main__":
    main()
