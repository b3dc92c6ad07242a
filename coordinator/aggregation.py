"""Turning many updates into one: float64 sums in the order given, updates read from their files block by block."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketfed.coordinator.forms import Form
from pocketfed.model.parameters import ParametersError, Vector, decode_vector

BLOCK = 1 << 15  # coordinates folded at a time: two float64 blocks and a float32 one stay in a core's cache
DOT = 8192  # longer dot products BLAS may share out among threads, and then sums in another order
COLUMN_BYTES = 32 << 20  # what a block of coordinates of all updates may take
Float64 = NDArray[np.float64]


@lru_cache(maxsize=16)
def payload_start(name: str, size: int) -> bytes:
    """What `encode_vector` writes before the values: a length, and JSON padded to a multiple of 8 bytes."""
    place = {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}
    header = json.dumps({name: place}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


class Delta:
    """One update (P,) float32: in memory, or in its spool file and read when it is needed.

    Args:
        source: the vector, or the file that holds it as `encode_vector("delta", ...)` wrote it.
        size: P.
        scale: what it is multiplied by wherever it is used: below 1 where it was clipped.
        form: what the file's bytes are; None: float32 values.
    """

    def __init__(self, source: Vector | Path, size: int, scale: float = 1.0, form: Form | None = None) -> None:
        self.path = source if isinstance(source, Path) else None
        self.size, self.scale = size, scale
        self.form = form if form is not None and not form.plain else None
        self._held: Vector | None = None if isinstance(source, Path) else source

    def scaled(self, factor: float) -> Delta:
        made = Delta(self.raw() if self.path is None else self.path, self.size, self.scale * factor, self.form)
        made._held = self._held
        return made

    def raw(self) -> Vector:
        """As sent, not scaled. Held until `drop`.

        Raises:
            ParametersError: the file is not what it should be.
        """
        if self._held is None:
            assert self.path is not None
            self._held = read_delta(self.path, self.size, self.form)
        return self._held

    def drop(self) -> None:
        """Let go of what can be read again."""
        if self.path is not None:
            self._held = None

    def vector(self) -> Vector:
        return self.raw() if self.scale == 1.0 else self.raw() * np.float32(self.scale)

    def columns(self, low: int, high: int) -> Vector:
        """Coordinates low to high; of a file, only those are read."""
        wanted = self.path if self._held is None else None
        part = self.raw()[low:high] if wanted is None else self._read_columns(wanted, low, high)
        return part if self.scale == 1.0 else part * np.float32(self.scale)

    def _read_columns(self, path: Path, low: int, high: int) -> Vector:
        if self.form is not None:  # its values lie anywhere
            return read_delta(path, self.size, self.form)[low:high]
        return _read_columns(path, self.size, low, high)


def read_delta(path: Path, size: int, form: Form | None = None) -> Vector:
    """A spooled update. One read, no copy, where the bytes are laid out as our own SDK does it.

    Raises:
        ParametersError: unreadable, or not what it should be.
    """
    expected = payload_start("delta", size)
    try:
        if form is not None:
            return decode_delta(path.read_bytes(), size, form)
        data = np.empty(len(expected) + 4 * size, np.uint8)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            # A file of that length whose beginning is ours: the rest can only be the values.
            whole = os.fstat(descriptor).st_size == len(data) and _read_all(descriptor, data)
        finally:
            os.close(descriptor)
        if whole and data[: len(expected)].tobytes() == expected:
            return data[len(expected) :].view("<f4")
        return decode_delta(path.read_bytes(), size)
    except OSError as error:
        raise ParametersError(
            f"the spooled update cannot be read: {error.strerror}; look at the spool's disk"
        ) from None


def decode_delta(data: bytes, size: int, form: Form | None = None) -> Vector:
    """An update of its bytes, whatever form they have: the one place where that is decided, before any check of values.

    Raises:
        ParametersError: not what they should be.
    """
    return decode_vector("delta", data, size) if form is None else form.read(data)


def _read_all(descriptor: int, into: NDArray[np.uint8], offset: int = 0) -> bool:
    """One call reads at most 2 GiB."""
    view, done = memoryview(into.data), 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if not count:
            return False
        done += count
    return True


def _read_columns(path: Path, size: int, low: int, high: int) -> Vector:
    expected = payload_start("delta", size)
    data = np.empty(4 * (high - low), np.uint8)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        ours = (
            os.fstat(descriptor).st_size == len(expected) + 4 * size
            and os.pread(descriptor, len(expected), 0) == expected
        )
        if ours and _read_all(descriptor, data, len(expected) + 4 * low):
            return data.view("<f4")
    finally:
        os.close(descriptor)
    return read_delta(path, size)[low:high]


def norm(vector: Vector) -> float:
    """The L2 norm; not finite if a value is not. The same bits whatever the number of BLAS threads."""
    whole = len(vector) // DOT * DOT
    pieces, rest = vector[:whole].reshape(-1, 1, DOT), vector[whole:]
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.matmul(pieces, pieces.transpose(0, 2, 1))  # (pieces, 1, 1): a dot product each
        total = float(squares.sum(dtype=np.float64)) + float(rest.dot(rest))
    if 1e-20 < total < math.inf:
        return math.sqrt(total)
    # Squares that float32 cannot hold: too large, too small, or not numbers.
    wide = vector.astype(np.float64)
    return math.sqrt(sum(float(wide[i : i + DOT].dot(wide[i : i + DOT])) for i in range(0, len(wide), DOT)))


class Compass:
    """A direction (P,) that updates are compared with."""

    def __init__(self, direction: Vector, length: float) -> None:
        self._direction, self._length = direction, length

    @classmethod
    def of(cls, direction: Vector | None) -> Compass | None:
        """None where there is no direction: nothing, all zeros, or values that are no numbers."""
        length = 0.0 if direction is None else norm(direction)
        return cls(direction, length) if direction is not None and 0 < length < math.inf else None

    def cosine(self, vector: Vector, length: float) -> float | None:
        """-1 to 1; None where float32 cannot hold the product. length: the vector's norm, above 0.

        >>> Compass.of(np.array([3, 4], np.float32)).cosine(np.array([8, 6], np.float32), 10.0)
        0.96
        """
        whole = len(vector) // DOT * DOT
        pieces, rest = vector[:whole].reshape(-1, 1, DOT), vector[whole:]
        other = self._direction[:whole].reshape(-1, DOT, 1)
        with np.errstate(over="ignore", invalid="ignore"):
            products = np.matmul(pieces, other)  # (pieces, 1, 1): a dot product each
            total = float(products.sum(dtype=np.float64)) + float(rest.dot(self._direction[whole:]))
        return max(-1.0, min(1.0, total / (length * self._length))) if math.isfinite(total) else None


class RunningMean:
    """Σ weight · update / Σ weight (McMahan et al. 2017, algorithm 1), one update after another.

    Memory: 8 bytes a coordinate, whatever the number of updates.

    Args:
        workers: threads of `pool` that share out the coordinates, not the updates: any number of them gives the same bits.
    """

    def __init__(self, size: int, pool: Executor | None = None, workers: int = 1) -> None:
        self.sum: Float64 = np.zeros(size)
        self.weight = 0.0
        starts = range(0, size, BLOCK)
        self._shares = [[(i, self.sum[i : i + BLOCK]) for i in starts[w::workers]] for w in range(workers)]
        self._products = [np.empty(min(size, BLOCK)) for _ in range(workers)]
        self._pool = pool if workers > 1 else None

    def add(self, delta: Delta, weight: float) -> None:
        vector, factor = delta.raw(), weight * delta.scale
        self.weight += weight
        if self._pool is None:
            _fold(vector, factor, self._shares[0], self._products[0])
        else:
            shares = zip(self._shares, self._products, strict=True)
            for done in [self._pool.submit(_fold, vector, factor, share, product) for share, product in shares]:
                done.result()

    def result(self) -> Float64:
        return self.sum / self.weight


def _fold(vector: Vector, factor: float, share: list[tuple[int, Float64]], product: Float64) -> None:
    for low, total in share:
        part = product[: len(total)]
        np.copyto(part, vector[low : low + len(total)])
        np.multiply(part, factor, out=part)
        np.add(total, part, out=total)


def mean(deltas: Sequence[Delta], weights: Sequence[float]) -> Float64:
    running = RunningMean(deltas[0].size)
    for delta, weight in zip(deltas, weights, strict=True):
        running.add(delta, weight)
        delta.drop()
    return running.result()


def blocks(deltas: Sequence[Delta]) -> Iterator[tuple[slice, Vector]]:
    """(coordinates, their values (n, block) in all updates): at most COLUMN_BYTES, or one coordinate, at a time."""
    size = deltas[0].size
    step = max(1, COLUMN_BYTES // (4 * len(deltas)))
    for low in range(0, size, step):
        high = min(size, low + step)
        yield slice(low, high), np.stack([delta.columns(low, high) for delta in deltas])


def trimmed_mean(deltas: Sequence[Delta], beta: float) -> Float64:
    """Each coordinate's mean without its ⌊beta · n⌋ smallest and largest values (Yin et al. 2018, definition 2)."""
    result, cut = np.empty(deltas[0].size), int(beta * len(deltas))
    for place, values in blocks(deltas):
        ordered: Vector = np.sort(values, axis=0)[cut : len(deltas) - cut]
        result[place] = ordered.mean(axis=0, dtype=np.float64)
    return result


def median(deltas: Sequence[Delta]) -> Float64:
    """Each coordinate's median (Yin et al. 2018, definition 1)."""
    result = np.empty(deltas[0].size)
    for place, values in blocks(deltas):
        result[place] = np.median(values.astype(np.float64), axis=0)
    return result


def krum_scores(deltas: Sequence[Delta], malicious: int) -> Float64:
    """(n,) each update's summed squared distance to its n - malicious - 2 nearest (Blanchard et al. 2017, eq. 3)."""
    count = len(deltas)
    gram = np.zeros((count, count))
    for _, values in blocks(deltas):
        wide = values.astype(np.float64)
        gram += wide @ wide.T
    squares = np.diag(gram)
    distances = np.maximum(0.0, squares[:, None] + squares[None, :] - 2 * gram)
    np.fill_diagonal(distances, math.inf)
    nearest: Float64 = np.sort(distances, axis=1)[:, : max(1, count - malicious - 2)]
    # BLAS may sum in another order with more threads; who is chosen should not hang on the last bits.
    scores: Float64 = nearest.sum(axis=1).astype(np.float32).astype(np.float64)
    return scores


def krum(deltas: Sequence[Delta], weights: Sequence[float], malicious: int, chosen: int) -> Float64:
    """The mean of the `chosen` updates that lie closest to others (Blanchard et al. 2017; Multi-Krum from 2 on)."""
    if len(deltas) < 3:
        return mean(deltas, weights)
    best = sorted(np.argsort(krum_scores(deltas, malicious), kind="stable")[:chosen].tolist())
    return mean([deltas[i] for i in best], [weights[i] for i in best])


def geometric_median(
    deltas: Sequence[Delta], weights: Sequence[float], iterations: int = 8, smoothing: float = 1e-6
) -> Float64:
    """The point with the smallest weighted sum of distances: smoothed Weiszfeld (Pillutla et al. 2022, algorithm 2).

    An iteration reads every update once: its weight in the next point depends on nothing but the last one.
    """
    point = mean(deltas, weights)
    for _ in range(iterations):
        centre, following = point.astype(np.float32), RunningMean(len(point))
        for delta, weight in zip(deltas, weights, strict=True):
            distance = norm(delta.vector() - centre)
            following.add(delta, weight / max(smoothing, distance))
            delta.drop()
        point = following.result()
    return point


def apply(start: Vector, difference: NDArray[Any]) -> Vector:
    """start + difference, added in float64."""
    moved: Vector = (start.astype(np.float64) + difference).astype(np.float32)
    return moved
