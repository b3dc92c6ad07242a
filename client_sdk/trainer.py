"""Local training: batches, the loop, and what a trainer must be able to do."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pocketfed.client_sdk.errors import ConfigurationError, NoExamples, TrainingDiverged, TrainingStopped
from pocketfed.client_sdk.optimizers import OPTIMIZERS, make_optimizer
from pocketfed.model.parameters import Vector

BUCKET_BATCHES = 16  # so many batches' examples are sorted by length together: little padding, still well mixed
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class TrainConfig:
    """How to train locally; the fields are those of `TrainConfig` in fleet.proto.

    Raises:
        ConfigurationError: a value out of its range.
    """

    epochs: int = 1
    batch_size: int = 16
    learning_rate: float = 1e-3
    optimizer: str = "adamw"
    momentum: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: no clipping
    proximal_mu: float = 0.0
    seed: int = 0
    max_length: int = 64  # tokens
    max_steps: int = 0  # 0: no limit

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "epochs": (1, 1000),
            "batch_size": (1, 4096),
            "learning_rate": (0, 100),
            "momentum": (0, 1),
            "weight_decay": (0, 100),
            "max_grad_norm": (0, math.inf),
            "proximal_mu": (0, 1e6),
            "seed": (0, 2**64 - 1),
            "max_length": (3, 65536),
            "max_steps": (0, 1e9),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            whole = isinstance(type(self).__dataclass_fields__[name].default, int)
            number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not number or not low <= value <= high:
                kind = "whole number" if whole else "number"
                raise ConfigurationError(f"{name} is {value!r}; it must be a {kind} between {low:g} and {high:g}")
        if self.optimizer not in OPTIMIZERS:
            raise ConfigurationError(f"there is no optimizer {self.optimizer!r}; choose one of {', '.join(OPTIMIZERS)}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TrainConfig:
        """From names written with - or _; what this version does not know is ignored."""
        types: dict[str, type] = {f.name: type(f.default) for f in dataclasses.fields(cls)}
        known = {k.replace("-", "_"): v for k, v in values.items() if k.replace("-", "_") in types}
        return cls(**{k: types[k](v) for k, v in known.items()})


@dataclass(frozen=True)
class Examples:
    """Tokenized, labelled examples: one id row each (no padding), labels (N,) int64."""

    rows: tuple[Ids, ...]
    labels: Ids

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Batch:
    """ids and mask (B, T) int64, labels (B,) int64."""

    ids: Ids
    mask: Ids
    labels: Ids


class Trainer(Protocol):
    """Computes with the model; the loop around it is the same for all."""

    size: int  # of theta

    def encode(self, texts: Sequence[str], pairs: Sequence[str | None] | None, max_length: int) -> tuple[Ids, ...]:
        """One id row a text."""

    def gradient(self, theta: Vector, batch: Batch) -> tuple[float, int, Vector]:
        """Mean loss, how many were right, and the loss's gradient (P,)."""

    def logits(self, theta: Vector, ids: Ids, mask: Ids) -> NDArray[np.float32]:
        """(B, labels)"""


@dataclass(frozen=True)
class Trained:
    """delta (P,) is trained minus given parameters; metrics are numbers a device may tell."""

    delta: Vector
    num_examples: int
    metrics: Mapping[str, float]


def derive_seed(seed: int, round_number: int, device: str) -> int:
    """The seed of one device's part in one round: the same wherever it runs, different for every device and round."""
    digest = hashlib.sha256(f"{seed}/{round_number}/{device}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def pad(rows: Sequence[Ids]) -> tuple[Ids, Ids]:
    """Rows of ids to ids and mask (B, T); [PAD] has id 0."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


def make_batch(examples: Examples, chosen: Sequence[int] | Ids) -> Batch:
    ids, mask = pad([examples.rows[i] for i in chosen])
    return Batch(ids, mask, examples.labels[np.asarray(chosen)])


def epoch_batches(examples: Examples, batch_size: int, generator: np.random.Generator) -> Iterator[Batch]:
    """All examples once, in random order, those of similar length together."""
    order = generator.permutation(len(examples))
    lengths = np.array([len(examples.rows[i]) for i in order])
    window = batch_size * BUCKET_BATCHES
    batches: list[Ids] = []
    for start in range(0, len(order), window):
        piece = order[start : start + window]
        piece = piece[np.argsort(lengths[start : start + window], kind="stable")]
        batches += [piece[i : i + batch_size] for i in range(0, len(piece), batch_size)]
    for index in generator.permutation(len(batches)):
        yield make_batch(examples, batches[index])


def train(
    trainer: Trainer,
    theta: Vector,
    examples: Examples,
    config: TrainConfig,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Trained:
    """Train a copy of theta on the examples; theta itself is not touched.

    Args:
        config: with the device's own seed (see `derive_seed`).
        should_stop: asked before every step.
        progress: told the fraction done, 0 to 1, after every step.

    Raises:
        NoExamples: nothing to train on.
        TrainingStopped: should_stop said so.
        TrainingDiverged: a loss, gradient or parameter is not finite.
    """
    if not len(examples):
        raise NoExamples("the device has no labelled examples; add some before it takes part")
    started = time.perf_counter()
    generator = np.random.Generator(np.random.PCG64(config.seed))
    optimizer = make_optimizer(config.optimizer, config.learning_rate, config.momentum, config.weight_decay)
    current = theta.copy()
    per_epoch = math.ceil(len(examples) / config.batch_size)
    total = min(per_epoch * config.epochs, config.max_steps or per_epoch * config.epochs)
    steps = 0
    for _ in range(config.epochs):
        if steps == total:
            break  # before the sums are begun anew: the metrics are those of the last epoch with a step
        loss_sum, right, seen = 0.0, 0, 0
        for batch in epoch_batches(examples, config.batch_size, generator):
            if steps == total:
                break
            if should_stop():
                raise TrainingStopped(f"stopped after {steps} of {total} steps")
            loss, correct, gradient = trainer.gradient(current, batch)
            _add_proximal(gradient, current, theta, config.proximal_mu)
            _clip(gradient, config.max_grad_norm, loss, steps)
            optimizer.step(current, gradient)
            steps += 1
            loss_sum, right, seen = loss_sum + loss * len(batch.labels), right + correct, seen + len(batch.labels)
            progress(steps / total)
    if not np.isfinite(current).all():
        raise TrainingDiverged(
            f"the parameters are not finite after {steps} steps; use a learning rate below {config.learning_rate:g}"
        )
    metrics = {
        "loss": loss_sum / seen,
        "accuracy": right / seen,
        "steps": float(steps),
        "seconds": time.perf_counter() - started,
    }
    return Trained(current - theta, len(examples), metrics)


def _add_proximal(gradient: Vector, current: Vector, start: Vector, mu: float) -> None:
    """FedProx's pull towards the start (Li et al. 2020, eq. 2), in place."""
    if mu:
        gradient += np.float32(mu) * (current - start)


def _clip(gradient: Vector, max_norm: float, loss: float, step: int) -> None:
    """Scale the gradient down to max_norm, in place.

    Raises:
        TrainingDiverged: loss or gradient is not finite.
    """
    norm = math.sqrt(float(np.dot(gradient, gradient)))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingDiverged(
            f"loss {loss:g} and gradient norm {norm:g} at step {step + 1} are not both finite; use a lower learning rate"
        )
    if max_norm and norm > max_norm:
        gradient *= np.float32(max_norm / norm)


def evaluate(
    trainer: Trainer,
    theta: Vector,
    examples: Examples,
    batch_size: int = 64,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Mean loss and accuracy over the examples.

    Raises:
        NoExamples: nothing to evaluate on.
        TrainingStopped: should_stop, asked before every batch, said so.
    """
    if not len(examples):
        raise NoExamples("there are no labelled examples to evaluate on; add some first")
    order = np.argsort([len(r) for r in examples.rows], kind="stable")
    loss_sum, right = 0.0, 0
    for start in range(0, len(order), batch_size):
        if should_stop():
            raise TrainingStopped(f"stopped after {start} of {len(order)} examples")
        batch = make_batch(examples, order[start : start + batch_size])
        logits = trainer.logits(theta, batch.ids, batch.mask).astype(np.float64)
        shifted = logits - logits.max(1, keepdims=True)
        log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        loss_sum -= float(log_probabilities[np.arange(len(batch.labels)), batch.labels].sum())
        right += int((logits.argmax(1) == batch.labels).sum())
    return {"loss": loss_sum / len(examples), "accuracy": right / len(examples)}
