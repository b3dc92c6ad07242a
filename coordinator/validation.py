"""Looking at an update before it can touch the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketfed.model.parameters import Vector


@dataclass(frozen=True)
class Limits:
    """size: of theta; max_examples: what a weight is capped to; max_norm: L2 norm of an update, 0 for no limit."""

    size: int
    max_examples: int
    max_norm: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """norm: L2 norm of the update, where it could be computed. reason: why it was refused, None if accepted."""

    norm: float | None
    reason: str | None


def check_update(theta: Vector, arrays: Mapping[str, NDArray[Any]], num_examples: Any, limits: Limits) -> Verdict:
    """Names, shape, dtype, finiteness, weight and norm of trained parameters, as expected: nothing is broadcast.

    Args:
        theta: (P,) what the device started from.
        arrays: what it sent: {"theta": (P,) float32}.
    """
    if set(arrays) != {"theta"}:
        return Verdict(None, f"arrays are named {sorted(arrays)[:5]}; expected only 'theta'")
    sent = arrays["theta"]
    if sent.dtype != np.float32 or sent.shape != (limits.size,):
        return Verdict(
            None, f"'theta' is {sent.dtype} of shape {sent.shape}; expected float32 of shape ({limits.size},)"
        )
    if not np.isfinite(sent).all():
        return Verdict(None, f"'theta' holds {int((~np.isfinite(sent)).sum())} values that are not finite")
    if isinstance(num_examples, bool) or not isinstance(num_examples, (int, float)) or not math.isfinite(num_examples):
        return Verdict(None, f"num-examples is {num_examples!r}; expected a number of at least 1")
    if num_examples < 1:
        return Verdict(None, f"num-examples is {num_examples}; expected at least 1")
    difference = sent.astype(np.float64) - theta
    norm = math.sqrt(float(np.dot(difference, difference)))
    if limits.max_norm and norm > limits.max_norm:
        return Verdict(norm, f"the update's norm {norm:.4g} exceeds the run's limit {limits.max_norm:.4g}")
    return Verdict(norm, None)
