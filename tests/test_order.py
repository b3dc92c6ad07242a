"""The order of training data: the numbers that docs/protocol.md states, and what an order has to be."""

from __future__ import annotations

import doctest
import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketfed.client_sdk import order
from pocketfed.client_sdk.order import BUCKET_BATCHES, derive_seed, epoch_order, permutation, split

# What SplitMix64 started at 0 gives first, as its authors' own code prints it.
FIRST = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B)


def splitmix64(state: int) -> int:
    """One number, in whole numbers of any size: the reference is not numpy's arithmetic."""
    z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def by_hand(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The page's rules, in plain Python."""

    def shuffled(count: int, what: str) -> list[int]:
        start = int.from_bytes(hashlib.sha256(f"{seed}/{epoch}/{what}".encode()).digest()[:8], "big")
        keys = [splitmix64((start + (i + 1) * 0x9E3779B97F4A7C15) % 2**64) for i in range(count)]
        return sorted(range(count), key=lambda i: keys[i])

    places, window = shuffled(len(lengths), "examples"), 16 * batch_size
    pieces = [sorted(places[i : i + window], key=lambda e: lengths[e]) for i in range(0, len(places), window)]
    batches = [piece[i : i + batch_size] for piece in pieces for i in range(0, len(piece), batch_size)]
    return [batches[i] for i in shuffled(len(batches), "batches")]


def test_places_are_sorted_by_the_numbers_of_splitmix64() -> None:
    assert tuple(splitmix64((i + 1) * 0x9E3779B97F4A7C15 % 2**64) for i in range(5)) == FIRST
    assert permutation(5, 0).tolist() == [2, 4, 1, 0, 3] == sorted(range(5), key=FIRST.__getitem__)
    assert permutation(0, 1).tolist() == []


def test_the_examples_in_its_docstrings_are_right() -> None:
    assert doctest.testmod(order).failed == 0


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=120),
    st.integers(1, 4),
    st.integers(0, 2**64 - 1),
    st.integers(0, 5),
)
def test_an_epochs_batches_are_those_of_the_stated_rules(
    lengths: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    assert [b.tolist() for b in epoch_order(lengths, batch_size, seed, epoch)] == by_hand(
        lengths, batch_size, seed, epoch
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 200), st.floats(0, 0.9), st.integers(0, 2**64 - 1))
def test_a_holdout_and_the_rest_are_all_examples_once(count: int, share: float, seed: int) -> None:
    held, rest = split(count, share, seed)
    assert len(held) == int(share * count)
    assert sorted([*held, *rest]) == list(range(count))
    assert rest.tolist() == sorted(rest)


def test_every_place_is_first_about_equally_often() -> None:
    first = np.bincount([permutation(8, derive_seed(1, epoch, "examples"))[0] for epoch in range(4000)], minlength=8)
    assert abs(first - 500).max() < 4 * (4000 * 1 / 8 * 7 / 8) ** 0.5, first  # four standard deviations


def test_every_device_round_and_use_has_a_seed_of_its_own() -> None:
    seeds = {derive_seed(s, r, d) for s in (0, 1) for r in range(1, 51) for d in ("ada", "bob", "device-7")}
    assert len(seeds) == 2 * 50 * 3
    assert all(0 <= s < 2**64 for s in seeds)
    assert derive_seed(1, 2, "ada") == derive_seed(1, 2, "ada")
    assert derive_seed(1, 23, "x") != derive_seed(12, 3, "x")


def test_an_epoch_of_ten_thousand_examples_has_each_of_them_once() -> None:
    lengths = np.random.default_rng(0).integers(3, 65, 10_000).tolist()
    batches = epoch_order(lengths, 16, 0, 1)
    assert len(batches) == 10_000 // 16
    assert sorted(i for batch in batches for i in batch) == list(range(10_000))
    assert BUCKET_BATCHES == 16, "docs/protocol.md and every client state it"
