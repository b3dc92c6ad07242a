"""The values of an update on the wire: fewer bytes, the same bits on a device and on the coordinator. numpy only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from pocketfed.model.parameters import ParametersError, Vector, encode_vector, load_tensors, vector_bytes

BLOCK = 256  # int8 values that share a scale
HEADER_BYTES = 4096  # room for a safetensors header
CODECS = "float32, float16, int8, topk:SHARE, ternary:SHARE"
SPARSE = ("topk", "ternary")
LARGEST_HALF = 65504.0
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Codec:
    """share: of the values that `topk` and `ternary` send."""

    kind: str = "float32"
    share: float = 1.0

    @property
    def feeds_back(self) -> bool:
        """What it leaves out is added to the next update (error feedback; Seide et al. 2014, Karimireddy et al. 2019)."""
        return self.kind in ("int8", *SPARSE)


def parse_codec(name: str) -> Codec:
    """
    >>> parse_codec("topk:0.01")
    Codec(kind='topk', share=0.01)

    Raises:
        ParametersError: not one of CODECS.
    """
    kind, colon, share = name.partition(":")
    if kind in ("float32", "float16", "int8") and not colon:
        return Codec(kind)
    try:
        number = float(share) if kind in SPARSE else 0.0
    except ValueError:
        number = 0.0
    if not 0.0 < number <= 0.5:
        raise ParametersError(f"there is no codec {name[:100]!r}; choose one of {CODECS} (SHARE: above 0, at most 0.5)")
    return Codec(kind, number)


def encoded_bytes(codec: Codec, size: int) -> int:
    """The most bytes that `encode` makes of so many values: the tensors' own are exact, the header has room.

    >>> [encoded_bytes(parse_codec(c), 1000) - HEADER_BYTES for c in ("float32", "float16", "int8", "topk:0.01")]
    [4000, 2000, 1016, 26]
    """
    if codec.kind == "float32":
        return vector_bytes(size)
    return HEADER_BYTES + sum(math.prod(shape) * dtype.itemsize for dtype, shape in _tensors(codec, size).values())


def _tensors(codec: Codec, size: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Names, dtypes and shapes that so many values have: nothing about them is the sender's choice."""
    if codec.kind == "float16":
        return {"delta": (np.dtype(np.float16), (size,))}
    if codec.kind == "int8":
        return {"delta": (np.dtype(np.int8), (size,)), "scale": (np.dtype(np.float32), (-(-size // BLOCK),))}
    count, low = _counts(codec, size)
    bits = count + ((size - 1) >> low)
    places = {"high": (np.dtype(np.uint8), (-(-bits // 8),)), "low": (np.dtype(np.uint8), (-(-count * low // 8),))}
    scale = {"scale": (np.dtype(np.float32), (-(-count // BLOCK),))}
    if codec.kind == "ternary":
        return {**places, **scale, "signs": (np.dtype(np.uint8), (-(-count // 8),))}
    return {**places, **scale, "values": (np.dtype(np.int8), (count,))}


def _counts(codec: Codec, size: int) -> tuple[int, int]:
    """How many values a sparse codec sends, and how many low bits of an index lie apart."""
    count = min(size, max(1, math.ceil(codec.share * size)))
    return count, (size // count).bit_length() - 1


def encode(codec: Codec, vector: Vector) -> bytes:
    """As safetensors bytes. Same vector, same bytes."""
    if codec.kind == "float32":
        return encode_vector("delta", vector)
    if codec.kind == "float16":
        tensors: dict[str, Any] = {"delta": np.clip(vector, -LARGEST_HALF, LARGEST_HALF).astype(np.float16)}
    elif codec.kind == "int8":
        whole, scale = _quantize(vector)
        tensors = {"delta": whole, "scale": scale}
    else:
        count, low = _counts(codec, vector.size)
        places = _largest(vector, count)
        high_bits, low_bits = _pack_places(places, low, vector.size)
        tensors = {"high": high_bits, "low": low_bits}
        if codec.kind == "ternary":
            tensors["signs"], tensors["scale"] = _signs(vector[places])
        else:
            tensors["values"], tensors["scale"] = _quantize(vector[places])
    data: bytes = save(tensors)
    return data


def decode(codec: Codec, data: bytes, size: int) -> Vector:
    """The vector (size,) that the bytes say. What a peer sends is hostile: nothing is allocated beyond the vector's own size.

    Raises:
        ParametersError: other tensors than the codec's, indices or scales that cannot be.
    """
    if len(data) > encoded_bytes(codec, size):
        raise ParametersError(
            f"{len(data)} bytes are too many for {size} values as {codec.kind}; "
            f"at most {encoded_bytes(codec, size)} are expected"
        )
    if codec.kind == "float32":
        expected = {"delta": (np.dtype(np.float32), (size,))}
        return load_tensors(data, expected)["delta"]
    found = load_tensors(data, _tensors(codec, size))
    if codec.kind == "float16":
        return found["delta"].astype(np.float32)
    if codec.kind == "int8":
        return _widen(found["delta"], found["scale"])
    vector: Vector = np.zeros(size, np.float32)
    count, low = _counts(codec, size)
    if codec.kind == "ternary":
        signs = np.unpackbits(found["signs"], count=count, bitorder="little").view(np.int8)
        found["values"] = 1 - 2 * signs
    vector[_unpack_places(found, count, low, size)] = _widen(found["values"], found["scale"])
    return vector


# ---- 8-bit values ----------------------------------------------------------------------------------------------------


def _quantize(vector: Vector) -> tuple[NDArray[np.int8], Vector]:
    """value = whole · scale, symmetric, a scale a block; half-way values go to the even one."""
    blocks = -(-vector.size // BLOCK)
    padded: Vector = np.zeros((blocks, BLOCK), np.float32)
    padded.reshape(-1)[: vector.size] = vector
    scale: Vector = np.abs(padded).max(1) / np.float32(127)
    divisor = np.where(scale > 0, scale, np.float32(1))  # a block of nothing, or of what is denormal, is sent as 0
    padded /= divisor[:, None]
    np.rint(padded, out=padded)
    np.clip(padded, -127, 127, out=padded)
    padded[scale == 0] = 0
    return padded.astype(np.int8).reshape(-1)[: vector.size], scale


def _signs(vector: Vector) -> tuple[Bytes, Vector]:
    """A bit a value, 1 where it is negative, and each block's mean magnitude (Sattler et al. 2019, algorithm 1)."""
    starts = np.arange(0, vector.size, BLOCK)
    counts = np.minimum(BLOCK, vector.size - starts)
    scale = np.add.reduceat(np.abs(vector.astype(np.float64)), starts) / counts
    return np.packbits(vector < 0, bitorder="little"), scale.astype(np.float32)


def _widen(whole: NDArray[np.int8], scale: Vector) -> Vector:
    if not (np.isfinite(scale).all() and (scale >= 0).all()):
        raise ParametersError("a scale of the update is negative or not finite; it must be a number of at least 0")
    with np.errstate(over="ignore"):  # the screen refuses what is not finite
        values: Vector = whole.astype(np.float32)
        values *= np.repeat(scale, BLOCK)[: values.size]
    return values


# ---- the largest values and where they are ---------------------------------------------------------------------------


def _largest(vector: Vector, count: int) -> NDArray[np.int64]:
    """Where the `count` largest magnitudes are, ascending; of equal ones the first."""
    size = np.abs(vector)
    least = np.partition(size, size.size - count)[size.size - count]
    above = np.flatnonzero(size > least)
    equal = np.flatnonzero(size == least)[: count - above.size]
    return np.sort(np.concatenate([above, equal]))


def _pack_places(places: NDArray[np.int64], low: int, size: int) -> tuple[Bytes, Bytes]:
    """Ascending indices in about 2 + log2(size / count) bits each (Elias 1974, Fano 1971), the first bit the lowest.

    low: the `low` lowest bits of each, one after another. high: the rest, h, of the i-th index (from 0) is a 1 at bit h + i.
    """
    high = np.zeros(places.size + ((size - 1) >> low), np.uint8)
    high[(places >> low) + np.arange(places.size)] = 1
    bits = (places[:, None] >> np.arange(low)) & 1
    return np.packbits(high, bitorder="little"), np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little")


def _unpack_places(found: Mapping[str, NDArray[Any]], count: int, low: int, size: int) -> NDArray[np.int64]:
    high = np.flatnonzero(np.unpackbits(found["high"], bitorder="little"))
    if high.size != count:
        raise ParametersError(f"the update has {high.size} indices; expected {count}")
    bits = np.unpackbits(found["low"], count=count * low, bitorder="little").reshape(count, low)
    places = high
    places -= np.arange(count)
    places <<= low
    for bit in range(low):
        places |= bits[:, bit].astype(np.int64) << bit
    if places[-1] >= size or (places[1:] <= places[:-1]).any():
        raise ParametersError(f"the update's indices are not ascending from 0 to {size - 1}")
    return places
