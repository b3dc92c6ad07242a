"""Dealing a data set out to devices: evenly, with skewed labels or sizes, or by who said it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pocketfed.model.tasks import Example

MIN_EXAMPLES = 1  # every device trains on something
MAX_DRAWS = 100  # of a Dirichlet partition, before the emptiest devices are given examples of the fullest


class PartitionError(ValueError):
    """A partition that cannot be made; one sentence with the value and the remedy."""


def partition(examples: Sequence[Example], spec: str, devices: int, seed: int) -> list[list[int]]:
    """Indices of each device's examples, ascending: every example on exactly one device, no device empty.

    Args:
        spec: `iid`, shuffled and dealt evenly (sizes differ by at most one);
            `dirichlet:ALPHA`, for each label its shares over the devices drawn from Dir(ALPHA) (Yurochkin et al. 2019,
            section 4; the skew Hsu et al. 2019 study), drawn again while a device has nothing: the smaller ALPHA, the
            fewer labels a device has;
            `quantity:ALPHA`, shuffled, in shares of all examples drawn from Dir(ALPHA): devices have much or little of the
            same kind (the quantity skew of Li et al. 2022);
            `shards:K`, sorted by label and cut into K equal shards a device, which are dealt out: most devices have at
            most K labels (McMahan et al. 2017, section 3, with K = 2);
            `by:COLUMN`, where a value of the column (`user`, `label` or a field) stays on one device; with more values
            than devices, the largest first, in rounds over the devices.
        seed: the same seed gives the same partition; `by:` needs none.

    Raises:
        PartitionError: an unknown spec, fewer than one device, more devices than examples or than values of the column.
    """
    if devices < 1:
        raise PartitionError(f"{devices} devices cannot hold data; give at least 1")
    if devices > len(examples):
        raise PartitionError(f"{devices} devices cannot share {len(examples)} examples; give at most {len(examples)}")
    kind, separator, argument = spec.partition(":")
    random = np.random.Generator(np.random.PCG64(seed))
    if kind == "iid" and not separator:
        order = random.permutation(len(examples))
        return [sorted(order[d::devices].tolist()) for d in range(devices)]
    if kind == "dirichlet":
        return _dirichlet(examples, _alpha(spec, argument), devices, random)
    if kind == "quantity":
        return _quantity(len(examples), _alpha(spec, argument), devices, random)
    if kind == "shards":
        return _shards(examples, _shards_each(spec, argument, devices, len(examples)), devices, random)
    if kind == "by" and argument:
        return _by_column(examples, argument, devices)
    raise PartitionError(
        f"there is no partition {spec!r}; give iid, dirichlet:ALPHA (such as dirichlet:0.3), quantity:ALPHA, shards:K (such "
        "as shards:2) or by:COLUMN"
    )


def _alpha(spec: str, argument: str) -> float:
    try:
        alpha = float(argument)
    except ValueError:
        alpha = math.nan
    if not 0 < alpha < math.inf:
        raise PartitionError(f"{spec!r} needs a finite number above 0, such as {spec.partition(':')[0]}:0.3")
    return alpha


def _shards_each(spec: str, argument: str, devices: int, examples: int) -> int:
    each = int(argument) if argument.isascii() and argument.isdigit() and len(argument) < 10 else 0
    if each < 1:
        raise PartitionError(f"{spec!r} needs a whole number of shards a device, such as shards:2")
    if each * devices > examples:
        raise PartitionError(
            f"{devices} devices of {each} shards need {each * devices} examples, and there are {examples}; give fewer of either"
        )
    return each


def _dirichlet(examples: Sequence[Example], alpha: float, devices: int, random: np.random.Generator) -> list[list[int]]:
    of_label: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        of_label.setdefault(example.label or "", []).append(i)
    for _ in range(MAX_DRAWS):
        parts: list[list[int]] = [[] for _ in range(devices)]
        for label in sorted(of_label):
            mine = random.permutation(np.asarray(of_label[label]))
            for part, piece in zip(parts, np.split(mine, _cuts(len(mine), alpha, devices, random)), strict=True):
                part.extend(piece.tolist())
        if min(map(len, parts)) >= MIN_EXAMPLES:
            break
    else:  # hardly ever luckier: many devices and a small alpha
        _share_out(parts)
    return [sorted(part) for part in parts]


def _cuts(count: int, alpha: float, devices: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Where to cut so many examples into pieces for the devices, their shares drawn from Dir(alpha)."""
    shares = random.dirichlet(np.full(devices, alpha))
    if not np.isfinite(shares).all():  # a tiny alpha underflows to 0/0; its limit is one device
        shares = np.eye(devices)[random.integers(devices)]
    return np.rint(np.cumsum(shares)[:-1] * count).astype(int)


def _share_out(parts: Sequence[list[int]]) -> None:
    """The fullest give to those that have nothing."""
    for part in parts:
        while len(part) < MIN_EXAMPLES:
            part.append(max(parts, key=len).pop())


def _quantity(count: int, alpha: float, devices: int, random: np.random.Generator) -> list[list[int]]:
    order = random.permutation(count)
    parts = [piece.tolist() for piece in np.split(order, _cuts(count, alpha, devices, random))]
    _share_out(parts)
    return [sorted(part) for part in parts]


def _shards(examples: Sequence[Example], each: int, devices: int, random: np.random.Generator) -> list[list[int]]:
    order = random.permutation(len(examples))  # so that it is chance which examples of a label share a shard
    order = np.asarray(sorted(order.tolist(), key=lambda i: examples[i].label or ""))
    shards = np.array_split(order, each * devices)
    dealt = random.permutation(each * devices)
    return [sorted(i for s in dealt[d * each : (d + 1) * each] for i in shards[s].tolist()) for d in range(devices)]


def _by_column(examples: Sequence[Example], column: str, devices: int) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        value = value_of(example, column)
        if value is None:
            known = {name for e in examples for name in ("user", "label", *e.fields) if value_of(e, name) is not None}
            have = ", ".join(sorted(known)) or "no column"
            raise PartitionError(f"example {i} has no {column!r}, so by:{column} cannot place it; the data has {have}")
        groups.setdefault(value, []).append(i)
    if len(groups) < devices:
        raise PartitionError(
            f"by:{column} has {len(groups)} distinct values for {devices} devices; give at most {len(groups)} devices"
        )
    largest_first = sorted(groups, key=lambda value: (-len(groups[value]), value))
    return [sorted(i for value in largest_first[d::devices] for i in groups[value]) for d in range(devices)]


def value_of(example: Example, column: str) -> str | None:
    """Of `user`, `label` or a field, whatever the case of its name; None or empty where an example has none."""
    if column == "user":
        return example.user
    if column == "label":
        return example.label
    return example.fields.get(column.lower())


def label_counts(
    examples: Sequence[Example], parts: Sequence[Sequence[int]], labels: Sequence[str]
) -> NDArray[np.int64]:
    """How often each device holds each label: (devices, labels) int64. Examples of other labels are not counted."""
    column = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(parts), len(labels)), np.int64)
    for device, part in enumerate(parts):
        for i in part:
            label = examples[i].label
            if label in column:
                counts[device, column[label]] += 1
    return counts
