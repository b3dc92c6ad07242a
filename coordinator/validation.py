"""Looking at an update before it can touch the model. Pure: numbers in, a verdict out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketfed.coordinator.config import RunConfig

WINDOW = 256  # accepted updates that the running quantiles are taken over
ENOUGH = 3  # of fewer updates a median says nothing
LARGEST = 1e18  # a norm whose square float32 cannot hold: no model that still works is so far away
SMALLEST = float(np.finfo(np.float32).tiny)  # what is below is denormal
TINY = 1e-6  # of the median norm: less is not trained


@dataclass(frozen=True)
class Refusal:
    """Why an update does not count: a code for machines, a sentence for people.

    Codes: names, shape, dtype, not_finite, num_examples, norm, zero, duplicate, repeated, unreadable.
    """

    code: str
    why: str

    def __str__(self) -> str:
        return f"{self.code}: {self.why}"


@dataclass(frozen=True)
class Limits:
    """What a run allows. A factor counts medians of what the run has accepted lately; 0 switches its rule off.

    Args:
        size: of theta.
        max_examples: the most that a weight can be.
        max_norm: L2 norm of an update; 0 for no limit.
        clip_factor: longer updates are scaled down to that.
        refuse_factor: longer ones are refused.
        examples_factor: larger weights are lowered to that; so is weight times length, of which it counts medians, too.
    """

    size: int
    max_examples: int
    max_norm: float = 0.0
    clip_factor: float = 0.0
    refuse_factor: float = 0.0
    examples_factor: float = 0.0

    @classmethod
    def of(cls, size: int, config: RunConfig) -> Limits:
        return cls(
            size,
            config.max_examples,
            config.max_update_norm,
            config.clip_factor,
            config.refuse_factor,
            config.examples_factor,
        )


@dataclass(frozen=True)
class History:
    """The last WINDOW accepted updates of a run, the newest last: all that the running medians need, to be stored.

    digests: of those updates' bytes, with the round that they came in.
    """

    norms: tuple[float, ...] = ()
    examples: tuple[float, ...] = ()
    digests: Mapping[str, int] | None = None

    def and_these(self, norms: Iterable[float], examples: Iterable[float]) -> History:
        """With further updates, the oldest forgotten."""
        return History((*self.norms, *norms)[-WINDOW:], (*self.examples, *examples)[-WINDOW:], self.digests)


@dataclass(frozen=True)
class Reference:
    """Medians of what was accepted; None where too little was. The lower one of two: half of the fleet may lie."""

    norm: float | None = None
    examples: float | None = None
    influence: float | None = None  # of weight times norm: how far an update moves a weighted mean


def reference(history: History) -> Reference:
    """
    >>> reference(History((1.0, 9.0, 2.0, 3.0), (5, 5, 7, 8)))
    Reference(norm=2.0, examples=5, influence=14.0)
    """
    influences = tuple(norm * told for norm, told in zip(history.norms, history.examples, strict=True))
    return Reference(_median(history.norms), _median(history.examples), _median(influences))


def _median(values: tuple[float, ...]) -> float | None:
    return sorted(values)[(len(values) - 1) // 2] if len(values) >= ENOUGH else None


def check_form(arrays: Mapping[str, NDArray[Any]], name: str, size: int) -> Refusal | None:
    """Names, dtype and shape exactly as asked for: nothing is broadcast, nothing converted."""
    if set(arrays) != {name}:
        return Refusal("names", f"arrays are named {sorted(arrays)[:5]}; expected only {name!r}")
    sent = arrays[name]
    if sent.dtype != np.float32:
        return Refusal("dtype", f"{name!r} is {sent.dtype} of shape {sent.shape}; expected float32")
    if sent.shape != (size,):
        return Refusal("shape", f"{name!r} is float32 of shape {sent.shape}; expected shape ({size},)")
    return None


def check_examples(value: Any) -> Refusal | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 1:
        return Refusal("num_examples", f"num-examples is {value!r}; expected a number of at least 1")
    return None


def check_values(delta: NDArray[np.float32], norm: float) -> Refusal | None:
    """Every value is a number, and not all of them nothing. norm: of delta, not finite if a value is not."""
    if not math.isfinite(norm):
        bad = int((~np.isfinite(delta)).sum())
        return Refusal("not_finite", f"{bad} of the update's {len(delta)} values are not finite")
    if norm < SMALLEST * math.sqrt(len(delta)):
        return Refusal("zero", "the update changes nothing: all of its values are zero, or as good as that")
    return None


def check_norm(norm: float, limits: Limits, known: Reference) -> Refusal | None:
    """Neither beyond what the run allows nor out of all proportion to what other devices send."""
    if norm > (limits.max_norm or LARGEST):
        return Refusal("norm", f"the update's norm {norm:.4g} exceeds the run's limit {limits.max_norm or LARGEST:.4g}")
    if known.norm is None or not limits.refuse_factor:
        return None
    if norm > limits.refuse_factor * known.norm:
        return Refusal(
            "norm", f"the update's norm {norm:.4g} is {norm / known.norm:.3g} times the median of accepted ones"
        )
    if norm < TINY * known.norm:
        return Refusal(
            "zero", f"the update's norm {norm:.4g} is next to nothing beside the median {known.norm:.4g} of others"
        )
    return None


def clip_scale(norm: float, limits: Limits, known: Reference) -> float:
    """What an accepted update is multiplied by: 1, or less where it is longer than `clip_factor` medians."""
    if known.norm is None or not limits.clip_factor:
        return 1.0
    return min(1.0, limits.clip_factor * known.norm / norm)


def capped_examples(value: float, limits: Limits, known: Reference, norm: float = 0.0) -> float:
    """An accepted update's weight. A long update weighs less, or it could use both bounds up at once.

    Args:
        norm: of the update, once it is clipped.
    """
    most = min(value, limits.max_examples)
    if known.examples is None or not limits.examples_factor:
        return most
    most = min(most, limits.examples_factor * known.examples)
    if known.influence is not None and norm > 0:
        most = min(most, limits.examples_factor * known.influence / norm)
    return most
