"""The device's numpy optimizers take the steps that torch.optim takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pocketfed.client_sdk.errors import ConfigurationError
from pocketfed.client_sdk.optimizers import OPTIMIZERS, make_optimizer

SIZE, STEPS = 257, 12
Settings = tuple[str, float, float, float]  # name, learning rate, momentum, weight decay
CASES: list[tuple[Settings, Callable[[list[torch.Tensor]], torch.optim.Optimizer]]] = [
    (("sgd", 0.1, 0.0, 0.0), lambda p: torch.optim.SGD(p, lr=0.1)),
    (("sgd", 0.05, 0.9, 0.0), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)),
    (("adamw", 1e-3, 0.0, 0.0), lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0)),
    (("adamw", 1e-2, 0.0, 0.1), lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1)),
]


def gradients() -> list[Any]:
    """From 1e-6 to 1e2 in size, some of them zero, as gradients are."""
    generator = np.random.default_rng(1)
    scales = 10.0 ** generator.uniform(-6, 2, SIZE)
    drawn = [(generator.normal(size=SIZE) * scales).astype(np.float32) for _ in range(STEPS)]
    for gradient in drawn:
        gradient[:5] = 0
    return drawn


def walk(settings: Settings) -> Any:
    theta = np.random.default_rng(0).normal(size=SIZE).astype(np.float32)
    optimizer = make_optimizer(*settings)
    for gradient in gradients():
        optimizer.step(theta, gradient)
    return theta


@pytest.mark.parametrize(("settings", "reference"), CASES, ids=["sgd", "momentum", "adamw", "adamw with decay"])
def test_twelve_steps_end_where_torch_ends(settings: Settings, reference: Callable[..., torch.optim.Optimizer]) -> None:
    theirs = torch.from_numpy(np.random.default_rng(0).normal(size=SIZE).astype(np.float32))
    optimizer = reference([theirs])
    for gradient in gradients():
        theirs.grad = torch.from_numpy(gradient)
        optimizer.step()
    np.testing.assert_allclose(walk(settings), theirs.numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", [c[0] for c in CASES])
def test_the_same_steps_give_the_same_bits(settings: Settings) -> None:
    assert walk(settings).tobytes() == walk(settings).tobytes()


@pytest.mark.parametrize("settings", [c[0] for c in CASES])
def test_a_step_moves_the_vector_in_place_and_keeps_float32(settings: Settings) -> None:
    whole = np.zeros(2 * SIZE, np.float32)
    theta = whole[:SIZE]
    make_optimizer(*settings).step(theta, np.ones(SIZE, np.float32))
    assert theta.dtype == np.float32
    assert (whole[:SIZE] < 0).all(), "against the gradient"
    assert not whole[SIZE:].any(), "nothing else"


def test_momentum_remembers_by_hand() -> None:
    theta = np.zeros(1, np.float32)
    optimizer = make_optimizer("sgd", 1.0, 0.5, 0.0)
    seen = []
    for _ in range(3):
        optimizer.step(theta, np.ones(1, np.float32))
        seen.append(float(theta[0]))
    assert seen == [-1.0, -2.5, -4.25]  # v = 1, 1.5, 1.75


def test_the_first_step_of_adamw_is_the_learning_rate_whatever_the_gradients_size() -> None:
    theta = np.zeros(3, np.float32)
    make_optimizer("adamw", 0.01, 0.0, 0.0).step(theta, np.array([1e-3, -5.0, 1e3], np.float32))
    np.testing.assert_allclose(theta, [-0.01, 0.01, -0.01], rtol=1e-4)


def test_weight_decay_shrinks_a_parameter_without_a_gradient() -> None:
    theta = np.array([2.0], np.float32)
    make_optimizer("adamw", 0.1, 0.0, 0.5).step(theta, np.zeros(1, np.float32))
    assert float(theta[0]) == pytest.approx(2.0 * (1 - 0.1 * 0.5))


def test_an_unknown_optimizer_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigurationError, match="there is no optimizer 'lion'; choose one of adamw, sgd"):
        make_optimizer("lion", 0.1, 0.0, 0.0)
    assert OPTIMIZERS == ("adamw", "sgd")
