"""Named arrays, one flat vector, and safetensors bytes: three forms of the same parameters. numpy only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

Vector = NDArray[np.float32]


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
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ParametersError(f"not safetensors bytes: {error}") from None
    if set(tensors) != {name}:
        raise ParametersError(f"expected one tensor {name!r}, found {sorted(tensors)[:5]}")
    vector: Vector = tensors[name]
    if vector.dtype != np.float32 or vector.shape != (size,):
        raise ParametersError(
            f"tensor {name!r} is {vector.dtype} of shape {vector.shape}; expected float32 of shape ({size},)"
        )
    return vector
