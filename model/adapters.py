"""Trainable sets: which parameters a device trains, and what must be added to the model for that."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketfed.model.heads import TextClassifier
from pocketfed.model.mobilebert import Attention, SelfAttention
from pocketfed.model.parameters import Parameter, Vector, lay_out

TRAINABLE_SETS = "head, norms, lora:RANK, last:BLOCKS, full"
LORA_ALPHA = 16.0  # Hu et al. 2022: the update is alpha / rank * B A


class TrainableSetError(ValueError):
    """A trainable set that does not exist or does not fit the model."""


class LoraLinear(nn.Module):
    """y = W x + b + (alpha / r) B A x, with W and b frozen (Hu et al. 2022, section 4.1)."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = LORA_ALPHA / rank
        bound = 1.0 / math.sqrt(linear.in_features)
        down = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(down)
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))  # zero: training starts from W

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale


def parse_set(name: str) -> tuple[str, int]:
    """`lora:8` -> ("lora", 8); sets without a number have 0.

    Raises:
        TrainableSetError: not one of TRAINABLE_SETS.
    """
    kind, _, number = name.partition(":")
    if name in ("head", "norms", "full"):
        return kind, 0
    if kind in ("lora", "last") and number.isascii() and number.isdigit() and int(number) > 0:
        return kind, int(number)
    raise TrainableSetError(f"there is no trainable set {name!r}; choose one of {TRAINABLE_SETS}")


def select(model: TextClassifier, name: str, seed: int = 0) -> TextClassifier:
    """Mark the parameters of a trainable set with requires_grad, adding LoRA matrices where the set is LoRA. In place.

    The head is in every set: its labels are the task.

    Raises:
        TrainableSetError: unknown set, or more blocks or rank than the model has.
    """
    kind, number = parse_set(name)
    blocks = model.mobilebert.encoder.layer
    if kind == "last" and number > len(blocks):
        raise TrainableSetError(f"{name!r} asks for {number} blocks; the model has {len(blocks)}")
    if kind == "lora":
        if number > model.config.intra_bottleneck_size:
            raise TrainableSetError(f"rank {number} of {name!r} exceeds the width {model.config.intra_bottleneck_size}")
        _add_lora(model, number, torch.Generator().manual_seed(seed))
    last = (
        {f"mobilebert.encoder.layer.{i}." for i in range(len(blocks) - number, len(blocks))}
        if kind == "last"
        else set()
    )
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(
            kind == "full"
            or parameter_name.startswith("classifier.")
            or (kind == "norms" and ".LayerNorm." in parameter_name)
            or (kind == "lora" and ".lora_" in parameter_name)
            or any(parameter_name.startswith(prefix) for prefix in last)
        )
    return model


def _add_lora(model: TextClassifier, rank: int, generator: torch.Generator) -> None:
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.query = LoraLinear(module.query, rank, generator)  # type: ignore[assignment]
            module.key = LoraLinear(module.key, rank, generator)  # type: ignore[assignment]
            module.value = LoraLinear(module.value, rank, generator)  # type: ignore[assignment]
        if isinstance(module, Attention):
            module.output.dense = LoraLinear(module.output.dense, rank, generator)  # type: ignore[assignment]


def layout_of(model: nn.Module) -> tuple[Parameter, ...]:
    """Where each trainable parameter lies in theta."""
    return lay_out((n, p.shape) for n, p in model.named_parameters() if p.requires_grad)


def get_theta(model: nn.Module) -> Vector:
    """The trainable parameters as one float32 vector."""
    vector = torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])
    return vector.to(torch.float32).numpy().copy()


def set_theta(model: nn.Module, theta: Vector) -> None:
    """Write a flat vector back into the model's trainable parameters."""
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    values: Sequence[Tensor] = torch.split(torch.from_numpy(theta.copy()), sizes)
    with torch.no_grad():
        for parameter, value in zip((p for p in model.parameters() if p.requires_grad), values, strict=True):
            parameter.copy_(value.view_as(parameter))
