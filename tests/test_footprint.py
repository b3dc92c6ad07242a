"""How much memory a step holds: the liveness of a graph small enough to follow by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pocketfed.model.footprint import activation_bytes, evaluate
from pocketfed.model.lowering import BATCH_PRIME, Lowering, Shape

LENGTH = 13
LOW = Lowering(LENGTH)


def shape(sizes: Sequence[int]) -> Shape:
    return LOW.shape(sizes)


def traced(function: object, *inputs: torch.Tensor) -> torch.fx.Graph:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = [torch.zeros(x.shape, device="cpu") for x in inputs]
        return make_fx(function, tracing_mode="real")(*fake).graph  # type: ignore[arg-type]


def meta(*sizes: int) -> torch.Tensor:
    return torch.empty(sizes, device="meta")


def test_of_two_operations_the_second_runs_while_its_input_is_held_and_the_first_ones_is_gone() -> None:
    """x (B, 4), 16 bytes an example; exp(x), then tanh of that: at any time two of the three are alive."""
    graph = traced(lambda x: torch.tanh(torch.exp(x)), meta(BATCH_PRIME, 4))
    assert activation_bytes(graph, shape, inputs=1) == (0, 32, 0, 0)


def test_what_is_read_again_at_the_end_is_held_all_the_while() -> None:
    """x, exp(x) and tanh(exp(x)) are alive when x is added: then four, of 16 bytes an example."""
    graph = traced(lambda x: torch.tanh(torch.exp(x)) + x, meta(BATCH_PRIME, 4))
    assert activation_bytes(graph, shape, inputs=1) == (0, 48, 0, 0)


def test_a_view_costs_nothing_and_a_frozen_weight_is_counted_elsewhere() -> None:
    """x (B, T, 2) is 8 bytes a token, x W (B, T, 3) is 12; the views between them and W none."""
    graph = traced(lambda x, w: x.view(-1, 2) @ w, meta(BATCH_PRIME, LENGTH, 2), meta(2, 3))
    assert activation_bytes(graph, shape, inputs=1) == (0, 0, 20, 0)
    assert activation_bytes(graph, shape, inputs=2) == (24, 0, 20, 0), "as a part of theta it is"


def test_attention_grows_with_the_square_of_the_length() -> None:
    """q (B, T, 2) twice 8 bytes a token, scores (B, T, T) 4 a pair."""
    graph = traced(torch.bmm, meta(BATCH_PRIME, LENGTH, 2), meta(BATCH_PRIME, 2, LENGTH))
    counted = activation_bytes(graph, shape, inputs=2)
    assert counted == (0, 0, 16, 4)
    assert evaluate(counted, 3, 10) == 3 * (16 * 10 + 4 * 100)
