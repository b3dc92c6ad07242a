"""Int8 weights: exact where they can be, close where they cannot, and honest about the difference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pocketfed.model.checkpoints import expected_shapes
from pocketfed.model.config import preset
from pocketfed.model.quantization import (
    QuantizationError,
    dequantize,
    dequantize_state,
    quantize_per_channel,
    quantize_state,
    stored_bytes,
)


def test_a_row_is_scaled_by_its_largest_magnitude_and_halves_round_to_even() -> None:
    weight = torch.tensor([[127.0, -63.5, 0.5, 1.5, 2.5], [0.0, 0.0, 0.0, 0.0, 0.0], [-254.0, 1.0, 3.0, 2.0, 5.0]])
    q, scales = quantize_per_channel(weight)
    assert scales.tolist() == [1.0, 1.0, 2.0]
    assert q.tolist() == [[127, -64, 0, 2, 2], [0, 0, 0, 0, 0], [-127, 0, 2, 1, 2]]
    assert q.dtype == torch.int8
    assert scales.dtype == torch.float32


@settings(deadline=None, max_examples=200)
@given(
    hnp.arrays(np.int8, st.tuples(st.integers(1, 5), st.integers(1, 7)), elements=st.integers(-127, 127)),
    st.integers(0, 2**32 - 1),
)
def test_quantizing_dequantized_weights_again_changes_nothing(values: np.ndarray, seed: int) -> None:  # type: ignore[type-arg]
    values[:, 0] = 127  # each row uses its whole range
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(rng.lognormal(-4, 3, len(values)).astype(np.float32))
    _, scales = quantize_per_channel(127 * rows[:, None])  # scales as this module makes them
    q = torch.from_numpy(values)
    again, scales_again = quantize_per_channel(dequantize(q, scales))
    assert torch.equal(again, q)
    assert torch.equal(scales_again, scales)


@settings(deadline=None, max_examples=200)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 6)),
        elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
    )
)
def test_no_weight_is_off_by_more_than_half_a_step(values: np.ndarray) -> None:  # type: ignore[type-arg]
    weight = torch.from_numpy(values)
    q, scales = quantize_per_channel(weight)
    error = (dequantize(q, scales).double() - weight.double()).abs()
    # The scale itself is rounded to 16 bits, which the largest weight feels 127-fold.
    assert bool((error <= scales.double()[:, None] * (0.5 + 127 * 2.0**-16)).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    state = {"encoder.a.weight": torch.ones(2, 2), "encoder.b.weight": torch.tensor([[1.0, bad]])}
    with pytest.raises(QuantizationError, match=r"encoder\.b\.weight holds a value that is NaN or infinite"):
        quantize_state(state)
    with pytest.raises(QuantizationError, match="NaN or infinite"):
        quantize_per_channel(torch.tensor([[bad]]))
    with pytest.raises(QuantizationError, match=r"shape \(3,\)"):
        quantize_per_channel(torch.ones(3))


def test_matrices_and_word_table_are_int8_and_everything_else_stays_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embeddings.word_embeddings.weight": (6, 3),
        "embeddings.position_embeddings.weight": (4, 5),
        "embeddings.token_type_embeddings.weight": (2, 5),
        "layer.dense.weight": (5, 3),
        "layer.dense.bias": (5,),
    }
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors, errors = quantize_state(state)
    int8 = {name for name, value in tensors.items() if value.dtype == torch.int8}
    assert int8 == set(errors) == {"embeddings.word_embeddings.weight", "layer.dense.weight"}
    restored = dequantize_state(tensors)
    assert set(restored) == set(state)
    for name, value in state.items():
        difference = (restored[name] - value).abs()
        if name in errors:
            assert errors[name].largest == pytest.approx(float(difference.max()), rel=1e-6)
            assert errors[name].mean == pytest.approx(float(difference.mean()), rel=1e-5)
            assert 0 < errors[name].largest <= float(value.abs().max()) / 127
        else:
            assert torch.equal(restored[name], value)
    assert stored_bytes(shapes) == sum(value.numel() * value.element_size() for value in tensors.values())


def test_scales_that_are_missing_or_do_not_fit_are_named() -> None:
    q = torch.ones(2, 3, dtype=torch.int8)
    with pytest.raises(QuantizationError, match=r"w\.scale is missing"):
        dequantize_state({"w": q})
    with pytest.raises(QuantizationError, match=r"w\.scale has shape \(3,\)"):
        dequantize_state({"w": q, "w.scale": torch.ones(3)})


def test_the_released_model_is_26_megabytes_in_int8() -> None:
    # 24,157,440 weights at 1 byte; 161,280 biases and gains, 263,168 positions and types, 123,194 scales at 4.
    expected = 24_157_440 + 4 * (161_280 + 263_168 + 123_194)
    assert stored_bytes(expected_shapes(preset("mobilebert"))) == expected
