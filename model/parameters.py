"""Named arrays, one flat vector, and safetensors bytes: three forms of the same parameters. numpy only."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

Vector = NDArray[np.float32]
LORA = ("lora_A", "lora_B")
THETA, CONTROL = "theta", "control"  # the tensors that a round begins with


class ParametersError(ValueError):
    """Bytes or arrays that are not the parameters they should be."""


@dataclass(frozen=True)
class Parameter:
    """One named array's place in a flat vector. `offset` counts elements."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def lay_out(shapes: Iterable[tuple[str, Sequence[int]]]) -> tuple[Parameter, ...]:
    """Places one after another, in the order given.

    >>> lay_out([("weight", (2, 3)), ("bias", (2,))])[1].offset
    6
    """
    places: list[Parameter] = []
    offset = 0
    for name, shape in shapes:
        places.append(Parameter(name, tuple(shape), offset))
        offset += places[-1].size
    return tuple(places)


def total_size(layout: Sequence[Parameter]) -> int:
    return sum(p.size for p in layout)


def flatten(arrays: Mapping[str, NDArray[Any]], layout: Sequence[Parameter]) -> Vector:
    """One float32 vector of all arrays, in layout order.

    Raises:
        ParametersError: an array is missing, left over, or of another shape.
    """
    names = {p.name for p in layout}
    if names != set(arrays):
        odd = sorted(names ^ set(arrays))[0]
        raise ParametersError(f"parameter {odd!r} is {'missing' if odd in names else 'not one of this trainable set'}")
    for p in layout:
        if arrays[p.name].shape != p.shape:
            raise ParametersError(f"parameter {p.name!r} has shape {arrays[p.name].shape}; expected {p.shape}")
    return np.concatenate([np.asarray(arrays[p.name], np.float32).reshape(-1) for p in layout])


def unflatten(theta: Vector, layout: Sequence[Parameter]) -> dict[str, Vector]:
    """Views into theta by name.

    Raises:
        ParametersError: theta has another length than the layout.
    """
    if theta.shape != (total_size(layout),):
        raise ParametersError(f"theta has shape {theta.shape}; this trainable set has {total_size(layout)} parameters")
    return {p.name: theta[p.offset : p.offset + p.size].reshape(p.shape) for p in layout}


def encode_vector(name: str, vector: Vector) -> bytes:
    """A float32 vector as safetensors bytes with one tensor of that name. Same vector, same bytes."""
    data: bytes = save({name: np.ascontiguousarray(vector, np.float32)})
    return data


def vector_bytes(size: int) -> int:
    """The most bytes that `encode_vector` makes of so many values: a safetensors header, and room."""
    return 4 * size + 4096


def decode_vector(name: str, data: bytes, size: int) -> Vector:
    """The vector that `encode_vector` wrote. What a peer sends is hostile: everything is checked, nothing broadcast.

    Raises:
        ParametersError: not safetensors, another name, shape or dtype.
    """
    limit = vector_bytes(size)
    if len(data) > limit:
        raise ParametersError(f"{len(data)} bytes are too many for {size} float32 values; at most {limit} are expected")
    return load_tensors(data, {name: (np.dtype(np.float32), (size,))})[name]


def encode_start(theta: Vector, control: Vector | None = None) -> bytes:
    """What a round begins with, as safetensors bytes: theta and, where the run has one, a control variate (SCAFFOLD)."""
    if control is None:
        return encode_vector(THETA, theta)
    both = {THETA: theta, CONTROL: control}
    data: bytes = save({name: np.ascontiguousarray(vector, np.float32) for name, vector in both.items()})
    return data


def start_bytes(size: int) -> int:
    """The most bytes that `encode_start` makes of so many values."""
    return 8 * size + 4096


def decode_start(data: bytes, size: int) -> tuple[Vector, Vector | None]:
    """theta (P,) and the control variate (P,), if there is one.

    Raises:
        ParametersError: not safetensors, another name, shape or dtype.
    """
    if CONTROL not in _names(data):
        return decode_vector(THETA, data, size), None
    if len(data) > start_bytes(size):
        raise ParametersError(f"{len(data)} bytes are too many for twice {size} float32 values")
    shape = (np.dtype(np.float32), (size,))
    found = load_tensors(data, {THETA: shape, CONTROL: shape})
    return found[THETA], found[CONTROL]


def _names(data: bytes) -> set[str]:
    """Of the tensors that safetensors bytes say they have; none where they are no such bytes."""
    try:
        return set(json.loads(data[8 : 8 + min(4096, int.from_bytes(data[:8], "little"))]))
    except (ValueError, TypeError, RecursionError):
        return set()


def load_tensors(data: bytes, expected: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> dict[str, NDArray[Any]]:
    """The tensors of safetensors bytes, exactly those expected: name -> (dtype, shape).

    Raises:
        ParametersError: not safetensors, another name, shape or dtype.
    """
    try:
        tensors: dict[str, NDArray[Any]] = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ParametersError(f"not safetensors bytes: {error}") from None
    if set(tensors) != set(expected):
        wanted = f"one tensor {next(iter(expected))!r}" if len(expected) == 1 else f"tensors {sorted(expected)}"
        raise ParametersError(f"expected {wanted}, found {sorted(tensors)[:5]}")
    for name, (dtype, shape) in expected.items():
        if tensors[name].dtype != dtype or tensors[name].shape != shape:
            raise ParametersError(
                f"tensor {name!r} is {tensors[name].dtype} of shape {tensors[name].shape}; "
                f"expected {dtype} of shape {shape}"
            )
    return tensors


@dataclass(frozen=True)
class Split:
    """Which of theta's `size` values are private: stay on the device. ranges: (start, end) of them, ascending and apart."""

    size: int
    ranges: tuple[tuple[int, int], ...] = ()

    @property
    def shared_size(self) -> int:
        return self.size - sum(end - start for start, end in self.ranges)

    def shared(self, vector: Vector) -> Vector:
        """(size,) -> (shared_size,); the vector itself where nothing is private."""
        return np.delete(vector, self._private()) if self.ranges else vector

    def private(self, vector: Vector) -> Vector:
        """(size,) -> (size - shared_size,)"""
        return vector[self._private()]

    def spread(self, shared: Vector) -> Vector:
        """(shared_size,) -> (size,), 0 where private."""
        if not self.ranges:
            return shared
        whole: Vector = np.zeros(self.size, np.float32)
        whole[np.delete(np.arange(self.size), self._private())] = shared
        return whole

    def overlay(self, vector: Vector, private: Vector) -> Vector:
        """A copy of the vector (size,) with these private values."""
        made = vector.copy()
        made[self._private()] = private
        return made

    def _private(self) -> NDArray[np.int64]:
        places = np.array(self.ranges, np.int64).reshape(-1, 2)
        lengths = places[:, 1] - places[:, 0]
        begins = np.cumsum(lengths) - lengths  # where each range lies in the result
        return np.repeat(places[:, 0] - begins, lengths) + np.arange(lengths.sum())


def split_private(layout: Sequence[Parameter], names: Sequence[str]) -> Split:
    """names: of parameters, or what stands before a dot in them.

    >>> layout = lay_out([("body.weight", (2, 3)), ("classifier.weight", (4,)), ("classifier.bias", (2,))])
    >>> split_private(layout, ["classifier"])
    Split(size=12, ranges=((6, 10), (10, 12)))

    Raises:
        ParametersError: a name that none has, or nothing left to share.
    """
    for name in names:
        if not any(_is_of(p, name) for p in layout):
            have = ", ".join(dict.fromkeys(p.name.split(".")[0] for p in layout))
            raise ParametersError(f"no parameter of the trainable set is named {name!r}; they begin with {have}")
    chosen = [(p.offset, p.offset + p.size) for p in layout if any(_is_of(p, name) for name in names)]
    split = Split(total_size(layout), tuple(sorted(chosen)))
    if layout and split.shared_size == 0:
        raise ParametersError(f"all parameters are private with {list(names)}; leave some to be shared")
    return split


def _is_of(parameter: Parameter, name: str) -> bool:
    return f"{parameter.name}.".startswith(f"{name}.")


def frozen_mask(layout: Sequence[Parameter], names: Sequence[str], lora_rank: int = 0) -> NDArray[np.bool_]:
    """(P,) True where theta stays as it is in a round.

    names: of parameters, or some of their parts between dots; lora_rank: of LoRA's matrices (lora_A (r, in), lora_B
    (out, r)) only the first so many rows and columns are trained; 0: all.

    >>> layout = lay_out([("query.lora_A", (2, 3)), ("query.lora_B", (2, 2)), ("classifier.bias", (1,))])
    >>> frozen_mask(layout, ["lora_A"]).astype(int).tolist()
    [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    >>> frozen_mask(layout, [], lora_rank=1).astype(int).tolist()
    [0, 0, 0, 1, 1, 1, 0, 1, 0, 1, 0]

    Raises:
        ParametersError: a name that none has, a rank where there is no LoRA, or nothing left to be trained.
    """
    mask = np.zeros(total_size(layout), np.bool_)
    for name in names:
        chosen = [p for p in layout if f".{name}." in f".{p.name}."]
        if not chosen:
            raise ParametersError(
                f"no parameter of the trainable set has {name!r} in its name; nothing can be frozen by it"
            )
        for p in chosen:
            mask[p.offset : p.offset + p.size] = True
    if lora_rank and not any(_of_lora(p) for p in layout):
        raise ParametersError(f"lora_rank is {lora_rank}, but the trainable set has no LoRA; choose one, e.g. lora:8")
    for p in layout if lora_rank else ():
        place = mask[p.offset : p.offset + p.size].reshape(p.shape)  # a view
        if _of_lora(p) == "lora_A":
            place[lora_rank:] = True
        elif _of_lora(p) == "lora_B":
            place[:, lora_rank:] = True
    if layout and mask.all():
        raise ParametersError(f"all parameters are frozen with {list(names)}; leave some to be trained")
    return mask


def _of_lora(parameter: Parameter) -> str:
    last = parameter.name.rpartition(".")[2]
    return last if last in LORA and len(parameter.shape) == 2 else ""


def lora_pairs(layout: Sequence[Parameter]) -> tuple[tuple[Parameter, Parameter], ...]:
    """(A (r, in), B (out, r)) of each matrix that LoRA changes by B A times a constant (Hu et al. 2022, section 4.1)."""
    by_name = {p.name: p for p in layout}
    firsts = [p for p in layout if _of_lora(p) == "lora_A"]
    return tuple((p, by_name[p.name.removesuffix("lora_A") + "lora_B"]) for p in firsts)


def split_withheld(
    layout: Sequence[Parameter], private: Sequence[str], frozen: Sequence[str] = (), lora_rank: int = 0
) -> Split:
    """What is not sent: private parameters, and those that a round leaves as they are.

    Raises:
        ParametersError: as `split_private` and `frozen_mask`, or nothing left to share.
    """
    own = split_private(layout, private) if private else Split(total_size(layout))
    if not (frozen or lora_rank):
        return own
    mask = frozen_mask(layout, frozen, lora_rank)
    mask[own._private()] = True
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)
    split = Split(mask.size, tuple((int(start), int(end)) for start, end in edges))
    if layout and split.shared_size == 0:
        raise ParametersError(f"nothing is left to be sent with {[*private, *frozen]} private or frozen; leave some")
    return split
