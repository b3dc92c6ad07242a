"""Which trainable set to choose for one's own data: a short, equal trial of several, each in a process of its own.

The processes import what a device imports and no more, so that time and memory are those of a device.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pocketfed.client_sdk.artifacts import open_artifact
from pocketfed.client_sdk.errors import ConfigurationError, PocketfedError, TrainingDiverged
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples, TrainConfig, evaluate, train
from pocketfed.model.parameters import encode_vector
from pocketfed.model.shipped import SHIPPED
from pocketfed.model.tasks import DataError, Dataset, Example, read_dataset

if TYPE_CHECKING:
    from pocketfed.model.config import MobileBertConfig

CANDIDATES = ("head", "ladder", "norms", "bias", "lora:8@1", "lora:8@2", "lora:8", "last:1", "last:2", "full")
RATES = (1e-3, 4e-3, 1.6e-2)
HELD_OUT = 1 / 3  # of the trial's examples
TIMED_EXAMPLES = 256  # at most, of a local round; a longer one takes proportionally longer
THIN = 20  # examples a label
MOST_EPOCHS = 1000  # that TrainConfig allows


class AdviseError(ValueError):
    """Advice that cannot be given."""


@dataclass(frozen=True)
class Limits:
    """What a device may spend; None: whatever it takes.

    Args:
        memory_mb: the whole process, resident, in 10^6 bytes.
        update_kb: one update as it is sent, uncompressed, in 10^3 bytes.
        cpu_s: the first local round, the longest, plans opened and all, on one thread of this machine.

    Raises:
        AdviseError: one that is not positive.
    """

    memory_mb: float | None = None
    update_kb: float | None = None
    cpu_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("memory", self.memory_mb), ("bytes", self.update_kb), ("time", self.cpu_s)):
            if value is not None and not 0 < value < math.inf:
                raise AdviseError(f"the limit on {name} is {value:g}; give a positive number, or none for no limit")


@dataclass(frozen=True)
class AdviseConfig:
    """What to try.

    Args:
        model: a model folder, or a preset (a student that starts untrained).
        sets: trainable sets; empty: those of CANDIDATES that the model is deep enough for.
        devices: the training split is shared among so many; a local round is `epochs` over one share.
        examples: of the training split, for the trial; a third of them is held out to measure on.
        steps: of training at each of the rates.
    """

    data: Path
    model: str = SHIPPED
    sets: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    devices: int = 10
    epochs: int = 1
    examples: int = 1500
    steps: int = 300
    rates: tuple[float, ...] = RATES
    batch_size: int = 16
    max_length: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Candidate:
    """One trainable set, measured. standard_error: of the accuracy, from the number of examples held out.

    in_parts: batches had to be computed in smaller parts to stay below the limit on memory.
    """

    trainable_set: str
    parameters: int
    accuracy: float
    standard_error: float
    learning_rate: float
    first_round_cpu_s: float
    later_round_cpu_s: float
    peak_mb: float
    update_bytes: int
    in_parts: bool = False

    def excess(self, limits: Limits) -> dict[str, float]:
        """What it needs more of than is allowed, in words -> how many times as much."""
        spent = (
            (self.peak_mb, limits.memory_mb, "MB of memory"),
            (self.update_bytes / 1e3, limits.update_kb, "kB an update"),
            (self.first_round_cpu_s, limits.cpu_s, "CPU seconds a round"),
        )
        return {
            f"{needed:.4g} {what} ({allowed:g} allowed)": needed / allowed
            for needed, allowed, what in spent
            if allowed is not None and needed > allowed
        }


@dataclass(frozen=True)
class Advice:
    """choice: None where no candidate is within the limits. why: one sentence, of the nearest one then."""

    candidates: tuple[Candidate, ...]
    choice: str | None
    why: str
    labels: int
    train_examples: int
    held_out_examples: int
    round_examples: int
    limits: Limits
    rates: tuple[float, ...]
    seed: int

    @property
    def at_an_end(self) -> list[str]:
        """Sets whose best learning rate is the lowest or highest tried: another one may be better still."""
        return [c.trainable_set for c in self.candidates if c.learning_rate in (min(self.rates), max(self.rates))]

    @property
    def is_thin(self) -> bool:
        """So few examples a label that the order of the sets may be another with more."""
        return self.train_examples < THIN * self.labels

    def to_dict(self) -> dict[str, Any]:
        """What `advise --json` prints."""
        return dataclasses.asdict(self)


def standard_error(accuracy: float, count: int) -> float:
    """Of a share, as if one right and one wrong answer more had been seen: all right is not certainty.

    >>> round(standard_error(0.5, 98), 3), round(standard_error(1.0, 98), 3)
    (0.05, 0.01)
    """
    share = (accuracy * count + 1) / (count + 2)
    return math.sqrt(share * (1 - share) / (count + 2))


def choose(candidates: Sequence[Candidate], limits: Limits) -> tuple[str | None, str]:
    """The most accurate within the limits; of those within one standard error of it, the one with the smallest update.

    Returns the set (None where no candidate fits) and why, in one sentence.
    """
    fitting = [c for c in candidates if not c.excess(limits)]
    if not fitting:
        nearest = min(candidates, key=lambda c: (max(c.excess(limits).values()), c.update_bytes))
        needs = " and ".join(nearest.excess(limits))
        return None, f"no set stays within the limits; the nearest is {nearest.trainable_set}, which needs {needs}"
    best = max(fitting, key=lambda c: (c.accuracy, -c.update_bytes))
    tied = [c for c in fitting if c.accuracy >= best.accuracy - best.standard_error]
    chosen = min(tied, key=lambda c: (c.update_bytes, -c.accuracy))
    among = f"of the {len(fitting)} sets tried" if len(fitting) == len(candidates) else "of those within the limits"
    if len(fitting) == 1:
        why = f"{chosen.trainable_set} is the only set {'tried' if len(candidates) == 1 else 'within the limits'}"
    elif chosen is best:
        why = f"{chosen.trainable_set} is the most accurate {among}, and no smaller update comes within one standard error of it"
    else:
        why = (
            f"{chosen.trainable_set} has the smallest update {among} that lie within one standard error "
            f"({best.standard_error:.3f}) of the most accurate, {best.trainable_set}: {chosen.accuracy:.3f} "
            f"against {best.accuracy:.3f}, {chosen.update_bytes / 1e3:.4g} kB against {best.update_bytes / 1e3:.4g}"
        )
    return chosen.trainable_set, why


def advise(config: AdviseConfig, on_step: Callable[[str], None] = lambda step: None) -> Advice:
    """Try the candidates one after the other. The data's test split is not looked at.

    Args:
        on_step: told, in words, what is being done.

    Raises:
        AdviseError, DataError, TrainableSetError, ConfigError, CheckpointError: what is wrong with the request.
    """
    sets = config.sets or _fitting_sets(config.model)
    _check(config, sets)
    on_step("reading the data")
    dataset = read_dataset(config.data).with_test(seed=config.seed)
    trial = _split(dataset, config)
    share = max(1, len(dataset.train) // config.devices)
    with tempfile.TemporaryDirectory(prefix="pocketfed-") as scratch:
        folder = Path(scratch)
        (folder / "trial.json").write_text(json.dumps(_describe(trial, share, config)))
        measured = []
        for number, name in enumerate(sets, 1):
            on_step(f"trying {name}, {number} of {len(sets)}")
            measured.append(_try(name, folder / str(number), dataset, len(trial.test), config))
    choice, why = choose(measured, config.limits)
    return Advice(
        candidates=tuple(measured),
        choice=choice,
        why=why,
        labels=len(dataset.labels),
        train_examples=len(trial.train),
        held_out_examples=len(trial.test),
        round_examples=share,
        limits=config.limits,
        rates=config.rates,
        seed=config.seed,
    )


# ---- preparing ---------------------------------------------------------------------------------------------------------


def _fitting_sets(model: str) -> tuple[str, ...]:
    """The candidates that the model has enough blocks for, none of them twice under another name."""
    from pocketfed.model.adapters import parse_set

    config = _config_of(model)
    fitting = []
    for name in CANDIDATES:
        chosen = parse_set(name)
        blocks = chosen.number if chosen.kind == "last" else chosen.blocks + 1 if chosen.blocks else 0
        wide_enough = chosen.kind != "lora" or chosen.number <= config.intra_bottleneck_size
        if blocks <= config.num_hidden_layers and wide_enough:
            fitting.append(name)
    return tuple(fitting)


def _config_of(model: str) -> MobileBertConfig:
    from pocketfed.model.checkpoints import load
    from pocketfed.model.config import preset
    from pocketfed.model.shipped import starts_untrained

    return preset(model) if starts_untrained(model) else load(Path(model)).config


def _check(config: AdviseConfig, sets: Sequence[str]) -> None:
    """Better now than after the first trials."""
    from pocketfed.model.adapters import parse_set

    layers = _config_of(config.model).num_hidden_layers
    for name in sets:
        chosen = parse_set(name)
        asked = chosen.number if chosen.kind == "last" else chosen.blocks
        if asked > layers:
            raise AdviseError(f"{name!r} asks for {asked} blocks, the model has {layers}; leave it out")
    twice = next((name for i, name in enumerate(sets) if name in sets[:i]), None)
    if twice is not None:
        raise AdviseError(f"the set {twice!r} is there twice; give each once")
    least = {"devices": 1, "epochs": 1, "examples": 3, "steps": 1}
    for key, low in least.items():
        if getattr(config, key) < low:
            raise AdviseError(f"{key} is {getattr(config, key)}; give at least {low}")
    if not config.rates:
        raise AdviseError("there is no learning rate to try; give at least one")
    for rate in config.rates:
        TrainConfig(
            learning_rate=rate, batch_size=config.batch_size, epochs=config.epochs, max_length=config.max_length
        )


def _split(dataset: Dataset, config: AdviseConfig) -> Dataset:
    """The trial's share of the training split: `train` to train on, `test` held out of it."""
    labelled = [e for e in dataset.train if e.label is not None]
    order = np.random.Generator(np.random.PCG64(config.seed)).permutation(len(labelled))[: config.examples]
    sample = dataclasses.replace(dataset, train=tuple(labelled[i] for i in order), dev=(), test=())
    try:
        return sample.with_test(HELD_OUT, config.seed)
    except DataError:
        raise AdviseError(
            f"{config.data} has {len(labelled)} training examples, of which {len(sample.train)} may be used: too few to "
            "hold some out; give more"
        ) from None


def _describe(trial: Dataset, share: int, config: AdviseConfig) -> dict[str, Any]:
    index = {label: i for i, label in enumerate(trial.labels)}

    def rows(examples: Sequence[Example]) -> dict[str, Any]:
        return {
            "texts": [e.text for e in examples],
            "pairs": [e.text_pair for e in examples],
            "labels": [index[e.label or ""] for e in examples],
        }

    keys = ("epochs", "steps", "rates", "batch_size", "max_length", "seed")
    settings = {key: getattr(config, key) for key in keys}
    return {"train": rows(trial.train), "held_out": rows(trial.test), "share": share, **settings}


def _try(name: str, folder: Path, dataset: Dataset, held_out: int, config: AdviseConfig) -> Candidate:
    """Build the artifact and train; where that took too much memory, a local round again in the memory allowed."""
    from pocketfed.simulations.preparing import prepare_artifact

    # The whole split, for an untrained student's vocabulary: its size is part of what `full` sends.
    artifact = prepare_artifact(config.model, dataset, name, folder, config.seed, config.max_length)
    words = [str(folder), artifact.manifest.version, name]
    found = _in_a_process([*words, "0", "accuracy"], folder.parent)
    limit, in_parts = config.limits.memory_mb, False
    if limit is not None and found["peak_mb"] > limit:
        again = _in_a_process([*words, str(limit), "round"], folder.parent)
        if not again.get("refused") and again["peak_mb"] <= limit:
            found, in_parts = found | again, True
    return Candidate(name, **found, standard_error=standard_error(found["accuracy"], held_out), in_parts=in_parts)


def _in_a_process(words: Sequence[str], folder: Path) -> dict[str, Any]:
    """
    Raises:
        AdviseError: it failed; the sentence is its own.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pocketfed.simulations.advise", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = (done.stderr.strip() or "it said nothing; is there enough memory?").splitlines()[-1]
        raise AdviseError(f"the trial of {words[2]} ended with {done.returncode}: {said}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# ---- in a process of its own -------------------------------------------------------------------------------------------


def _main(folder: str, version: str, name: str, limit_mb: str, purpose: str) -> dict[str, Any]:
    """Measure a local round; with purpose "accuracy" also what the set can learn."""
    trial = json.loads((Path(folder).parent / "trial.json").read_text())
    artifact = open_artifact(Path(folder), version)
    try:
        trainer = PlanTrainer(artifact, name, max_memory_mb=float(limit_mb))
        found = _measure_round(trainer, trial)
    except ConfigurationError as error:
        if float(limit_mb):
            return {"refused": str(error)}
        raise
    update = len(encode_vector("theta", trainer.initial_theta()))
    found |= {"parameters": trainer.size, "update_bytes": update}
    return found | (_measure_accuracy(trainer, trial) if purpose == "accuracy" else {})


def _measure_round(trainer: PlanTrainer, trial: Mapping[str, Any]) -> dict[str, Any]:
    """CPU seconds of a device's first round, and of a later one, when the cache holds what the frozen part made."""
    mine = _examples(trainer, trial, "train", min(trial["share"], TIMED_EXAMPLES))
    times = max(1.0, trial["share"] / len(mine))
    config = _local_config(trial, epochs=trial["epochs"])
    theta = trainer.initial_theta()
    opening = time.process_time()
    train(trainer, theta, _examples(trainer, trial, "held_out", 1), dataclasses.replace(config, max_steps=1))
    begun = time.process_time()
    trained = train(trainer, theta, mine, config)
    again = time.process_time()
    train(trainer, theta + trained.delta, mine, config)
    return {
        "first_round_cpu_s": begun - opening + times * (again - begun),
        "later_round_cpu_s": times * (time.process_time() - again),
        "peak_mb": _peak_mb(),
    }


def _measure_accuracy(trainer: PlanTrainer, trial: Mapping[str, Any]) -> dict[str, Any]:
    """Of the best learning rate, on what was held out."""
    mine, held_out = _examples(trainer, trial, "train"), _examples(trainer, trial, "held_out")
    theta = trainer.initial_theta()
    epochs = min(MOST_EPOCHS, math.ceil(trial["steps"] * trial["batch_size"] / len(mine)))
    tried = []
    for rate in trial["rates"]:
        config = _local_config(
            trial, epochs=epochs, max_steps=trial["steps"], learning_rate=rate, schedule="linear", warmup=0.1
        )
        try:
            delta = train(trainer, theta, mine, config).delta
        except TrainingDiverged:
            continue
        measured = evaluate(trainer, theta + delta, held_out)
        tried.append((measured["accuracy"], -measured["loss"], rate))
    if not tried:
        rates = ", ".join(f"{r:g}" for r in trial["rates"])
        raise TrainingDiverged(f"training diverged at every learning rate ({rates}); try lower ones")
    accuracy, _, rate = max(tried)
    return {"accuracy": accuracy, "learning_rate": rate}


def _local_config(trial: Mapping[str, Any], **changes: Any) -> TrainConfig:
    shared = {key: trial[key] for key in ("batch_size", "max_length", "seed")}
    return TrainConfig(**shared, **changes)


def _examples(trainer: PlanTrainer, trial: Mapping[str, Any], split: str, most: int | None = None) -> Examples:
    held = trial[split]
    rows = trainer.encode(held["texts"][:most], held["pairs"][:most], trial["max_length"])
    return Examples(rows, np.array(held["labels"][:most], np.int64), truncated=rows.truncated)


def _peak_mb() -> float:
    """Linux: VmHWM, as ru_maxrss begins with what the parent held. Elsewhere that, in KiB (macOS: bytes)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most * (1 if sys.platform == "darwin" else 1024) / 1e6


if __name__ == "__main__":
    try:
        print(json.dumps(_main(*sys.argv[1:])))
    except PocketfedError as mistake:
        sys.exit(str(mistake))
