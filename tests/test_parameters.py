"""Parameters in their three forms: named arrays, one flat vector, safetensors bytes."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from pocketfed.model.parameters import (
    Parameter,
    ParametersError,
    decode_vector,
    encode_vector,
    flatten,
    lay_out,
    total_size,
    unflatten,
)

LAYOUT = lay_out([("weight", (2, 3)), ("scale", ()), ("bias", (2,))])


def test_places_follow_one_another_and_a_scalar_takes_one_element() -> None:
    assert list(LAYOUT) == [Parameter("weight", (2, 3), 0), Parameter("scale", (), 6), Parameter("bias", (2,), 7)]
    assert [p.size for p in LAYOUT] == [6, 1, 2]
    assert total_size(LAYOUT) == 9
    assert total_size(()) == 0


def test_flattening_lays_rows_end_to_end_in_the_order_of_the_layout() -> None:
    arrays = {"bias": np.array([8, 9]), "weight": np.array([[1, 2, 3], [4, 5, 6]]), "scale": np.array(7)}
    theta = flatten(arrays, LAYOUT)
    assert theta.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert theta.dtype == np.float32


def test_unflattening_gives_views_so_that_writing_to_them_changes_theta() -> None:
    theta = np.arange(9, dtype=np.float32)
    arrays = unflatten(theta, LAYOUT)
    assert arrays["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert float(arrays["scale"]) == 6
    arrays["bias"][:] = -1
    assert theta[7:].tolist() == [-1, -1]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=5), st.integers(0, 1000))
def test_unflatten_undoes_flatten_for_any_shapes(shapes: list[list[int]], seed: int) -> None:
    layout = lay_out((f"p{i}", shape) for i, shape in enumerate(shapes))
    theta = np.random.default_rng(seed).normal(size=total_size(layout)).astype(np.float32)
    assert np.array_equal(flatten(unflatten(theta, layout), layout), theta)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": None}, "'bias' is missing"),
        ({"extra": np.zeros(1)}, "'extra' is not one of this trainable set"),
        ({"bias": np.zeros(3)}, r"'bias' has shape \(3,\); expected \(2,\)"),
        ({"bias": np.zeros((2, 1))}, r"'bias' has shape \(2, 1\)"),
    ],
)
def test_arrays_that_do_not_fit_the_layout_are_named(change: dict[str, object], message: str) -> None:
    arrays = {"weight": np.zeros((2, 3)), "scale": np.zeros(()), "bias": np.zeros(2)} | change
    with pytest.raises(ParametersError, match=message):
        flatten({k: v for k, v in arrays.items() if v is not None}, LAYOUT)  # type: ignore[misc]


@pytest.mark.parametrize("shape", [(8,), (10,), (9, 1), (1, 9)])
def test_a_vector_of_another_shape_is_not_unflattened(shape: tuple[int, ...]) -> None:
    with pytest.raises(ParametersError, match="this trainable set has 9 parameters"):
        unflatten(np.zeros(shape, np.float32), LAYOUT)


def test_a_vector_survives_the_wire_bit_for_bit_and_always_as_the_same_bytes() -> None:
    vector = np.array([0.1, -0.0, 1e-45, 3.4e38, np.inf, np.nan], np.float32)
    data = encode_vector("delta", vector)
    assert encode_vector("delta", vector.copy()) == data
    assert decode_vector("delta", data, 6).tobytes() == vector.tobytes()
    strided = np.arange(12, dtype=np.float32)[::2]
    assert decode_vector("delta", encode_vector("delta", strided), 6).tolist() == [0, 2, 4, 6, 8, 10]


def _with_header(dtype: str, end: int) -> bytes:
    """Four float32 zeros under a header that claims another type or end."""
    text = json.dumps({"delta": {"dtype": dtype, "shape": [4], "data_offsets": [0, end]}}).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * 16


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not safetensors"),
        (b"\x80\x04K\x01.", "not safetensors"),  # a pickle
        (struct.pack("<Q", 2**63) + b"{}", "not safetensors"),
        (_with_header("F32", 99), "not safetensors"),
        (_with_header("X99", 16), "not safetensors"),
        (save({"theta": np.zeros(4, np.float32)}), "expected one tensor 'delta', found"),
        (save({"delta": np.zeros(4, np.float32), "more": np.zeros(1, np.float32)}), "expected one tensor 'delta'"),
        (save({"delta": np.zeros(1, np.float32)}), r"shape \(1,\); expected float32 of shape \(4,\)"),
        (save({"delta": np.zeros((4, 1), np.float32)}), r"shape \(4, 1\)"),
        (save({"delta": np.zeros(4, np.float64)}), "is float64"),
        (save({"delta": np.zeros(4, np.int32)}), "is int32"),
        (encode_vector("delta", np.zeros(2000, np.float32)), "8072 bytes are too many for 4 float32 values"),
        (encode_vector("delta", np.zeros(4, np.float32))[:-1], "not safetensors"),
    ],
)
def test_what_a_peer_sends_is_refused_unless_it_is_exactly_the_vector(data: bytes, message: str) -> None:
    with pytest.raises(ParametersError, match=message):
        decode_vector("delta", data, 4)
