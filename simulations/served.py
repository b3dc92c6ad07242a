"""How well each device is served: accuracy on its own examples, and what the worst-served tenth gets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pocketfed.client_sdk.order import derive_seed, split
from pocketfed.client_sdk.trainer import Examples, Trainer, count
from pocketfed.model.parameters import Vector
from pocketfed.model.tasks import Example
from pocketfed.simulations.partition import value_of

FEW = 50  # devices looked at where each has parameters of its own and none has held examples out


@dataclass(frozen=True)
class Spread:
    """Accuracy over devices, each counting once. p10: the 10th percentile, linear between ranks.

    worst_decile: mean of the lowest tenth of the devices, rounded up. source: what it was measured on.
    """

    mean: float
    p10: float
    worst_decile: float
    devices: int
    source: str
    values: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**{k: getattr(self, k) for k in ("mean", "p10", "worst_decile", "devices", "source")},
                "values": dict(self.values)}  # fmt: skip


def spread_of(values: Mapping[str, float], source: str = "") -> Spread | None:
    """None of nothing.

    >>> spread_of({str(i): i / 20 for i in range(20)}).worst_decile  # 0.00 and 0.05
    0.025
    """
    if not values:
        return None
    sorted_ = np.sort(np.array(list(values.values()), np.float64))
    worst = sorted_[: math.ceil(len(sorted_) / 10)]
    return Spread(
        float(sorted_.mean()), float(np.percentile(sorted_, 10)), float(worst.mean()), len(values), source, dict(values)
    )


def hold_out(
    parts: Mapping[str, Sequence[int]], share: float, seed: int
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Each device's examples to train on, and those that it sets aside for good: floor(share x what it has).

    Args:
        parts: device -> places of its examples.
    """
    kept: dict[str, list[int]] = {}
    aside: dict[str, list[int]] = {}
    for name, part in parts.items():
        held, rest = split(len(part), share, derive_seed(seed, 0, f"{name}/own"))
        kept[name], aside[name] = [part[i] for i in rest], [part[i] for i in held]
    return kept, aside


@dataclass(frozen=True)
class Yardstick:
    """What devices are measured on: examples of their own, or shares of the test's groups.

    own: device -> its examples. groups: label -> the test's examples with it, of which a device counts each by its `shares`.
    """

    source: str
    own: Mapping[str, Examples] = field(default_factory=dict)
    groups: Mapping[int, Examples] = field(default_factory=dict)
    shares: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    @property
    def devices(self) -> list[str]:
        return list(self.own or self.shares)

    def accuracy(self, trainer: Trainer, theta: Vector, device: str, known: dict[int, float] | None = None) -> float:
        """known: of the groups, what was measured with the same theta; what is missing is added."""
        if self.own:
            return count(trainer, theta, self.own[device]).accuracy
        known = {} if known is None else known
        for group in self.shares[device]:
            if group not in known:
                known[group] = count(trainer, theta, self.groups[group]).accuracy
        return sum(share * known[group] for group, share in self.shares[device].items())

    def measure(self, trainer: Trainer, theta_of: Callable[[str], Vector | None], common: Vector) -> Spread | None:
        """All devices; where one has parameters of its own (not None), those. None of them: no spread."""
        known: dict[int, float] = {}
        values: dict[str, float] = {}
        personal = 0
        for device in self.devices:
            mine = theta_of(device)
            if mine is None:
                values[device] = self.accuracy(trainer, common, device, known)
            elif self.own or personal < FEW:
                values[device] = self.accuracy(trainer, mine, device)
                personal += 1
        return spread_of(values, self.source)


def yardstick(
    trainer: Trainer,
    train: tuple[Sequence[Example], Examples],
    test: tuple[Sequence[Example], Examples],
    parts: Mapping[str, Sequence[int]],
    aside: Mapping[str, Sequence[int]],
    partition: str,
) -> Yardstick | None:
    """The best there is: what devices hold out; else the test's examples of the same column's value; else by label.

    By label a device's accuracy is the mean of the test's recalls, weighted as its own labels are: what it would see if its texts of
    a label are like everybody's. None where answers are not right or wrong.

    Args:
        train, test: the examples, and the same encoded, in the same order.
        aside: device -> places in train of what it holds out.
    """
    if trainer.task == "regression":
        return None
    held = {name: places for name, places in aside.items() if len(places)}
    if held:
        return Yardstick("what they hold out", {name: train[1].take(places) for name, places in held.items()})
    column = partition.removeprefix("by:") if partition.startswith("by:") else ""
    in_order = len(test[0]) == len(test[1]) and len(train[0]) == len(train[1])
    theirs = _of_column(train[0], test[0], parts, column) if column not in ("", "label") and in_order else {}
    if theirs:
        return Yardstick(f"the test, by {column}", {name: test[1].take(places) for name, places in theirs.items()})
    if trainer.task != "classification":
        return None
    return _by_label(train[1], test[1], parts)


def _of_column(
    train: Sequence[Example], test: Sequence[Example], parts: Mapping[str, Sequence[int]], column: str
) -> dict[str, list[int]]:
    """Device -> places of the test examples with a value that only it trains on; {} where it is not half of the devices."""
    places: dict[str, list[int]] = {}
    for place, example in enumerate(test):
        places.setdefault(value_of(example, column) or "", []).append(place)
    found = {}
    for name, part in parts.items():
        values = {value_of(train[i], column) or "" for i in part} - {""}
        mine = sorted(place for value in values for place in places.get(value, ()))
        if mine:
            found[name] = mine
    return found if 2 * len(found) >= len(parts) else {}


def _by_label(train: Examples, test: Examples, parts: Mapping[str, Sequence[int]]) -> Yardstick | None:
    known = {
        int(label): test.take(np.flatnonzero(np.asarray(test.labels) == label)) for label in np.unique(test.labels)
    }
    labels, shares = np.asarray(train.labels), dict[str, dict[int, float]]()
    for name, part in parts.items():
        found, counts = np.unique(labels[list(part)], return_counts=True)
        mine = {int(label): int(n) for label, n in zip(found, counts, strict=True) if int(label) in known}
        total = sum(mine.values())
        if total:
            shares[name] = {label: n / total for label, n in mine.items()}
    return Yardstick("the test, by label as on the device", groups=known, shares=shares) if shares else None
