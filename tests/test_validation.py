"""An update touches the model only if it is exactly what was asked for, and no further than those of others."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pocketfed.coordinator.aggregation import norm
from pocketfed.coordinator.validation import (
    LARGEST,
    WINDOW,
    History,
    Limits,
    Reference,
    capped_examples,
    check_examples,
    check_form,
    check_norm,
    check_values,
    clip_scale,
    reference,
)

LIMITS = Limits(size=3, max_examples=100, clip_factor=3.0, refuse_factor=30.0, examples_factor=5.0)


def sent(*values: float) -> dict[str, Any]:
    return {"theta": np.array(values, np.float32)}


def test_exactly_what_was_asked_for_is_in_form() -> None:
    assert check_form(sent(1.0, 2.0, 3.0), "theta", 3) is None


@pytest.mark.parametrize(
    ("arrays", "code", "says"),
    [
        (sent(1.0), "shape", "'theta' is float32 of shape (1,); expected shape (3,)"),
        ({"theta": np.float32(1.0)}, "shape", "of shape ()"),
        ({"theta": np.ones((1, 3), np.float32)}, "shape", "of shape (1, 3)"),
        ({"theta": np.ones((3, 1), np.float32)}, "shape", "of shape (3, 1)"),
        (sent(1.0, 2.0, 3.0, 4.0), "shape", "of shape (4,)"),
        (sent(), "shape", "of shape (0,)"),
        ({"theta": np.ones(3)}, "dtype", "'theta' is float64"),
        ({"theta": np.ones(3, np.float16)}, "dtype", "'theta' is float16"),
        ({"theta": np.ones(3, np.int32)}, "dtype", "'theta' is int32"),
        ({"theta": np.ones(3, ">f4")}, "dtype", "'theta' is >f4"),
        ({"theta": np.ones(3, np.complex64)}, "dtype", "'theta' is complex64"),
        ({"weights": np.ones(3, np.float32)}, "names", "arrays are named ['weights']; expected only 'theta'"),
        (sent(1.0, 2.0, 3.0) | {"extra": np.ones(1, np.float32)}, "names", "['extra', 'theta']"),
        ({}, "names", "arrays are named []"),
    ],
)
def test_fault_07_a_wrong_form_is_refused_naming_the_tensor_and_never_broadcast(
    arrays: dict[str, Any], code: str, says: str
) -> None:
    refusal = check_form(arrays, "theta", 3)
    assert refusal is not None
    assert refusal.code == code
    assert says in str(refusal)


@pytest.mark.parametrize("weight", [0, -9, 0.5, math.nan, math.inf, -math.inf, True, None, "5", [5]])
def test_fault_08_a_weight_that_is_no_number_of_examples_is_refused(weight: Any) -> None:
    refusal = check_examples(weight)
    assert refusal is not None
    assert str(refusal) == f"num_examples: num-examples is {weight!r}; expected a number of at least 1"


def test_fault_08_a_boast_is_lowered_to_the_runs_cap_and_to_five_times_the_median() -> None:
    assert check_examples(10**9) is None
    assert capped_examples(10**9, LIMITS, Reference()) == 100
    assert capped_examples(10**9, LIMITS, Reference(examples=12)) == 60
    assert capped_examples(59, LIMITS, Reference(examples=12)) == 59
    assert capped_examples(90, Limits(3, 100), Reference(examples=12)) == 90  # no factor, no rule


def test_fault_09_a_long_update_weighs_less_so_that_length_and_weight_are_not_both_used_up() -> None:
    limits = Limits(3, 100, examples_factor=2.0)
    known = Reference(norm=2.0, examples=10, influence=20.0)
    assert capped_examples(10**9, limits, known, norm=2.0) == 20  # 2 · 10 examples, 2 · 20 of weight × length
    assert capped_examples(10**9, limits, known, norm=5.0) == 8  # 2 · 20 / 5
    assert capped_examples(7, limits, known, norm=5.0) == 7
    assert capped_examples(15, limits, known, norm=1e-9) == 15
    assert capped_examples(15, Limits(3, 100), known, norm=5.0) == 15


@pytest.mark.parametrize(
    ("values", "code", "says"),
    [
        ([1.0, math.nan, 3.0], "not_finite", "1 of the update's 3 values are not finite"),
        ([math.inf, -math.inf, 3.0], "not_finite", "2 of the update's 3 values are not finite"),
        ([0.0, 0.0, 0.0], "zero", "changes nothing"),
        ([-0.0, 0.0, -0.0], "zero", "changes nothing"),
        ([1e-42, -1e-43, 1e-44], "zero", "changes nothing"),  # denormals
    ],
)
def test_fault_06_values_that_are_no_update_are_refused(values: list[float], code: str, says: str) -> None:
    delta = np.array(values, np.float32)
    refusal = check_values(delta, norm(delta))
    assert refusal is not None
    assert refusal.code == code
    assert says in refusal.why


def test_a_small_update_of_ordinary_numbers_passes() -> None:
    delta = np.array([1e-30, 0.0, 0.0], np.float32)
    assert check_values(delta, norm(delta)) is None


def test_an_update_may_be_as_long_as_the_runs_limit_and_no_longer() -> None:
    limits = Limits(3, 100, max_norm=5.0)
    assert check_norm(5.0, limits, Reference()) is None
    assert str(check_norm(5.4083, limits, Reference())) == "norm: the update's norm 5.408 exceeds the run's limit 5"
    assert check_norm(LARGEST, Limits(3, 100), Reference()) is None
    assert check_norm(2 * LARGEST, Limits(3, 100), Reference()) is not None


def test_fault_09_an_update_far_longer_than_others_is_refused_and_a_longer_one_clipped() -> None:
    known = Reference(norm=2.0)
    assert (
        str(check_norm(2e6, LIMITS, known))
        == "norm: the update's norm 2e+06 is 1e+06 times the median of accepted ones"
    )
    assert check_norm(60.0, LIMITS, known) is None
    assert clip_scale(60.0, LIMITS, known) == 0.1  # to 3 · 2
    assert clip_scale(6.0, LIMITS, known) == 1.0
    assert clip_scale(60.0, LIMITS, Reference()) == 1.0  # nothing known yet


def test_fault_10_an_update_of_next_to_nothing_is_refused() -> None:
    refusal = check_norm(1e-9, LIMITS, Reference(norm=2.0))
    assert refusal is not None
    assert refusal.code == "zero"
    assert check_norm(1e-5, LIMITS, Reference(norm=2.0)) is None


def test_medians_take_three_and_of_two_in_the_middle_the_lower() -> None:
    assert reference(History((1.0, 2.0), (5, 6))) == Reference(None, None)
    assert reference(History((9.0, 1e9, 3.0), (5, 6, 7))) == Reference(9.0, 6, 45.0)
    assert reference(History((1e9, 1.0, 1e9, 2.0), (5, 6, 7, 8))) == Reference(2.0, 6, 16.0)  # of 5e9, 6, 7e9 and 16


def test_the_history_forgets_the_oldest() -> None:
    history = History(tuple(map(float, range(WINDOW)))).and_these([1000.0], [5.0])
    assert len(history.norms) == WINDOW
    assert (history.norms[0], history.norms[-1], history.examples) == (1.0, 1000.0, (5.0,))
