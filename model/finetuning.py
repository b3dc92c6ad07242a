"""Fine-tuning a whole student on a task: AdamW, warm-up and linear decay, batches of texts of similar length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pocketfed.model.config import MobileBertConfig
from pocketfed.model.encoded import Encoded, Kind
from pocketfed.model.heads import TextClassifier
from pocketfed.model.lamb import is_norm_or_bias
from pocketfed.model.metrics import goodness
from pocketfed.model.schedules import PRECISIONS

GRADIENT_NORM = 1.0
POOL_BATCHES = 50  # batches that are cut from texts sorted by length: little padding, and still a random order
EVALUATED_TOKENS = 8192  # in a batch that needs no gradient
DEVICES = ("cpu", "cuda", "mps")


class FineTuningError(RuntimeError):
    """A fine-tuning that cannot be set up, or one that went wrong on the way."""


@dataclass(frozen=True)
class Recipe:
    """How long, how fast, and where.

    warm_up: share of all steps. precision: what matrix products are computed in. device: one of DEVICES.
    """

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 1e-3
    warm_up: float = 0.1
    weight_decay: float = 0.01
    max_length: int = 128
    precision: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("max_length", 3)):
            if getattr(self, name) < least:
                raise FineTuningError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 < self.learning_rate < math.inf:
            raise FineTuningError(f"learning_rate is {self.learning_rate}; it must be a positive number, such as 5e-5")
        for name in ("warm_up", "weight_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise FineTuningError(f"{name} is {getattr(self, name)}; it must be at least 0 and less than 1")
        if self.precision not in PRECISIONS:
            raise FineTuningError(f"precision is {self.precision!r}; choose one of {', '.join(PRECISIONS)}")
        if self.device not in DEVICES:
            raise FineTuningError(f"device is {self.device!r}; choose one of {', '.join(DEVICES)}")

    def place(self) -> torch.device:
        """The device by that name.

        Raises:
            FineTuningError: this machine has none.
        """
        there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if not there[self.device]:
            raise FineTuningError(f"there is no {self.device} device here; leave --device out to train on the CPU")
        return (
            torch.device(self.device, torch.cuda.current_device())
            if self.device == "cuda"
            else torch.device(self.device)
        )


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model in evaluation mode, and its kind with what was chosen on dev (`Kind.fitted`).

    epoch: the one kept, from 1. losses: the mean of each epoch's. dev: the measures on dev after each epoch, empty where
    there was none.
    """

    model: nn.Module
    kind: Kind
    epoch: int
    losses: tuple[float, ...]
    dev: tuple[Mapping[str, float], ...]


def make_model(
    config: MobileBertConfig, state: Mapping[str, Tensor], separator: int, kind: Kind, seed: int
) -> TextClassifier:
    """A student with a new head for the kind. state: the encoder's tensors; empty for one that starts untrained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TextClassifier(config, kind.outputs, separator, kind.kind)
    encoder = {name: value for name, value in state.items() if not name.startswith("classifier.")}
    if encoder:
        model.mobilebert.load_state_dict(encoder)
    return model


def fine_tune(
    model: nn.Module,
    kind: Kind,
    train: Encoded,
    recipe: Recipe,
    seed: int,
    dev: Encoded | None = None,
    metric: str = "",
    progress: Callable[[float], None] = lambda fraction: None,
) -> Tuned:
    """Trains `model` in place, on the recipe's device, where it stays.

    With `dev`, the epoch with the best `metric` there is kept, the earliest of equals.

    The same arguments give the same bits on one thread of one machine's CPU.

    Raises:
        FineTuningError: a device that is not there, or a loss no longer finite.
    """
    place = recipe.place()
    model.to(place)
    optimizer = _optimizer(model, recipe)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    steps = recipe.epochs * -(-len(train) // recipe.batch_size)
    step, losses, scores = 0, list[float](), list[Mapping[str, float]]()
    best: tuple[float, int, Kind, dict[str, Tensor]] | None = None
    forked = [] if place.type == "cpu" else [place.index or 0]
    with torch.random.fork_rng(devices=forked, device_type=place.type if forked else None):
        torch.manual_seed(seed)
        for epoch in range(recipe.epochs):
            model.train()
            total = 0.0
            for rows in batches(train.lengths, recipe.batch_size, seed, epoch):
                for group in optimizer.param_groups:
                    group["lr"] = recipe.learning_rate * linear_rate(step, steps, recipe.warm_up)
                loss = _step(model, kind, train.take(rows), optimizer, parameters, recipe)
                step += 1
                if not math.isfinite(loss):
                    raise FineTuningError(
                        f"the loss is {loss} at step {step} of {steps}; use a lower learning rate than "
                        f"{recipe.learning_rate:g}"
                    )
                total += loss * len(rows)
                if step % 20 == 0 or step == steps:
                    progress(step / steps)
            losses.append(total / len(train))
            if dev is not None:
                outputs = predict(model, dev, recipe.precision)
                fitted = kind.fitted(outputs, dev)
                scores.append(fitted.score(outputs, dev))
                value = goodness(scores[-1], metric)
                if best is None or value > best[0]:
                    best = (value, epoch + 1, fitted, {n: v.clone() for n, v in model.state_dict().items()})
    if best is None:
        return Tuned(model.eval(), kind, recipe.epochs, tuple(losses), ())
    model.load_state_dict(best[3])
    return Tuned(model.eval(), best[2], best[1], tuple(losses), tuple(scores))


def _step(
    model: nn.Module,
    kind: Kind,
    batch: tuple[Tensor, Tensor, Tensor],
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    recipe: Recipe,
) -> float:
    place = parameters[0].device
    ids, mask, targets = (tensor.to(place) for tensor in batch)
    optimizer.zero_grad(set_to_none=True)
    with _computing(recipe.precision, place):
        logits = model(ids, mask)
    loss = kind.loss(logits.float(), targets)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
    optimizer.step()
    return float(loss.detach()) if torch.isfinite(norm) else math.nan


def predict(model: nn.Module, encoded: Encoded, precision: str = "float32") -> list[NDArray[np.float32]]:
    """The head's output of each row, in the order of the rows; where it has one a token, (length of the row, outputs).

    Computed where the model is, and brought back.
    """
    model.eval()
    place = next(model.parameters()).device
    outputs: list[NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(encoded)
    order = np.argsort(encoded.lengths, kind="stable")
    with torch.inference_mode(), _computing(precision, place):
        for rows in _by_tokens(order, encoded.lengths):
            ids, mask, _ = encoded.take(rows)
            logits = model(ids.to(place), mask.to(place)).float().cpu().numpy()
            for row, logit in zip(rows, logits, strict=True):
                outputs[row] = logit[: encoded.lengths[row]] if logit.ndim == 2 else logit
    return outputs


def batches(lengths: NDArray[np.int64], size: int, seed: int, epoch: int) -> Iterator[NDArray[np.int64]]:
    """Every row once, in batches of `size` of similar length; their order is random."""
    random = np.random.Generator(np.random.PCG64([seed, epoch]))
    order = random.permutation(len(lengths))
    cut: list[NDArray[np.int64]] = []
    for start in range(0, len(order), size * POOL_BATCHES):
        pool = order[start : start + size * POOL_BATCHES]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        cut += [pool[i : i + size] for i in range(0, len(pool), size)]
    for i in random.permutation(len(cut)):
        yield cut[i]


def _by_tokens(order: NDArray[np.int64], lengths: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Rows in order of length, as many at once as hold EVALUATED_TOKENS."""
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * lengths[order[stop]] <= EVALUATED_TOKENS:
            stop += 1
        yield order[start:stop]
        start = stop


def linear_rate(step: int, steps: int, warm_up: float) -> float:
    """The share of the peak rate at a step counted from 0: up over the first `warm_up` of all steps, then down to 0.

    >>> [round(linear_rate(step, 10, 0.2), 3) for step in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.125]
    """
    warm = round(steps * warm_up)
    return (step + 1) / warm if step < warm else (steps - step) / max(1, steps - warm)


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Biases and norms are not decayed (Devlin et al. 2019)."""
    decayed = [p for name, p in model.named_parameters() if not is_norm_or_bias(name)]
    others = [p for name, p in model.named_parameters() if is_norm_or_bias(name)]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.999), eps=1e-6, fused=True)


def _computing(precision: str, place: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(place.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()
