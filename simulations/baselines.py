"""What a federated run is compared with on the same data: one place, every device alone, and the model before."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from pocketfed.client_sdk.errors import TrainingError
from pocketfed.client_sdk.order import derive_seed, permutation
from pocketfed.client_sdk.trainer import Batch, Examples, TrainConfig, Trainer, evaluate, train
from pocketfed.coordinator.config import RunConfig
from pocketfed.model.parameters import Vector, decode_vector, encode_vector
from pocketfed.simulations.served import Spread, Yardstick, spread_of

LINES = ("central", "local", "previous")
ALONE = 50  # devices that are trained alone, at most: chosen by the run's seed
MOST_EPOCHS = 1000  # that TrainConfig allows


class BaselineError(ValueError):
    """A line that there is none of."""


@dataclass(frozen=True)
class Line:
    """accuracy, loss: on the test; of `local` the mean over the devices that were trained. own: on the devices' examples.

    on_test: of `local`, the spread on the test. curve: accuracy on the test after so many epochs. cpu_s: what it took.
    why: there is none, or none of some devices.
    """

    accuracy: float | None
    loss: float | None
    own: Spread | None = None
    on_test: Spread | None = None
    epochs: int = 0
    devices: int = 0
    curve: Mapping[int, float] = field(default_factory=dict)
    cpu_s: float = 0.0
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        told = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        spreads = {k: v.to_dict() for k, v in told.items() if isinstance(v, Spread)}
        return told | spreads | {"curve": {str(k): v for k, v in self.curve.items()}}


def parse_lines(text: str) -> tuple[str, ...]:
    """`none`, `all`, or some of LINES with commas between.

    Raises:
        BaselineError: another one.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if words in (["none"], ["all"]):
        return LINES if words == ["all"] else ()
    for word in words:
        if word not in LINES:
            raise BaselineError(f"there is no baseline {word!r}; choose of {', '.join(LINES)}, or none, or all")
    return tuple(line for line in LINES if line in words)


def budget(run: RunConfig, devices: int) -> int:
    """Epochs that a device goes through in the run, on average: the same number is given to those it is compared with.

    >>> budget(RunConfig(rounds=20, cohort=5), devices=10)
    10
    >>> budget(RunConfig(rounds=20, cohort=8, mode="fedbuff", buffer=2), devices=10)
    4
    """
    counted = run.buffer if run.mode == "fedbuff" else run.cohort or devices  # in a round
    share = min(1.0, counted / devices)
    return min(MOST_EPOCHS, max(1, round(run.rounds * run.local.epochs * share)))


def training(run: RunConfig, devices: int, together: bool) -> TrainConfig:
    """As the run's devices train, for the whole budget in one go: a rate that falls over the rounds falls over that.

    Args:
        together: all devices' data is in one place.
    """
    local = dataclasses.asdict(run.local)
    local |= {} if run.round_schedule == "constant" else {"schedule": run.round_schedule, "warmup": 0.0}
    steps = run.local.max_steps * math.ceil(budget(run, devices) / run.local.epochs) * (devices if together else 1)
    return TrainConfig(
        **local | {"epochs": budget(run, devices), "max_steps": steps, "proximal_mu": 0.0, "seed": run.seed}
    )


class _Watched:
    """A trainer that looks at theta whenever an epoch begins: the loop itself stays that of the devices."""

    def __init__(self, trainer: Trainer, steps: int, look: Callable[[int, Vector], None]) -> None:
        self._trainer, self._steps, self._look, self._done = trainer, steps, look, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)

    def gradient(self, theta: Vector, batch: Batch) -> tuple[float, int, Vector]:
        if self._done and self._done % self._steps == 0:
            self._look(self._done // self._steps, theta)
        self._done += 1
        return self._trainer.gradient(theta, batch)


def central(
    trainer: Trainer,
    theta: Vector,
    examples: Examples,
    test: Examples,
    config: TrainConfig,
    progress: Callable[[float], None] = lambda fraction: None,
) -> tuple[Line, Vector]:
    """All of the devices' examples in one place, for as many epochs as a device goes through in the run; and theta then."""
    began = time.process_time()
    curve: dict[int, float] = {}

    def look(epoch: int, now: Vector) -> None:
        measured = evaluate(trainer, now, test)
        if "accuracy" in measured:
            curve[epoch] = measured["accuracy"]

    look(0, theta)
    held = math.floor(config.holdout * len(examples))
    watched: Any = _Watched(trainer, math.ceil((len(examples) - held) / config.batch_size), look)
    trained = theta + train(watched, theta, examples, config, progress=progress).delta
    measured = evaluate(trainer, trained, test)
    if "accuracy" in measured:
        curve[config.epochs] = measured["accuracy"]
    spent = round(time.process_time() - began, 3)
    return Line(measured.get("accuracy"), measured["loss"], None, None, config.epochs, 0, curve, spent), trained


def local(
    trainer: Trainer,
    theta: Vector,
    parts: Mapping[str, Examples],
    test: Examples,
    config: TrainConfig,
    stick: Yardstick | None,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Line:
    """Each device by itself, on its own examples only; ALONE of them where there are more."""
    began = time.process_time()
    names = sorted(parts)
    chosen = [names[i] for i in sorted(permutation(len(names), derive_seed(config.seed, 0, "alone"))[:ALONE])]
    on_test: dict[str, float] = {}
    own: dict[str, float] = {}
    losses: list[float] = []
    why = ""
    for done, name in enumerate(chosen, 1):
        mine = dataclasses.replace(config, seed=derive_seed(config.seed, 0, name))
        try:
            trained = theta + train(trainer, theta, parts[name], mine).delta
        except TrainingError as error:  # a round would have gone on without it, too
            why = f"{name}: {error}"
            continue
        measured = evaluate(trainer, trained, test)
        losses.append(measured["loss"])
        if "accuracy" in measured:
            on_test[name] = measured["accuracy"]
        if stick is not None and name in stick.devices:
            own[name] = stick.accuracy(trainer, trained, name)
        progress(done / len(chosen))
    spread = spread_of(on_test, "the test")
    return Line(
        accuracy=spread.mean if spread else None,
        loss=statistics.fmean(losses) if losses else None,
        own=spread_of(own, stick.source if stick else ""),
        on_test=spread,
        epochs=config.epochs,
        devices=len(losses),
        cpu_s=round(time.process_time() - began, 3),
        why=why,
    )


# ---- kept between the runs of a sweep -----------------------------------------------------------------------------------


def key_of(identity: str, theta: Vector, examples: Sequence[Examples], config: TrainConfig) -> str:
    """What a central line depends on, and nothing else: a partition, say, does not change it."""
    digest = sha256(identity.encode() + theta.tobytes())
    for part in examples:
        for row in part.rows:
            digest.update(len(row).to_bytes(4, "little") + np.asarray(row, np.int32).tobytes())
        digest.update(repr([np.asarray(label).tolist() for label in part.labels]).encode())
    digest.update(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    return digest.hexdigest()[:32]


def kept_central(
    folder: Path | None, key: str, size: int, make: Callable[[], tuple[Line, Vector]]
) -> tuple[Line, Vector]:
    """From `folder`, where an earlier run of the same has put it; else made, and put there."""
    if folder is None:
        return make()
    path, vector = folder / f"{key}.json", folder / f"{key}.safetensors"
    if path.exists():
        held = json.loads(path.read_text())
        line = Line(**held | {"curve": {int(k): v for k, v in held["curve"].items()}})
        return line, decode_vector("theta", vector.read_bytes(), size)
    line, theta = make()
    folder.mkdir(parents=True, exist_ok=True)
    for place, content in ((vector, encode_vector("theta", theta)), (path, json.dumps(line.to_dict()).encode())):
        partial = place.with_name(f"{place.name}.{os.getpid()}.partial")  # two processes may make the same
        partial.write_bytes(content)
        os.replace(partial, place)
    return line, theta
