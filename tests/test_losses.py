"""What each task minimises, on numbers small enough for paper."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pocketfed.model.losses import task_loss

LN2, LN3 = math.log(2), math.log(3)
NONE = torch.tensor(0.0)


def judged(
    task: str, logits: Tensor, mask: Tensor | None, labels: Tensor, weights: Tensor, smoothing: float = 0.0
) -> tuple[float, int, float]:
    loss, correct, weight = task_loss(task, logits, mask, labels, weights, torch.tensor(smoothing))
    assert correct.dtype == torch.int64
    return float(loss), int(correct), float(weight)


# p of the rows: (1/2, 1/4, 1/4) and thirds
LOGITS = torch.tensor([[LN2, 0.0, 0.0], [0.0, 0.0, 0.0]])


def test_classification_is_the_weighted_mean_of_cross_entropies() -> None:
    labels = torch.tensor([0, 2])
    loss, correct, weight = judged("classification", LOGITS, None, labels, torch.tensor([3.0, 1.0]))
    assert loss == pytest.approx((3 * LN2 + LN3) / 4, abs=1e-6)
    assert (correct, weight) == (1, 4.0)


def test_an_example_of_weight_zero_counts_neither_in_the_loss_nor_as_right() -> None:
    loss, correct, weight = judged("classification", LOGITS, None, torch.tensor([0, 0]), torch.tensor([1.0, 0.0]))
    assert (loss, correct, weight) == (pytest.approx(LN2, abs=1e-6), 1, 1.0)


def test_label_smoothing_spreads_its_share_over_all_labels_the_right_one_too() -> None:
    """0.7 ln 2 + 0.3 (ln 2 + 2 ln 4) / 3 = 1.2 ln 2."""
    loss, _, _ = judged("classification", LOGITS[:1], None, torch.tensor([0]), torch.ones(1), smoothing=0.3)
    assert loss == pytest.approx(1.2 * LN2, abs=1e-6)


def test_regression_is_the_weighted_mean_of_squares_and_has_no_right_answers() -> None:
    logits, labels = torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 5.0])
    assert judged("regression", logits, None, labels, torch.tensor([1.0, 3.0])) == (3.25, 0, 4.0)
    assert judged("regression", logits, None, labels, torch.tensor([1.0, 3.0]), smoothing=0.3) == (3.25, 0, 4.0)


def test_tokens_count_once_each_but_those_without_a_label_and_padding() -> None:
    """p = 3/4 for the one labelled token of the first row, 1/2 for that of the second, whose other is padding."""
    logits = torch.tensor([[[LN3, 0.0], [9.0, 0.0]], [[0.0, 0.0], [9.0, 0.0]]])
    labels, mask = torch.tensor([[0, -1], [1, 1]]), torch.tensor([[1, 1], [1, 0]])
    loss, correct, weight = judged("tokens", logits, mask, labels, torch.tensor([2.0, 1.0]))
    assert loss == pytest.approx((2 * math.log(4 / 3) + LN2) / 3, abs=1e-6)
    assert (correct, weight) == (1, 3.0)
    smoothed, _, _ = judged("tokens", logits[:1], mask[:1], labels[:1], torch.ones(1), smoothing=0.2)
    assert smoothed == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4), abs=1e-6)


def test_a_span_is_the_mean_of_its_two_ends_and_right_only_with_both() -> None:
    """Starts: p = 3/4 among two real tokens; ends: 1/2, then 3/4. Padding's huge logits say nothing."""
    mask = torch.tensor([[1, 1, 0]])
    labels = torch.tensor([[0, 1]])
    for end, p, right in ((0.0, 1 / 2, 0), (LN3, 3 / 4, 1)):
        logits = torch.tensor([[[LN3, 0.0], [0.0, end], [99.0, 99.0]]])
        for smoothing in (0.0, 0.3):  # positions are not smoothed over
            loss, correct, weight = judged("spans", logits, mask, labels, torch.ones(1), smoothing)
            assert loss == pytest.approx((math.log(4 / 3) - math.log(p)) / 2, abs=1e-6)
            assert (correct, weight) == (right, 1.0)


@pytest.mark.parametrize("task", ["classification", "regression", "tokens", "spans"])
def test_a_batch_in_which_nothing_counts_has_loss_and_gradient_zero(task: str) -> None:
    shape = {"classification": (2, 3), "regression": (2, 1), "tokens": (2, 4, 3), "spans": (2, 4, 2)}[task]
    labels = {"regression": torch.zeros(2), "tokens": torch.zeros(2, 4, dtype=torch.int64)}.get(
        task, torch.zeros(2, 2, dtype=torch.int64) if task == "spans" else torch.zeros(2, dtype=torch.int64)
    )
    logits = torch.ones(shape, requires_grad=True)
    loss, correct, weight = task_loss(task, logits, torch.ones(2, 4), labels, torch.zeros(2), NONE)
    assert (loss.item(), correct.item(), weight.item()) == (0.0, 0, 0.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient.any()
