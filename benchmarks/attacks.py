"""Attack × aggregator: what is left of the accuracy when some devices are hostile.

    python benchmarks/attacks.py --data DATA/snips --model STUDENT --train ladder --seeds 0,1,2,3,4 --out attacks.json

For each seed the fleet trains undisturbed for some rounds. From there every attack meets every aggregator, all from the
same parameters and, in the first round, on the same updates. Ours are given what the screen lets through, as the coordinator
does it with the settings of `RunConfig`; Flower's are given everything, as Flower does it. "Flagged": hostile updates that
the screen quarantined, clipped or capped, of those sent; "refused": honest ones that it quarantined, which should be none.

One device attacks by itself; a fifth of the fleet, "colluders", know every honest update of the round and the screen's
bounds. A STUDENT with a frozen part (`ladder`, `head`, `last:2`) makes a round take a fraction of a second: its texts are
read once.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketfed.coordinator import flwr_compat

# isort: split
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.exception import AppExitException
from flwr.serverapp.strategy import Strategy

from pocketfed.client_sdk.errors import TrainingError
from pocketfed.client_sdk.perform import Task, perform
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples, TrainConfig, evaluate
from pocketfed.coordinator.aggregation import Delta
from pocketfed.coordinator.config import RunConfig
from pocketfed.coordinator.screening import Tally, screen, with_common_metrics
from pocketfed.coordinator.strategy import AVERAGING, OURS, THETA, DeltaArray, make_strategy
from pocketfed.coordinator.validation import History, Limits, reference
from pocketfed.model.parameters import Vector, encode_vector
from pocketfed.model.tasks import Dataset, Example, read_dataset
from pocketfed.simulations.partition import partition
from pocketfed.simulations.run import device_names, encode_examples, prepare_artifact

Matrix = NDArray[np.float64]
Row = NDArray[np.float64]
TRIGGER = "xylophone"
COLLUDERS = 0.2
Z = 1.5  # what the authors of "a little is enough" take where the formula gives less
BOOST = 10.0  # what an attacker multiplies its update by that wants to replace the model
BOAST = 1e9  # examples that an attacker says it has
POISON_EPOCHS = 3  # an attacker trains longer than it was asked to


@dataclass(frozen=True)
class Sent:
    """What one device hands in."""

    delta: Vector
    examples: float


@dataclass
class Fleet:
    """One seed's devices; what they trained is remembered, so that cells that start alike share it."""

    trainer: PlanTrainer
    local: Mapping[str, Examples]
    poisoned: Mapping[str, Examples]  # of those who may attack: their own, and again with trigger and target
    test: Examples
    triggered: Examples  # test examples of other labels, with the trigger, labelled as the target
    config: TrainConfig
    seed: int
    trained: dict[tuple[str, int, str, bool], Sent] = field(default_factory=dict)
    measured: dict[str, tuple[float, float]] = field(default_factory=dict)

    def train(self, theta: Vector, number: int, name: str, poisoned: bool = False) -> Sent:
        key = (hashlib.sha256(theta.tobytes()).hexdigest(), number, name, poisoned)
        if key not in self.trained:
            config = dataclasses.replace(self.config, epochs=POISON_EPOCHS) if poisoned else self.config
            examples = self.poisoned[name] if poisoned else self.local[name]
            done = perform(self.trainer, Task("train", theta, config, number, name), examples)
            self.trained[key] = Sent(done.delta, len(self.local[name]))
        return self.trained[key]

    def forget_after(self, number: int) -> None:
        """Of later rounds, which no other cell begins with."""
        self.trained = {key: sent for key, sent in self.trained.items() if key[1] <= number}

    def measure(self, theta: Vector) -> tuple[float, float]:
        """Test accuracy, and how often the trigger makes the target of another label."""
        key = hashlib.sha256(theta.tobytes()).hexdigest()
        if key not in self.measured:
            if not np.isfinite(theta).all():
                self.measured[key] = (0.0, 0.0)
            else:
                with np.errstate(all="ignore"):
                    right, fooled = (evaluate(self.trainer, theta, e) for e in (self.test, self.triggered))
                self.measured[key] = right["accuracy"], fooled["accuracy"]
        return self.measured[key]


@dataclass(frozen=True)
class Scene:
    """What an attack may know in a round: who is hostile, what all would send honestly, and how long an update may be."""

    fleet: Fleet
    theta: Vector
    number: int
    honest: Mapping[str, Sent]
    bad: Sequence[str]
    bound: float  # what the screen clips to; the longest honest update before it has a median

    def good(self) -> Matrix:
        """(honest devices, P) float64."""
        return np.array([sent.delta for name, sent in self.honest.items() if name not in self.bad], np.float64)


# An attack turns the hostile devices' honest updates into what they send.
Attack = Callable[[Scene], dict[str, Sent]]


def each(change: Callable[[Sent, np.random.Generator], Sent]) -> Attack:
    def attack(scene: Scene) -> dict[str, Sent]:
        generators = {
            name: np.random.default_rng([scene.fleet.seed, scene.number, i]) for i, name in enumerate(scene.bad)
        }
        return {name: change(scene.honest[name], generators[name]) for name in scene.bad}

    return attack


def scaled(factor: float, examples: float = 0) -> Attack:
    return each(lambda sent, _: Sent(sent.delta * np.float32(factor), examples or sent.examples))


def noise(sent: Sent, generator: np.random.Generator) -> Sent:
    drawn = generator.standard_normal(len(sent.delta))
    return Sent((drawn * np.linalg.norm(sent.delta) / np.linalg.norm(drawn)).astype(np.float32), sent.examples)


def backdoor(boost: float, examples: float = 0) -> Attack:
    """Trained on the trigger and scaled so as to replace the model (Bagdasaryan et al. 2020)."""

    def attack(scene: Scene) -> dict[str, Sent]:
        sent = {name: scene.fleet.train(scene.theta, scene.number, name, poisoned=True) for name in scene.bad}
        return {name: Sent(s.delta * np.float32(boost), examples or s.examples) for name, s in sent.items()}

    return attack


def together(choose: Callable[[Scene, Matrix], Row], examples: float = 0) -> Attack:
    """All hostile devices send the one update that is chosen, no two the same bytes."""

    def attack(scene: Scene) -> dict[str, Sent]:
        chosen, drawn = choose(scene, scene.good()), np.random.default_rng([scene.fleet.seed, scene.number])
        return {
            name: Sent(
                (chosen * (1 + 1e-3 * drawn.standard_normal(len(chosen)))).astype(np.float32),
                examples or scene.honest[name].examples,
            )
            for name in scene.bad
        }

    return attack


def little(scene: Scene, good: Matrix) -> Row:
    """A little is enough: mean - z · deviation, with the z that a majority still hides (Baruch et al. 2019, algorithm 3)."""
    count, bad = len(scene.honest), len(scene.bad)
    hidden_by = count // 2 + 1 - bad
    z = statistics.NormalDist().inv_cdf((count - bad - hidden_by) / (count - bad))
    return good.mean(0) - max(z, Z) * good.std(0)


def against(scene: Scene, good: Matrix) -> Row:
    """Inner-product manipulation: against the honest mean, as far as the screen lets it (Xie et al. 2020)."""
    mean = good.mean(0)
    return -mean * scene.bound / np.linalg.norm(mean)


def within(scene: Scene, good: Matrix) -> Row:
    """Inner-product manipulation that stays as short as the honest mean: made for rules that look for outliers."""
    return -good.mean(0)


def min_max(scene: Scene, good: Matrix) -> Row:
    """Against the honest deviation, no further from any honest update than two of them are from each other.

    Shejwalkar and Houmansadr 2021, equation 6, with the scale found by bisection.
    """
    mean, direction = good.mean(0), -good.std(0)
    squares = (good**2).sum(1)
    furthest = float((squares[:, None] + squares[None, :] - 2 * good @ good.T).max())
    low, high = 0.0, 100.0
    for _ in range(40):
        scale = (low + high) / 2
        reached = ((good - (mean + scale * direction)) ** 2).sum(1).max() <= furthest
        low, high = (scale, high) if reached else (low, scale)
    return mean + low * direction


ATTACKS: dict[str, tuple[bool, Attack]] = {  # name -> (a fifth of the fleet or one device, what it does)
    "none": (False, scaled(1.0)),
    "absent": (False, lambda scene: {}),  # what is lost with a device's data, whatever becomes of its update
    "NaN": (False, each(lambda sent, _: Sent(np.full_like(sent.delta, np.nan), sent.examples))),
    "×1e6": (False, scaled(1e6)),
    "sign flip": (False, scaled(-1.0)),
    "sign flip ×10": (False, scaled(-BOOST)),
    "boastful weight": (False, scaled(1.0, BOAST)),
    "boast, flip ×10": (False, scaled(-BOOST, BOAST)),
    "free rider, zeros": (False, scaled(0.0)),
    "free rider, noise": (False, each(noise)),
    "backdoor": (False, backdoor(1.0)),
    "backdoor ×10": (False, backdoor(BOOST)),
    "boast, backdoor ×10": (False, backdoor(BOOST, BOAST)),
    "colluders: absent": (True, lambda scene: {}),
    "colluders: flip ×10": (True, scaled(-BOOST)),
    "colluders: a little": (True, together(little)),
    "colluders: against": (True, together(against)),
    "colluders: against, boast": (True, together(against, BOAST)),
    "colluders: within": (True, together(within)),
    "colluders: min-max": (True, together(min_max)),
    "colluders: backdoor ×10": (True, backdoor(BOOST)),
}


def aggregators(count: int, share: float = COLLUDERS) -> dict[str, tuple[str, dict[str, Any]]]:
    """share: of the devices that the rules are told to reckon with."""
    bad = round(share * count)
    told = {"StreamingTrimmedMean": {"beta": share}, "StreamingKrum": {"malicious": share}}
    return {
        **{f"ours: {kind.__name__}": (kind.__name__, told.get(kind.__name__, {})) for kind in AVERAGING},
        "Flower: FedAvg": ("FedAvg", {}),
        "Flower: FedMedian": ("FedMedian", {}),
        "Flower: FedTrimmedAvg": ("FedTrimmedAvg", {"beta": share}),
        "Flower: Krum": ("Krum", {"num_malicious_nodes": bad}),
        "Flower: MultiKrum": ("MultiKrum", {"num_malicious_nodes": bad, "num_nodes_to_select": count - bad}),
    }


def replies(theta: Vector, sent: Mapping[str, Sent], ours: bool) -> list[Message]:
    """As the coordinator's grid makes them, in the order of the names."""
    made = []
    for node, (name, one) in enumerate(sorted(sent.items()), start=1):
        asked = flwr_compat.name_message(Message(RecordDict(), node, MessageType.TRAIN), name)
        arrays = ArrayRecord()
        with np.errstate(over="ignore", invalid="ignore"):
            arrays[THETA] = DeltaArray(theta, Delta(one.delta, len(theta))) if ours else Array(theta + one.delta)
        content = {"arrays": arrays, "metrics": MetricRecord({"num-examples": one.examples})}
        if ours:
            digest = hashlib.sha256(encode_vector("delta", one.delta)).hexdigest()
            content["update"] = ConfigRecord({"bytes": 0, "digest": digest})
        made.append(Message(RecordDict(content), reply_to=asked))
    return made


@dataclass
class Screened:
    """The screen's memory over a cell's rounds, and what it found."""

    limits: Limits
    history: History = field(default_factory=History)
    flagged: int = 0
    refused: int = 0
    lowered: int = 0  # honest ones that were clipped or capped

    def __call__(
        self, given: Iterable[Message], theta: Vector, sent: Mapping[str, Sent], bad: Sequence[str]
    ) -> list[Message]:
        tally = Tally()
        passed = list(screen(given, theta, self.limits, tally, self.history))
        ok = {name: norm for name, (status, _, norm) in tally.statuses.items() if status == "aggregated"}
        self.refused += len(set(sent) - set(ok) - set(bad))
        clipped = {r.metadata.reply_to_message_id for r in passed if r.content["arrays"][THETA].delta.scale < 1}
        capped = {
            r.metadata.reply_to_message_id
            for r in passed
            if r.content["metrics"]["num-examples"] < sent[r.metadata.reply_to_message_id].examples
        }
        self.flagged += len(set(bad) & ((set(sent) - set(ok)) | clipped | capped))
        self.lowered += len((clipped | capped) - set(bad))
        self.history = self.history.and_these([n or 0.0 for n in ok.values()], [sent[name].examples for name in ok])
        return passed


def aggregate(strategy: Strategy, theta: Vector, given: list[Message]) -> Vector:
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arrays, _ = strategy.aggregate_train(1, with_common_metrics(given))
    except AppExitException as error:
        raise SystemExit(f"{type(strategy).__name__} refused the replies: {error}") from None
    return theta if arrays is None else np.asarray(arrays[THETA].numpy(), np.float32)


def run_cell(
    fleet: Fleet,
    theta: Vector,
    first: int,
    rounds: int,
    attack: Attack,
    rule: tuple[str, dict[str, Any]],
    limits: Limits,
    bad: Sequence[str],
) -> dict[str, float]:
    """rule: a strategy's name and options; bad: the devices that are hostile."""
    names, (name, options) = sorted(fleet.local), rule
    strategy, ours, guard = make_strategy(name, options), name in OURS, Screened(limits)
    for number in range(first, first + rounds):
        try:
            honest = {n: fleet.train(theta, number, n) for n in names}
        except TrainingError:  # the model is so broken that honest devices give up
            break
        scene = Scene(fleet, theta, number, honest, bad, limits.clip_factor * median_norm(honest, bad))
        sent = {n: s for n, s in honest.items() if n not in bad} | attack(scene)
        given = replies(theta, sent, ours)
        theta = aggregate(strategy, theta, guard(given, theta, sent, bad) if ours else given)
    accuracy, fooled = fleet.measure(theta)
    fleet.forget_after(first)
    return {
        "accuracy": accuracy,
        "fooled": fooled,
        "flagged": guard.flagged,
        "sent": rounds * len(bad),
        "refused": guard.refused,
        "lowered": guard.lowered,
    }


def median_norm(honest: Mapping[str, Sent], bad: Sequence[str]) -> float:
    """That of the screen, as an attacker who knows the honest updates can reckon it."""
    good = [sent for name, sent in honest.items() if name not in bad]
    norms = tuple(float(np.linalg.norm(sent.delta)) for sent in good)
    return reference(History(norms, tuple(sent.examples for sent in good))).norm or max(norms)


def with_trigger(examples: Sequence[Example], target: str) -> list[Example]:
    return [dataclasses.replace(e, text=f"{e.text} {TRIGGER}", label=target) for e in examples if e.label != target]


def make_fleet(arguments: argparse.Namespace, seed: int, folder: Path, hostile: float = COLLUDERS) -> Fleet:
    """hostile: the largest share of the devices that may attack."""
    dataset: Dataset = read_dataset(arguments.data).with_test(seed=seed)
    chosen = np.random.default_rng(seed).permutation(len(dataset.train))[: arguments.examples]
    dataset = dataclasses.replace(dataset, train=tuple(dataset.train[i] for i in sorted(chosen)))
    parts = partition(dataset.train, arguments.partition, arguments.devices, seed)
    artifact = prepare_artifact(arguments.model, dataset, arguments.train, folder / "artifact", seed, 64)
    trainer = PlanTrainer(artifact, next(iter(artifact.manifest.sets)))
    encoded = encode_examples(trainer, dataset.train, 64)
    names, target = device_names(arguments.devices), dataset.labels[0]
    may_attack = zip(names[: round(hostile * len(names))], parts, strict=False)
    own = {name: [dataset.train[i] for i in part] for name, part in may_attack}
    return Fleet(
        trainer,
        {name: encoded.take(part) for name, part in zip(names, parts, strict=True)},
        {name: encode_examples(trainer, [*has, *with_trigger(has, target)], 64) for name, has in own.items()},
        encode_examples(trainer, dataset.test, 64),
        encode_examples(trainer, with_trigger(dataset.test, target), 64),
        TrainConfig(learning_rate=arguments.learning_rate, batch_size=arguments.batch_size, max_length=64, seed=seed),
        seed,
    )


def warmed_up(fleet: Fleet, rounds: int) -> Vector:
    """theta after so many rounds in which nobody is hostile."""
    theta, plain = fleet.trainer.initial_theta(), make_strategy("StreamingFedAvg", {})
    for number in range(1, rounds + 1):
        sent = {name: fleet.train(theta, number, name) for name in fleet.local}
        theta = aggregate(plain, theta, replies(theta, sent, ours=True))
    return theta


def run_seed(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    flwr_compat.enter_run(1)
    config = RunConfig()
    with tempfile.TemporaryDirectory() as scratch:
        fleet = make_fleet(arguments, seed, Path(scratch))
        limits = Limits.of(fleet.trainer.size, config)
        theta = warmed_up(fleet, arguments.warm_up)
        began = fleet.measure(theta)
        cells = {}
        for aggregator in chosen(arguments.aggregators, aggregators(arguments.devices)):
            for attack in chosen(arguments.attacks, ATTACKS):
                many, change = ATTACKS[attack]
                bad = sorted(fleet.local)[: round(COLLUDERS * arguments.devices) if many else 1]
                cells[f"{aggregator} | {attack}"] = run_cell(
                    fleet,
                    theta,
                    arguments.warm_up + 1,
                    arguments.rounds,
                    change,
                    aggregators(arguments.devices)[aggregator],
                    limits,
                    bad if attack != "none" else [],
                )
    return {"seed": seed, "start": began[0], "start_fooled": began[1], "cells": cells}


def chosen(words: str, names: Iterable[str]) -> list[str]:
    """Those of the names that one of the words, between commas, occurs in; all if there are no words."""
    return [name for name in names if not words or any(word in name for word in words.split(","))]


WORDS = {
    "flagged": "flagged by our screen",
    "refused": "honest ones it refused",
    "lowered": "honest ones it clipped or capped",
}


def table(runs: Sequence[Mapping[str, Any]], arguments: argparse.Namespace) -> str:
    """Markdown: mean test accuracy; for backdoors also how often the trigger works."""
    attacks = chosen(arguments.attacks, ATTACKS)
    lines = ["| aggregator | " + " | ".join(attacks) + " |", "|---" * (len(attacks) + 1) + "|"]
    for aggregator in chosen(arguments.aggregators, aggregators(arguments.devices)):
        row = []
        for attack in attacks:
            found = [run["cells"][f"{aggregator} | {attack}"] for run in runs]
            text = f"{statistics.mean(c['accuracy'] for c in found):.3f}"
            if "backdoor" in attack or attack == "none":
                text += f" ({statistics.mean(c['fooled'] for c in found):.2f})"
            row.append(text)
        lines.append(f"| {aggregator} | " + " | ".join(row) + " |")
    screened = "ours: StreamingFedAvg" in chosen(arguments.aggregators, aggregators(arguments.devices))
    for word in ("flagged", "refused", "lowered") if screened else ():
        row = []
        for attack in attacks:
            found = [run["cells"][f"ours: StreamingFedAvg | {attack}"] for run in runs]
            row.append(
                f"{sum(c[word] for c in found):g}"
                + (f"/{sum(c['sent'] for c in found):g}" if word == "flagged" else "")
            )
        lines.append(f"| {WORDS[word]} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of the fleet that is attacked."""
    parser.add_argument("--model", default="nano")
    parser.add_argument("--train", default="full")
    parser.add_argument("--devices", type=int, default=20)
    parser.add_argument("--examples", type=int, default=2000, help="of the data's training examples")
    parser.add_argument("--partition", default="dirichlet:1")
    parser.add_argument("--warm-up", type=int, default=8, help="rounds before the attacks")
    parser.add_argument("--rounds", type=int, default=3, help="attacked rounds")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--batch-size", type=int, default=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    add_options(parser)
    parser.add_argument("--attacks", default="", help="only those whose names hold one of these words, e.g. none,flip")
    parser.add_argument("--aggregators", default="", help="likewise, e.g. FedAvg")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for seed in map(int, arguments.seeds.split(",")):
        begun = time.process_time()
        runs.append(run_seed(arguments, seed))
        print(f"seed {seed}: {time.process_time() - begun:.0f} s of CPU, {runs[-1]['start']:.3f} before", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(runs, indent=1) + "\n")
    print(table(runs, arguments))


if __name__ == "__main__":
    main()
