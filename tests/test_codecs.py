"""Update codecs: what they cost in bytes, what they keep, and that a hostile sender gains nothing by them."""

from __future__ import annotations

import json
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from pocketfed.model.codecs import BLOCK, HEADER_BYTES, Codec, decode, encode, encoded_bytes, parse_codec
from pocketfed.model.parameters import ParametersError, Split, Vector, lay_out, split_private

NAMES = ("float32", "float16", "int8", "topk:0.5", "topk:0.1", "topk:0.01", "ternary:0.1", "ternary:0.01")


def normal(size: int, seed: int = 0) -> Vector:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def through(name: str, vector: Vector) -> Vector:
    codec = parse_codec(name)
    return decode(codec, encode(codec, vector), vector.size)


def test_values_that_a_codec_can_hold_come_back_to_the_bit() -> None:
    halves = np.array([1.0, -0.5, 65504.0, 2.0**-24, 0.0], np.float32)
    assert through("float16", halves).tolist() == halves.tolist()
    steps = np.array([127.0, -126.0, 3.0, 0.0], np.float32)  # the scale is 1
    assert through("int8", steps).tolist() == steps.tolist()
    assert through("topk:0.5", steps).tolist() == [127.0, -126.0, 0.0, 0.0]
    anything = normal(1000)
    assert through("float32", anything).tobytes() == anything.tobytes()


def test_int8_rounds_to_the_nearest_of_255_steps_a_block_and_half_way_to_even() -> None:
    assert through("int8", np.array([127.0, 0.5, 1.5, -2.5, 0.49], np.float32)).tolist() == [127.0, 0.0, 2.0, -2.0, 0.0]
    far = normal(10 * BLOCK) * np.repeat(10.0 ** np.arange(-5, 5), BLOCK).astype(np.float32)
    error = np.abs(through("int8", far) - far).reshape(10, BLOCK).max(1)
    assert (error <= np.abs(far).reshape(10, BLOCK).max(1) / 127 * 0.5001).all()


def test_topk_sends_the_largest_and_of_equal_ones_the_first() -> None:
    vector = np.array([0.1, -3.0, 2.0, 3.0, 0.0, -2.0, 2.0, 0.2, 0.0, 0.0], np.float32)
    assert np.flatnonzero(through("topk:0.3", vector)).tolist() == [1, 2, 3]
    assert np.flatnonzero(through("topk:0.5", vector)).tolist() == [1, 2, 3, 5, 6]
    assert not through("topk:0.1", np.zeros(10, np.float32)).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 2, 3, 255, 256, 257, 10_001])
def test_what_is_sent_is_as_large_as_stated_and_the_same_bytes_every_time(name: str, size: int) -> None:
    codec, vector = parse_codec(name), normal(size)
    data = encode(codec, vector)
    header = 8 + int.from_bytes(data[:8], "little")
    assert len(data) - header == encoded_bytes(codec, size) - HEADER_BYTES
    assert header < 400
    assert data == encode(codec, vector.copy())
    said = decode(codec, data, size)
    assert encode(codec, said) == data, "what was said can be said again"


def test_bytes_a_value_by_hand() -> None:
    """1,000,000 values. topk: an index in 2 + log2(1 / share) bits or a little less, a value in 8, a scale in 32 / 256."""
    sizes = {name: encoded_bytes(parse_codec(name), 10**6) - HEADER_BYTES for name in NAMES}
    assert sizes["float32"] == 4_000_000
    assert sizes["float16"] == 2_000_000
    assert sizes["int8"] == 1_000_000 + 4 * 3907
    low, high = 10_000 * 6, 10_000 + (999_999 >> 6)  # bits: n / k = 100, so 6 low ones
    assert sizes["topk:0.01"] == 10_000 + 4 * 40 + low // 8 + math.ceil(high / 8)
    assert sizes["topk:0.01"] == 20_863
    assert 4_000_000 / sizes["topk:0.01"] > 190


def test_ternary_sends_a_sign_and_the_mean_magnitude_of_the_largest() -> None:
    vector = np.array([0.1, -3.0, 2.0, 0.2, -0.1, 0.0, 0.0, 0.0, 0.0, 0.0], np.float32)
    assert through("ternary:0.2", vector).tolist() == [0.0, -2.5, 2.5, 0, 0, 0, 0, 0, 0, 0]
    assert through("ternary:0.3", vector)[[1, 2, 3]].tolist() == pytest.approx([-5.2 / 3, 5.2 / 3, 5.2 / 3])
    codec = parse_codec("ternary:0.01")
    assert encoded_bytes(codec, 10**6) - HEADER_BYTES == 20_863 - 10_000 + 10_000 // 8
    with pytest.raises(ParametersError, match="negative or not finite"):
        decode(codec, changed("ternary:0.01", 20, scale=[np.float32("nan")]), 20)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.floats(0.0005, 0.5), st.integers(0, 2**32 - 1))
def test_topk_keeps_exactly_the_largest_wherever_they_are(size: int, share: float, seed: int) -> None:
    vector = normal(size, seed)
    said = through(f"topk:{share}", vector)
    count = min(size, max(1, math.ceil(share * size)))
    largest = np.sort(np.argsort(-np.abs(vector), kind="stable")[:count])
    np.testing.assert_allclose(said[largest], vector[largest], atol=np.abs(vector).max() / 127)
    assert not np.delete(said, largest).any()


@pytest.mark.parametrize("name", ["", "int4", "topk", "topk:", "topk:0", "topk:0.6", "topk:nan", "int8:3", "TOPK:0.1"])
def test_a_codec_that_does_not_exist_is_named(name: str) -> None:
    with pytest.raises(
        ParametersError, match=r"there is no codec .*choose one of float32, float16, int8, topk:SHARE, ternary:SHARE"
    ):
        parse_codec(name)


# ---- what a hostile sender may try --------------------------------------------------------------------------------------


def changed(name: str, size: int, **tensors: object) -> bytes:
    held = load(encode(parse_codec(name), normal(size)))
    for key, value in tensors.items():
        held.pop(key)
        if value is not None:
            held[key] = np.asarray(value)
    return save(held)


def bits(*ones: int, size: int) -> np.ndarray:
    array = np.zeros(size * 8, np.uint8)
    array[list(ones)] = 1
    return np.packbits(array, bitorder="little")


# topk:0.2 of 20 values: 4 indices with 2 low bits each; high has 4 + (19 >> 2) = 8 bits
HOSTILE = {
    "another codec's tensors": ("int8", encode(parse_codec("float16"), normal(20)), "expected tensors"),
    "a tensor too few": ("int8", changed("int8", 20, scale=None), r"expected tensors \['delta', 'scale'\], found \['delta'\]"),
    "a tensor of another dtype": ("int8", changed("int8", 20, delta=normal(20)), "float32 of shape"),
    "a tensor of another shape": ("int8", changed("int8", 20, delta=np.zeros(21, np.int8)), r"shape \(21,\)"),
    "a table": ("int8", changed("int8", 20, delta=np.zeros((4, 5), np.int8)), r"shape \(4, 5\)"),
    "a scale too many": ("int8", changed("int8", 20, scale=np.ones(2, np.float32)), r"shape \(2,\)"),
    "an infinite scale": ("int8", changed("int8", 20, scale=[np.float32("inf")]), "a scale of the update is negative or not finite"),
    "a negative scale": ("int8", changed("int8", 20, scale=[np.float32(-1)]), "a scale of the update is negative or not finite"),
    "a scale that is no number": ("topk:0.2", changed("topk:0.2", 20, scale=[np.float32("nan")]), "not finite"),
    "too few indices": ("topk:0.2", changed("topk:0.2", 20, high=bits(0, 1, 2, size=1)), "has 3 indices; expected 4"),
    "too many indices": ("topk:0.2", changed("topk:0.2", 20, high=bits(0, 1, 2, 3, 4, size=1)), "has 5 indices; expected 4"),
    "an index twice": ("topk:0.2", changed("topk:0.2", 20, high=bits(0, 1, 2, 3, size=1), low=bits(size=1)), "not ascending"),
    "an index that falls": ("topk:0.2", changed("topk:0.2", 20, high=bits(0, 1, 2, 3, size=1), low=bits(0, 1, 2, size=1)), "not ascending"),
    "a longer bitmap": ("topk:0.2", changed("topk:0.2", 20, high=np.zeros(9000, np.uint8)), "many"),
    "no safetensors": ("topk:0.2", b"\x80" * 40, "not safetensors"),
    "nothing": ("float16", b"", "not safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_bytes_are_refused_with_a_reason(case: str) -> None:
    name, data, says = HOSTILE[case]
    with pytest.raises(ParametersError, match=says):
        decode(parse_codec(name), data, 20)


def test_an_index_beyond_the_end_is_refused() -> None:
    """5 values, 1 index with 2 low bits; high has 1 + (4 >> 2) = 2 bits in a byte, so index 7 can be written."""
    codec = parse_codec("topk:0.2")
    beyond = changed("topk:0.2", 5, high=bits(1, size=1), low=bits(0, 1, size=1))
    with pytest.raises(ParametersError, match="not ascending from 0 to 4"):
        decode(codec, beyond, 5)
    assert decode(codec, changed("topk:0.2", 5, high=bits(1, size=1), low=bits(size=1)), 5)[4] != 0


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(NAMES[1:]), st.integers(0, 399), st.integers(0, 7), st.booleans())
def test_a_flipped_bit_is_refused_or_decodes_to_a_vector_of_the_size(name: str, at: int, bit: int, cut: bool) -> None:
    codec = parse_codec(name)
    data = bytearray(encode(codec, normal(300)))
    data[at % len(data)] ^= 1 << bit
    try:
        vector = decode(codec, bytes(data[:at] if cut else data), 300)
    except ParametersError:
        return
    assert vector.shape == (300,)
    assert vector.dtype == np.float32


@pytest.mark.parametrize("name", NAMES[1:])
def test_decoding_takes_little_more_memory_than_the_vector_has(name: str) -> None:
    size = 1_000_000
    codec = parse_codec(name)
    data = encode(codec, normal(size))
    tracemalloc.start()
    try:
        decode(codec, data, size)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * size * 4 + len(data)


def test_a_header_that_promises_gigabytes_allocates_nothing() -> None:
    header = json.dumps({"delta": {"dtype": "I8", "shape": [1 << 40], "data_offsets": [0, 1 << 40]}}).encode()
    with pytest.raises(ParametersError, match="not safetensors"):
        decode(Codec("int8"), len(header).to_bytes(8, "little") + header, 20)


# ---- private parts ------------------------------------------------------------------------------------------------------

LAYOUT = lay_out(
    [("body.weight", (2, 3)), ("body.bias", (2,)), ("classifier.weight", (2, 2)), ("classifier2.bias", (1,))]
)


def test_a_split_takes_a_vector_apart_and_puts_it_together() -> None:
    split = split_private(LAYOUT, ["classifier", "body.bias"])
    theta = np.arange(13, dtype=np.float32)
    assert split.shared(theta).tolist() == [0, 1, 2, 3, 4, 5, 12]
    assert split.private(theta).tolist() == [6, 7, 8, 9, 10, 11]
    assert split.spread(split.shared(theta)).tolist() == [0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 0, 0, 12]
    assert split.overlay(theta, -split.private(theta)).tolist() == [0, 1, 2, 3, 4, 5, -6, -7, -8, -9, -10, -11, 12]
    assert theta[6] == 6, "the vector given is not touched"


def test_without_private_names_everything_is_shared() -> None:
    theta = np.arange(3, dtype=np.float32)
    assert Split(3).shared(theta) is theta
    assert Split(3).spread(theta) is theta


def test_private_names_that_match_nothing_or_everything_are_refused() -> None:
    with pytest.raises(
        ParametersError, match="no parameter of the trainable set is named 'class'; they begin with body"
    ):
        split_private(LAYOUT, ["class"])
    with pytest.raises(ParametersError, match="all parameters are private"):
        split_private(LAYOUT, ["body", "classifier", "classifier2"])
