"""Stored weights: exact where they can be, close where they cannot, and honest about the difference."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pocketfed.model import int4
from pocketfed.model.checkpoints import expected_shapes
from pocketfed.model.config import preset
from pocketfed.model.packing import packed, read_tensors, serialised, write_packed
from pocketfed.model.quantization import (
    QuantizationError,
    Storage,
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


@settings(deadline=None, max_examples=60)
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


@settings(deadline=None, max_examples=60)
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


def test_matrices_and_tables_of_words_and_positions_are_int8_and_everything_else_stays_float32() -> None:
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
    tables = {"embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"}
    assert int8 == set(errors) == {*tables, "layer.dense.weight"}
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


# Sizes and values that are hard: odd and single columns, denormals, rows of nothing, one weight far from the others.
WEIGHTS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 21)),
    elements=st.one_of(
        st.floats(-(2.0**99), 2.0**99, width=32), st.sampled_from([0.0, 1e-40, -3e-45, 1e-38, 1.0, 1e20])
    ),
)


@settings(deadline=None, max_examples=60)
@given(WEIGHTS, st.sampled_from([8, 9, 16]))
def test_any_weights_are_stored_once_and_for_all(values: np.ndarray, group: int) -> None:  # type: ignore[type-arg]
    state = {"layer.weight": torch.from_numpy(values)}
    for storage in (Storage(), Storage(4, group)):
        stored, _ = quantize_state(state, storage)
        read = dequantize_state(stored, group)
        assert read["layer.weight"].shape == values.shape
        assert torch.isfinite(read["layer.weight"]).all()
        again, errors = quantize_state(read, storage)
        assert set(again) == set(stored)
        assert all(torch.equal(again[name], stored[name]) for name in stored)
        assert errors["layer.weight"].largest == 0


def test_a_group_has_a_scale_of_its_own_and_two_values_share_a_byte() -> None:
    weight = torch.tensor([[7.0, -3.0, 1.4, 0.0, -14.0, 2.0, 4.0, 6.0, 700.0]])
    q, scales = int4.quantize_groups(weight, 4)
    assert scales.tolist() == [[1.0, 2.0, 100.0]]
    assert q.tolist() == [[7, -3, 1, 0, -7, 1, 2, 3, 7]]
    # -3 is 0xD, -7 is 0x9; the ninth value shares its byte with the mark of an odd end, 0x8.
    assert int4.pack(q).tolist() == [[0xD7, 0x01, 0x19, 0x32, 0x87]]
    assert int4.unpack(int4.pack(q)).tolist() == q.tolist()
    assert int4.dequantize_groups(q, scales, 4).tolist() == [[7.0, -3.0, 1.0, 0.0, -14.0, 2.0, 4.0, 6.0, 700.0]]


def test_one_large_weight_costs_its_own_group_only_and_its_range_may_be_cut() -> None:
    weight = torch.linspace(-1, 1, 64).repeat(1, 2)
    weight[0, 5] = 100.0
    stored, _ = quantize_state({"w.weight": weight}, Storage(4, 64))
    error = (dequantize_state(stored)["w.weight"] - weight).abs()
    assert float(error[:, 64:].max()) <= 1 / 14 + 0.01
    assert float(error[:, :64].max()) > 0.9
    # 62 weights of 0.44 and two of 1: with 1 / 7 as the step each 0.44 is off by 0.0114, with 0.15 by 0.0100 or less.
    crowd = torch.cat([torch.full((1, 62), 0.44), torch.ones(1, 2)], dim=1)
    _, whole = int4.quantize_groups(torch.ones(1, 64), 64)
    _, scales = int4.quantize_groups(crowd, 64)
    assert float(whole) == pytest.approx(1 / 7, rel=2**-8)
    steps = [float(torch.tensor(share / 7).to(torch.bfloat16)) for share in int4.SHARES]
    assert float(scales) == min(steps, key=lambda s: 62 * (round(0.44 / s) * s - 0.44) ** 2 + 2 * (7 * s - 1) ** 2)


def test_what_is_kept_is_one_step_wider_and_tables_that_are_small_are_int8_in_four_bits_too() -> None:
    words, positions = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
    layer = "encoder.layer.1.attention.self.query.weight"
    assert [Storage(4).width(name, 2) for name in (words, positions, layer)] == ["int4", "int8", "int4"]
    kept = ("word_embeddings", "encoder.layer.1")
    assert [Storage(4, keep=kept).width(name, 2) for name in (words, layer)] == ["int8", "int8"]
    assert [Storage(8, keep=kept).width(name, 2) for name in (words, layer)] == ["float32", "float32"]
    assert Storage(8, keep=("encoder.layer.1",)).width("encoder.layer.11.output.dense.weight", 2) == "int8"
    assert Storage(8, keep=("*.self.query",)).width(layer, 2) == "float32"


def test_a_file_is_the_same_bytes_twice_and_gives_back_every_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    state = {f"layer.{i}.weight": torch.randn(64, 33, generator=generator) for i in range(3)}
    for storage in (Storage(), Storage(4, 16)):
        stored, _ = quantize_state(state, storage)
        for name in ("a", "b"):
            write_packed(stored, tmp_path / name)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == packed(stored)
        read = read_tensors(tmp_path / "a")
        assert {name: value.dtype for name, value in read.items()} == {n: v.dtype for n, v in stored.items()}
        assert all(torch.equal(read[name], value) for name, value in stored.items())
        assert len(packed(stored)) < len(serialised(stored))


@pytest.mark.parametrize(
    ("place", "says"), [("deflated", "do not unpack"), ("length", "not the 7 bytes"), ("cut", "do not unpack|not the")]
)
def test_packed_weights_that_are_damaged_are_told_from_whole_ones(tmp_path: Path, place: str, says: str) -> None:
    from safetensors.torch import load_file, save_file

    write_packed({"w": torch.arange(1000, dtype=torch.int64)}, tmp_path / "whole")
    held = load_file(tmp_path / "whole")
    if place == "deflated":
        held["deflated"][: len(held["deflated"]) // 2] = 7
    elif place == "length":
        held["length"][:] = 7
    else:
        held["deflated"] = held["deflated"][:-20].clone()
    save_file(held, tmp_path / "damaged")
    with pytest.raises(ValueError, match=says):
        read_tensors(tmp_path / "damaged")


@pytest.mark.parametrize(
    "length",
    [torch.zeros(0, dtype=torch.int64), torch.tensor([-1]), torch.tensor([2**63 - 1]), torch.tensor([torch.inf])],
)
def test_a_length_that_is_none_is_refused_before_anything_is_unpacked(tmp_path: Path, length: torch.Tensor) -> None:
    from safetensors.torch import load_file, save_file

    write_packed({"w": torch.arange(1000, dtype=torch.int64)}, tmp_path / "whole")
    save_file(load_file(tmp_path / "whole") | {"length": length}, tmp_path / "damaged")
    with pytest.raises(ValueError, match="do not say how long they are"):
        read_tensors(tmp_path / "damaged")


def test_four_bits_that_no_one_wrote_are_refused_by_name() -> None:
    scales = torch.ones(1, 1, dtype=torch.bfloat16)
    with pytest.raises(QuantizationError, match=r"w\.weight is damaged: it holds the value -8"):
        dequantize_state({"w.weight": torch.tensor([[0x18]], dtype=torch.uint8), "w.weight.scale": scales})
    with pytest.raises(QuantizationError, match=r"w\.weight\.scale has shape \(1, 1\), which does not fit"):
        dequantize_state({"w.weight": torch.ones(1, 40, dtype=torch.uint8), "w.weight.scale": scales})
    for wrong, says in (({"bits": 3}, "3 bits"), ({"group": 0}, "group of 0")):
        with pytest.raises(QuantizationError, match=re.escape(says)):
            Storage(**wrong)  # type: ignore[arg-type]


def test_the_released_model_fits_what_is_promised_of_it_in_eight_bits_and_in_four() -> None:
    shapes = expected_shapes(preset("mobilebert"))
    # 24,419,584 weights at 1 byte; 161,280 biases and gains, 1,024 of types and 123,706 scales at 4.
    assert stored_bytes(shapes) == 24_419_584 + 4 * (161_280 + 1_024 + 123_706) == 25_563_624
    # 24,157,440 weights at half a byte, a scale of 2 bytes for 64 of them; 262,144 positions with 512 scales; the rest at 4.
    assert stored_bytes(shapes, Storage(4)) == 12_078_720 + 2 * 377_460 + 262_144 + 4 * (512 + 161_280 + 1_024)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    assert len(packed(quantize_state(state, Storage(8))[0])) <= 24_700_000
    assert len(packed(quantize_state(state, Storage(4))[0])) <= 13_000_000
