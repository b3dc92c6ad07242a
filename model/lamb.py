"""LAMB, the optimizer MobileBERT is distilled with (You et al., ICLR 2020, algorithm 2), as Google's code has it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Lamb(torch.optim.Optimizer):
    """Adam's direction, scaled per tensor so that its length is a fraction `lr` of the tensor's own.

    Differs from the paper as google-research/mobilebert does: no bias correction (warm-up does that job), and tensors
    in groups with `adapt=False` (norms and biases) step by `lr` alone, without weight decay.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("Lamb takes no closure; compute the gradients, then call step()")
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        b1, b2 = group["betas"]
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}
        gradients = [p.grad for p in parameters if p.grad is not None]
        first = [self.state[p]["m"] for p in parameters]
        second = [self.state[p]["v"] for p in parameters]
        # All tensors at once: a small model has hundreds of small ones, and a Python loop over them is half the step.
        torch._foreach_lerp_(first, gradients, 1.0 - b1)
        torch._foreach_mul_(second, b2)
        torch._foreach_addcmul_(second, gradients, gradients, 1.0 - b2)
        divisors = torch._foreach_sqrt(second)
        torch._foreach_add_(divisors, group["eps"])
        updates = torch._foreach_div(first, divisors)
        if group["weight_decay"]:
            torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
        if group["adapt"]:
            torch._foreach_mul_(updates, _trust_ratios(parameters, updates))
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])


def _trust_ratios(parameters: list[Tensor], updates: tuple[Tensor, ...]) -> list[Tensor]:
    """|w| / |u| of each tensor; 1 where either is zero (a tensor of zeros could never leave zero otherwise)."""
    lengths = zip(torch._foreach_norm(parameters), torch._foreach_norm(updates), strict=True)
    return [torch.where((w > 0) & (u > 0), w / u, torch.ones_like(w)) for w, u in lengths]


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], lr: float) -> list[dict[str, Any]]:
    """Named parameters as LAMB groups at one rate: matrices and tables adapt and decay, norms and biases do neither."""
    adapted: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in parameters:
        (plain if is_norm_or_bias(name) else adapted).append(p)
    groups = [
        {"params": adapted, "lr": lr},
        {"params": plain, "lr": lr, "weight_decay": 0.0, "adapt": False},
    ]
    return [group for group in groups if group["params"]]


def is_norm_or_bias(name: str) -> bool:
    return "LayerNorm" in name or name.rsplit(".", 1)[-1] == "bias"
