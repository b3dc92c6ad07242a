"""SGD and AdamW on one flat vector, in numpy: the same bits on every run."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from pocketfed.client_sdk.errors import ConfigurationError
from pocketfed.model.parameters import Vector

OPTIMIZERS = ("adamw", "sgd")


class Optimizer(Protocol):
    """Holds its state (moments) between steps."""

    learning_rate: float

    def state(self) -> tuple[int, list[Vector]]:
        """Steps taken and moments; what `restore` takes."""

    def restore(self, steps: int, moments: list[Vector]) -> None:
        """Go on from there."""

    def step(self, theta: Vector, gradient: Vector) -> None:
        """Move theta (P,) along gradient (P,), both float32, in place. `gradient` may be overwritten."""


class Sgd:
    """theta -= lr * v, with v = momentum * v + g."""

    def __init__(self, learning_rate: float, momentum: float = 0.0) -> None:
        self.learning_rate = learning_rate
        self.momentum = np.float32(momentum)
        self._velocity: Vector | None = None

    def state(self) -> tuple[int, list[Vector]]:
        return 0, [] if self._velocity is None else [self._velocity]

    def restore(self, steps: int, moments: list[Vector]) -> None:
        self._velocity = moments[0] if moments else None

    def step(self, theta: Vector, gradient: Vector) -> None:
        if self.momentum:
            if self._velocity is None:
                self._velocity = np.zeros_like(theta)
            self._velocity *= self.momentum
            self._velocity += gradient
            np.multiply(self._velocity, np.float32(self.learning_rate), out=gradient)
        else:
            gradient *= np.float32(self.learning_rate)
        theta -= gradient


class AdamW:
    """Adam with bias correction and decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2)."""

    def __init__(
        self,
        learning_rate: float,
        weight_decay: float = 0.0,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
    ) -> None:
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self._steps = 0
        self._first: Vector | None = None
        self._second: Vector | None = None
        self._scratch: Vector | None = None

    def state(self) -> tuple[int, list[Vector]]:
        return self._steps, [m for m in (self._first, self._second) if m is not None]

    def restore(self, steps: int, moments: list[Vector]) -> None:
        if moments:
            self._steps, (self._first, self._second) = steps, moments
            self._scratch = np.empty_like(self._first)

    def step(self, theta: Vector, gradient: Vector) -> None:
        if self._first is None or self._second is None or self._scratch is None:
            self._first, self._second, self._scratch = np.zeros_like(theta), np.zeros_like(theta), np.empty_like(theta)
        self._steps += 1
        first, second, scratch = self._first, self._second, self._scratch
        np.multiply(gradient, np.float32(1 - self.beta1), out=scratch)
        first *= np.float32(self.beta1)
        first += scratch
        np.multiply(gradient, gradient, out=scratch)
        scratch *= np.float32(1 - self.beta2)
        second *= np.float32(self.beta2)
        second += scratch
        # theta -= lr * (m / c1) / (sqrt(v / c2) + eps), with both corrections folded into scalars
        correction1, correction2 = 1 - self.beta1**self._steps, 1 - self.beta2**self._steps
        np.sqrt(second, out=scratch)
        scratch += np.float32(self.eps * correction2**0.5)
        np.divide(first, scratch, out=scratch)
        scratch *= np.float32(self.learning_rate * correction2**0.5 / correction1)
        if self.weight_decay:
            theta *= np.float32(1 - self.learning_rate * self.weight_decay)
        theta -= scratch


def make_optimizer(name: str, learning_rate: float, momentum: float, weight_decay: float) -> Optimizer:
    """
    Raises:
        ConfigurationError: no optimizer of that name.
    """
    if name == "sgd":
        return Sgd(learning_rate, momentum)
    if name == "adamw":
        return AdamW(learning_rate, weight_decay)
    raise ConfigurationError(f"there is no optimizer {name!r}; choose one of {', '.join(OPTIMIZERS)}")
