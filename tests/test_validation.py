"""An update touches the model only if it is exactly what was asked for."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from pocketfed.coordinator.validation import Limits, check_update

THETA = np.array([1.0, 2.0, 3.0], np.float32)
LIMITS = Limits(size=3, max_examples=100)


def sent(*values: float) -> dict[str, Any]:
    return {"theta": np.array(values, np.float32)}


def test_a_good_update_is_accepted_with_its_norm() -> None:
    verdict = check_update(THETA, sent(4.0, 2.0, 7.0), 5, LIMITS)
    assert verdict.reason is None
    assert verdict.norm == 5.0  # (3, 0, 4)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        (sent(1.0), r"'theta' is float32 of shape \(1,\); expected float32 of shape \(3,\)"),
        ({"theta": np.float32(1.0)}, r"of shape \(\)"),
        ({"theta": np.ones((1, 3), np.float32)}, r"of shape \(1, 3\)"),
        (sent(1.0, 2.0, 3.0, 4.0), r"of shape \(4,\)"),
        ({"theta": np.ones(3)}, "'theta' is float64"),
        ({"theta": np.ones(3, np.int32)}, "'theta' is int32"),
        ({"theta": np.ones(3, np.complex64)}, "'theta' is complex64"),
        (sent(1.0, math.nan, 3.0), "1 values that are not finite"),
        (sent(math.inf, -math.inf, 3.0), "2 values that are not finite"),
        ({"weights": np.ones(3, np.float32)}, r"arrays are named \['weights'\]; expected only 'theta'"),
        (sent(1.0, 2.0, 3.0) | {"extra": np.ones(1, np.float32)}, r"\['extra', 'theta'\]"),
        ({}, r"arrays are named \[\]"),
    ],
)
def test_arrays_that_are_not_exactly_theta_are_refused(arrays: dict[str, Any], says: str) -> None:
    verdict = check_update(THETA, arrays, 5, LIMITS)
    assert verdict.reason is not None
    assert re.search(says, verdict.reason)
    assert verdict.norm is None


@pytest.mark.parametrize("weight", [0, -9, 0.5, math.nan, math.inf, -math.inf, True, None, "5", [5]])
def test_a_weight_that_is_no_number_of_examples_is_refused(weight: Any) -> None:
    verdict = check_update(THETA, sent(1.0, 2.0, 3.0), weight, LIMITS)
    assert verdict.reason is not None
    assert verdict.reason.startswith(
        f"num-examples is {weight}" if not isinstance(weight, str) else "num-examples is '5'"
    )


def test_an_update_may_be_as_long_as_the_limit_and_no_longer() -> None:
    limits = Limits(3, 100, max_norm=5.0)
    assert check_update(THETA, sent(4.0, 2.0, 7.0), 5, limits).reason is None
    verdict = check_update(THETA, sent(4.0, 2.0, 7.5), 5, limits)
    assert verdict.reason == "the update's norm 5.408 exceeds the run's limit 5"
    assert verdict.norm == pytest.approx(math.sqrt(9 + 4.5**2))


def test_the_norm_of_the_largest_floats_does_not_overflow() -> None:
    huge = float(np.finfo(np.float32).max)
    verdict = check_update(np.zeros(2, np.float32), sent(huge, huge), 5, Limits(2, 100))
    assert verdict.norm == pytest.approx(math.sqrt(2) * huge)


def test_looking_changes_nothing() -> None:
    theta, arrays = THETA.copy(), sent(4.0, 2.0, 7.0)
    check_update(theta, arrays, 5, LIMITS)
    assert theta.tolist() == [1.0, 2.0, 3.0]
    assert arrays["theta"].tolist() == [4.0, 2.0, 7.0]
