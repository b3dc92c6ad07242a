"""The order of training data: a pure function of seed and epoch, and the same in every language.

SplitMix64 (Steele, Lea & Flood 2014) and not numpy's generator, whose bits no other language has: three multiplications and
shifts of 64 bits a number, all in one numpy expression. docs/protocol.md states every rule here; a change breaks other clients.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BUCKET_BATCHES = 16  # so many batches' examples are sorted by length together: little padding, still well mixed
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
Places = NDArray[np.int64]


def derive_seed(seed: int, number: int, what: str) -> int:
    """A seed for one use of another: of a device's part in a round, or of one shuffling in it.

    >>> derive_seed(7, 1, "ada")
    15454284622524203633
    """
    digest = hashlib.sha256(f"{seed}/{number}/{what}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def permutation(count: int, seed: int) -> Places:
    """0 to count - 1 in random order: by the numbers that SplitMix64 started at `seed` gives, the smallest first.

    >>> permutation(5, 0).tolist()
    [2, 4, 1, 0, 3]
    """
    z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN  # modulo 2**64, here and below
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")


def epoch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[Places]:
    """The places of each batch's examples, one batch after the other. lengths: in tokens; epoch: from 0.

    >>> [b.tolist() for b in epoch_order([4, 3, 5, 3, 4], 2, 7, 0)]
    [[1, 3], [2], [4, 0]]
    """
    order = permutation(len(lengths), derive_seed(seed, epoch, "examples"))
    sizes = np.asarray(lengths, np.int64)[order]
    window = batch_size * BUCKET_BATCHES
    batches: list[Places] = []
    for start in range(0, len(order), window):
        piece = order[start : start + window]
        piece = piece[np.argsort(sizes[start : start + window], kind="stable")]
        batches += [piece[i : i + batch_size] for i in range(0, len(piece), batch_size)]
    return [batches[i] for i in permutation(len(batches), derive_seed(seed, epoch, "batches"))]


def split(count: int, share: float, seed: int) -> tuple[Places, Places]:
    """Places of the held-out examples, floor(share * count) of them, and of those to train on."""
    order = permutation(count, derive_seed(seed, 0, "holdout"))
    held = math.floor(share * count)
    return np.sort(order[:held]), np.sort(order[held:])
