"""Local training: batches, the loop, and what a trainer must be able to do."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pocketfed.client_sdk.checkpoint import Checkpoint, fingerprint
from pocketfed.client_sdk.errors import ConfigurationError, NoExamples, TrainingDiverged, TrainingStopped
from pocketfed.client_sdk.optimizers import OPTIMIZERS, Optimizer, make_optimizer
from pocketfed.client_sdk.order import epoch_order, split
from pocketfed.model.parameters import Parameter, Vector

DIVERGED = 10.0  # times the first step's loss, or times 1 where that is less
SCHEDULES = ("constant", "linear", "cosine")
Ids = NDArray[np.int64]
Labels = NDArray[Any] | Sequence[Ids]
T = TypeVar("T")


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
    schedule: str = "constant"  # of the learning rate after the warm-up: constant, linear or cosine to 0
    warmup: float = 0.0  # share of the steps over which the rate rises from 0
    label_smoothing: float = 0.0
    holdout: float = 0.0  # share of the examples that is measured after every epoch instead of trained on
    patience: int = 0  # epochs without a better loss on the holdout before training ends; 0: no early stop

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
            "warmup": (0, 1),
            "label_smoothing": (0, 0.99),
            "holdout": (0, 0.9),
            "patience": (0, 1000),
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
        if self.schedule not in SCHEDULES:
            raise ConfigurationError(f"there is no schedule {self.schedule!r}; choose one of {', '.join(SCHEDULES)}")
        if self.patience and not self.holdout:
            raise ConfigurationError(f"patience {self.patience} needs a holdout to measure on; set one, e.g. 0.1")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TrainConfig:
        """From names written with - (a Flower strategy's, which count) or _; what this version does not know is ignored."""
        types: dict[str, type] = {f.name: type(f.default) for f in dataclasses.fields(cls)}
        own_last = sorted(values.items(), key=lambda item: "-" in item[0])
        known = {k.replace("-", "_"): v for k, v in own_last if k.replace("-", "_") in types}
        return cls(**{k: types[k](v) for k, v in known.items()})


@dataclass(frozen=True)
class Examples:
    """Tokenized, labelled examples.

    rows: ids of each, without padding. labels: (N,) int64 classes; (N,) float32 for regression; (N, 2) int64 first and last
    token for spans; one int64 array a row for tokens, negative where a token has no label. weights: (N,), by default 1.
    truncated: how many lost their end to the limit on tokens.
    """

    rows: Sequence[Ids]
    labels: Labels
    weights: NDArray[np.float32] | None = None
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: Sequence[int] | Ids) -> Examples:
        """Some of them, in that order."""
        places = np.asarray(chosen, np.int64)
        labels = self.labels[places] if isinstance(self.labels, np.ndarray) else tuple(self.labels[i] for i in places)
        weights = None if self.weights is None else self.weights[places]
        return Examples(tuple(self.rows[i] for i in places), labels, weights, self.truncated)


@dataclass(frozen=True)
class Batch:
    """ids and mask (B, T) int64; labels as in `Examples`, those of tokens (B, T); weights (B,) float32, None for 1 each."""

    ids: Ids
    mask: Ids
    labels: NDArray[Any]
    weights: NDArray[np.float32] | None = None
    label_smoothing: float = 0.0
    per_token: bool = False  # labels are (B, T)

    @property
    def answers(self) -> int:
        """How many answers can be right or wrong."""
        counted = np.ones(len(self.ids), np.bool_) if self.weights is None else self.weights > 0
        return int(((self.labels >= 0) & (self.mask == 1))[counted].sum() if self.per_token else counted.sum())

    @property
    def weight(self) -> float:
        """What a mean over the batch is divided by."""
        if self.per_token:
            each = ((self.labels >= 0) & (self.mask == 1)).sum(1)
            return float(each.sum() if self.weights is None else (each * self.weights).sum())
        return float(len(self.ids) if self.weights is None else self.weights.sum())

    def part(self, start: int, stop: int) -> Batch:
        """Some of its examples, without the padding that only the others needed."""
        length = int(self.mask[start:stop].sum(1).max())
        labels = self.labels[start:stop, :length] if self.per_token else self.labels[start:stop]
        weights = None if self.weights is None else self.weights[start:stop]
        ids, mask = self.ids[start:stop, :length], self.mask[start:stop, :length]
        return Batch(ids, mask, labels, weights, self.label_smoothing, self.per_token)


class Trainer(Protocol):
    """Computes with the model; the loop around it is the same for all."""

    identity: str  # of the model and its trainable set: what a checkpoint must be of
    size: int  # of theta
    layout: tuple[Parameter, ...]  # what theta's values are called
    task: str  # classification, regression, tokens or spans
    outputs: int  # labels of the head

    def encode(self, texts: Sequence[str], pairs: Sequence[str | None] | None, max_length: int) -> Sequence[Ids]:
        """One id row a text."""

    def prepare(self, rows: Sequence[Ids], should_stop: Callable[[], bool]) -> None:
        """Told what it will see again and again.

        Raises:
            TrainingStopped: should_stop said so.
        """

    def gradient(self, theta: Vector, batch: Batch) -> tuple[float, int, Vector]:
        """Mean loss, how many answers were right, and the loss's gradient (P,)."""

    def evaluate(self, theta: Vector, batch: Batch) -> tuple[float, int, float]:
        """Mean loss, how many answers were right, and the weight that the mean was taken over."""

    def logits(self, theta: Vector, ids: Ids, mask: Ids) -> NDArray[np.float32]:
        """(B, outputs), or (B, T, outputs) for tokens and spans."""


# Training as a conversation: it asks for the gradient at a theta (P,) on a batch, is told loss, right answers and gradient,
# and ends with T. Whoever leads many of them (simulations/batched.py) may compute the gradients together.
Asking = Generator[tuple[Vector, Batch], tuple[float, int, Vector], T]


def converse(asking: Asking[T], trainer: Trainer) -> T:
    """Lead a training to its end with one trainer's gradients."""
    try:
        theta, batch = next(asking)
        while True:
            theta, batch = asking.send(trainer.gradient(theta, batch))
    except StopIteration as ended:
        result: T = ended.value
        return result


@dataclass(frozen=True)
class Steering:
    """What a run does to a device's steps beside its `TrainConfig`.

    frozen: (P,) True where theta stays as it is. drift: (P,) added to every clipped gradient.
    """

    frozen: NDArray[np.bool_] | None = None
    drift: Vector | None = None

    @property
    def digest(self) -> str:
        """Names it; empty where nothing is steered."""
        held = [a.tobytes() for a in (self.frozen, self.drift) if a is not None]
        return hashlib.sha256(b"".join(held)).hexdigest() if held else ""


UNSTEERED = Steering()


@dataclass(frozen=True)
class Trained:
    """delta (P,) is trained minus given parameters; metrics are numbers a device may tell."""

    delta: Vector
    num_examples: int
    metrics: Mapping[str, float]


def pad(rows: Sequence[Ids]) -> tuple[Ids, Ids]:
    """Rows of ids to ids and mask (B, T); [PAD] has id 0."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


def make_batch(examples: Examples, chosen: Sequence[int] | Ids, label_smoothing: float = 0.0) -> Batch:
    part = examples.take(chosen)
    ids, mask = pad(part.rows)
    per_token = not isinstance(part.labels, np.ndarray)
    labels = part.labels if isinstance(part.labels, np.ndarray) else _pad_labels(part.labels, ids.shape)
    return Batch(ids, mask, labels, part.weights, label_smoothing, per_token)


def _pad_labels(labels: Sequence[Ids], shape: tuple[int, ...]) -> Ids:
    padded = np.full(shape, -1, np.int64)
    for i, row in enumerate(labels):
        padded[i, : len(row)] = row[: shape[1]]
    return padded


def check_labels(examples: Examples, task: str, outputs: int) -> None:
    """
    Raises:
        ConfigurationError: a label outside the head, a span outside its text, a value that is not finite.
    """
    if not len(examples.rows) == len(examples.labels) > 0:
        raise ConfigurationError(
            f"there are {len(examples.rows)} texts and {len(examples.labels)} labels; give one for each"
        )
    if task == "regression":
        values = np.asarray(examples.labels, np.float64)
        if not np.isfinite(values).all():
            raise ConfigurationError(
                f"the label of example {int(np.argmin(np.isfinite(values)))} is not finite; leave it out"
            )
        return
    whole = task == "classification" and isinstance(examples.labels, np.ndarray)
    if whole and int(np.min(examples.labels)) >= 0 and int(np.max(examples.labels)) < outputs:
        return  # looked at all at once: a simulation asks for ten thousand devices
    for i, (row, label) in enumerate(zip(examples.rows, examples.labels, strict=True)):
        low, high = int(np.min(label)), int(np.max(label))
        limit = len(row) if task == "spans" else outputs
        if high >= limit or (low < 0 and task != "tokens"):
            wrong = high if high >= limit else low
            raise ConfigurationError(
                f"label {wrong} of example {i} is outside 0 to {limit - 1}; leave the example out or publish another head"
            )


def epoch_batches(
    examples: Examples, batch_size: int, seed: int, epoch: int, label_smoothing: float = 0.0
) -> Iterator[Batch]:
    """All examples once, in random order, those of similar length together."""
    for chosen in epoch_order([len(row) for row in examples.rows], batch_size, seed, epoch):
        yield make_batch(examples, chosen, label_smoothing)


def train(
    trainer: Trainer,
    theta: Vector,
    examples: Examples,
    config: TrainConfig,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[float], None] = lambda fraction: None,
    checkpoint: Checkpoint | None = None,
    steering: Steering = UNSTEERED,
) -> Trained:
    """Train a copy of theta on the examples; theta itself is not touched.

    Args:
        config: with the device's own seed (see `order.derive_seed`).
        should_stop: asked before every step.
        progress: told the fraction done, 0 to 1, after every step.
        checkpoint: where to keep the state when stopped, and every so often; the same call goes on from there, to the
            same bits, and removes it when done.

    Raises:
        NoExamples: nothing to train on.
        ConfigurationError: a label that the head does not have.
        TrainingStopped: should_stop said so.
        TrainingDiverged: a loss, gradient or parameter is not finite, or the loss has grown DIVERGED times.
    """
    return converse(training(trainer, theta, examples, config, should_stop, progress, checkpoint, steering), trainer)


def training(
    trainer: Trainer,
    theta: Vector,
    examples: Examples,
    config: TrainConfig,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[float], None] = lambda fraction: None,
    checkpoint: Checkpoint | None = None,
    steering: Steering = UNSTEERED,
) -> Asking[Trained]:
    """`train`, but for the gradients: those it asks for."""
    if not len(examples):
        raise NoExamples("the device has no labelled examples; add some before it takes part")
    if not np.isfinite(theta).all():
        raise TrainingDiverged("the parameters to start from are not finite; the coordinator must send others")
    check_labels(examples, trainer.task, trainer.outputs)
    started = time.perf_counter()
    trainer.prepare(examples.rows, should_stop)
    held_out, trained_on = _split(examples, config)
    state = _State(theta.copy(), theta.copy(), _optimizer(config))
    if checkpoint is not None:
        checkpoint.restore(state, fingerprint(trainer.identity + steering.digest, theta, examples, config))
    try:
        yield from _run_epochs(
            trainer, theta, state, trained_on, held_out, config, should_stop, progress, checkpoint, steering
        )
    except TrainingStopped:
        if checkpoint is not None:
            checkpoint.save(state)
        raise
    result = state.best if held_out is not None and config.patience else state.current
    if not np.isfinite(result).all():
        raise TrainingDiverged(
            f"the parameters are not finite after {state.steps} steps; use a learning rate below {config.learning_rate:g}"
        )
    metrics = _metrics(state, trainer.task, examples.truncated, held_out is not None)
    if metrics["loss"] > DIVERGED * max(1.0, state.first_loss):
        raise TrainingDiverged(
            f"the loss grew from {state.first_loss:g} to {metrics['loss']:g}; use a learning rate below {config.learning_rate:g}"
        )
    if checkpoint is not None:
        checkpoint.remove()
    return Trained(result - theta, len(examples), metrics | {"seconds": time.perf_counter() - started})


def _optimizer(config: TrainConfig) -> Optimizer:
    return make_optimizer(config.optimizer, config.learning_rate, config.momentum, config.weight_decay)


def _run_epochs(
    trainer: Trainer,
    theta: Vector,
    state: _State,
    examples: Examples,
    held_out: Examples | None,
    config: TrainConfig,
    should_stop: Callable[[], bool],
    progress: Callable[[float], None],
    checkpoint: Checkpoint | None,
    steering: Steering,
) -> Asking[None]:
    """From where `state` is to the end of training, or until should_stop says so."""
    total = _steps(len(examples), config)
    while state.epoch < config.epochs:
        batches = epoch_batches(examples, config.batch_size, config.seed, state.epoch, config.label_smoothing)
        for index, batch in enumerate(batches):
            if index < state.steps_in_epoch:
                continue  # done before the checkpoint
            if state.steps == total:
                break
            if should_stop():
                raise TrainingStopped(f"stopped after {state.steps} of {total} steps")
            _step(theta, state, batch, config, total, *(yield state.current, batch), steering)
            if checkpoint is not None:
                checkpoint.tick(state)
            progress(state.steps / total)
        if not _next_epoch(trainer, state, held_out, config, should_stop) or state.steps == total:
            break


def _metrics(state: _State, task: str, truncated: int, measured: bool) -> dict[str, float]:
    """Of the last epoch with a step; numbers that a device may tell."""
    metrics = {"loss": state.loss_sum / (state.weight or 1.0), "steps": float(state.steps)}
    if task != "regression":
        metrics["accuracy"] = state.right / max(1, state.answers)
    if measured:
        metrics["holdout_loss"] = state.best_loss
    if truncated:
        metrics["truncated"] = float(truncated)
    return metrics


@dataclass
class _State:
    """Everything that a step changes; sums are of the current epoch."""

    current: Vector
    best: Vector
    optimizer: Optimizer
    epoch: int = 0
    steps: int = 0
    steps_in_epoch: int = 0
    loss_sum: float = 0.0
    weight: float = 0.0
    right: int = 0
    answers: int = 0
    best_loss: float = math.inf
    bad_epochs: int = 0
    first_loss: float = 0.0


def _split(examples: Examples, config: TrainConfig) -> tuple[Examples | None, Examples]:
    held, rest = split(len(examples), config.holdout, config.seed)
    return (examples.take(held), examples.take(rest)) if len(held) else (None, examples)


def _steps(count: int, config: TrainConfig) -> int:
    most = math.ceil(count / config.batch_size) * config.epochs
    return min(most, config.max_steps or most)


def learning_rate_at(step: int, total: int, config: TrainConfig) -> float:
    """Of the step-th of `total` steps, from 0."""
    warm = config.warmup * total
    if step < warm:
        return config.learning_rate * (step + 1) / (math.floor(warm) + 1)
    if config.schedule == "constant":
        return config.learning_rate
    left = 1.0 - (step - warm) / max(1.0, total - warm)
    return config.learning_rate * (left if config.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))


def _step(
    theta: Vector,
    state: _State,
    batch: Batch,
    config: TrainConfig,
    total: int,
    loss: float,
    correct: int,
    gradient: Vector,
    steering: Steering = UNSTEERED,
) -> None:
    if steering.frozen is not None:
        gradient[steering.frozen] = 0.0  # before the norm is taken: what is frozen clips nothing
    _add_proximal(gradient, state.current, theta, config.proximal_mu)
    _clip(gradient, config.max_grad_norm, loss, state.steps)
    if steering.drift is not None:
        gradient += steering.drift
    state.optimizer.learning_rate = learning_rate_at(state.steps, total, config)
    state.optimizer.step(state.current, gradient)
    if steering.frozen is not None:
        np.copyto(state.current, theta, where=steering.frozen)  # weight decay moves what has no gradient, too
    if state.steps == 0:
        state.first_loss = loss
    if state.steps_in_epoch == 0:
        state.loss_sum, state.weight, state.right, state.answers = 0.0, 0.0, 0, 0
    state.loss_sum, state.weight = state.loss_sum + loss * batch.weight, state.weight + batch.weight
    state.right, state.answers = state.right + correct, state.answers + batch.answers
    state.steps += 1
    state.steps_in_epoch += 1


def _next_epoch(
    trainer: Trainer, state: _State, held_out: Examples | None, config: TrainConfig, should_stop: Callable[[], bool]
) -> bool:
    """Measure on the holdout. False where training has not become better for too long."""
    loss = evaluate(trainer, state.current, held_out, should_stop=should_stop)["loss"] if held_out is not None else 0.0
    state.epoch, state.steps_in_epoch = state.epoch + 1, 0  # not before: a stop goes on with measuring
    if held_out is None:
        return True
    if loss < state.best_loss:
        state.best_loss, state.bad_epochs = loss, 0
        state.best = state.current.copy()
    else:
        state.bad_epochs += 1
    return not config.patience or state.bad_epochs < config.patience


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
    """Mean loss and, but for regression, accuracy over the examples. Raises as `count` does."""
    counted = count(trainer, theta, examples, batch_size, should_stop)
    measured = {"loss": counted.loss_sum / (counted.weight or 1.0)}
    return measured if trainer.task == "regression" else measured | {"accuracy": counted.accuracy}


@dataclass(frozen=True)
class Counted:
    """What theta makes of examples. weight: what a mean of `loss_sum` is over; answers: that can be right or wrong."""

    loss_sum: float = 0.0
    weight: float = 0.0
    right: int = 0
    answers: int = 0

    @property
    def accuracy(self) -> float:
        return self.right / max(1, self.answers)


def count(
    trainer: Trainer,
    theta: Vector,
    examples: Examples,
    batch_size: int = 64,
    should_stop: Callable[[], bool] = lambda: False,
) -> Counted:
    """Sums over the examples.

    Raises:
        NoExamples: nothing to evaluate on.
        ConfigurationError: a label that the head does not have.
        TrainingStopped: should_stop, asked before every batch, said so.
    """
    if not len(examples):
        raise NoExamples("there are no labelled examples to evaluate on; add some first")
    check_labels(examples, trainer.task, trainer.outputs)
    trainer.prepare(examples.rows, should_stop)
    order = np.argsort([len(r) for r in examples.rows], kind="stable")
    loss_sum, total, right, answers = 0.0, 0.0, 0, 0
    for start in range(0, len(order), batch_size):
        if should_stop():
            raise TrainingStopped(f"stopped after {start} of {len(order)} examples")
        batch = make_batch(examples, order[start : start + batch_size])
        loss, correct, weight = trainer.evaluate(theta, batch)
        loss_sum, total = loss_sum + loss * weight, total + weight
        right, answers = right + correct, answers + batch.answers
    return Counted(loss_sum, total, right, answers)
