"""The same student with fewer operations, where parameters are frozen: the reference model, transformed."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketfed.model.adapters import LoraLinear
from pocketfed.model.heads import TextClassifier
from pocketfed.model.mobilebert import BlockOutput, BottleneckInput, NoNorm, ResidualOutput
from pocketfed.model.quantization import is_kept

ACTIVATIONS = ("float32", "int8")
INT8_LEVELS = 127


def lean(model: TextClassifier, activations: str = "float32", keep: Sequence[str] = ()) -> TextClassifier:
    """A copy whose frozen norms are folded into the products before them. Trainable parameters keep names and values.

    Args:
        activations: "int8" also rounds what enters a frozen product to 8 bits, one scale a token: the product is then
            of integers, and what an example gives still does not depend on its batch.
        keep: layers that read float32 all the same, as in `quantization.Storage`.

    Raises:
        ValueError: `activations` is not one of ACTIVATIONS.
    """
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations are {activations!r}; choose one of {', '.join(ACTIVATIONS)}")
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, BottleneckInput) and _foldable(child):
                _scale_rows(child.dense, child.LayerNorm)  # type: ignore[arg-type] # see _foldable
                child.LayerNorm = nn.Identity()
            elif isinstance(child, ResidualOutput) and _foldable(child):
                setattr(module, name, FoldedOutput(child))
    if activations == "int8":
        _round_activations(model, keep)
    return model


def _frozen(module: nn.Module) -> bool:
    return not any(p.requires_grad for p in module.parameters())


def _foldable(module: BottleneckInput | ResidualOutput) -> bool:
    return (
        isinstance(module.LayerNorm, NoNorm)
        and type(module.dense) is nn.Linear
        and _frozen(module.LayerNorm)
        and _frozen(module.dense)
    )


def _scale_rows(linear: nn.Linear, norm: NoNorm) -> None:
    """gamma * (W x + b) + beta = (gamma W) x + (gamma b + beta), in float64 so that it is rounded once."""
    with torch.no_grad():
        gamma = norm.weight.double()
        linear.bias.copy_(gamma * linear.bias.double() + norm.bias.double())
        linear.weight.copy_(gamma.unsqueeze(1) * linear.weight.double())


class FoldedOutput(nn.Module):
    """gamma * (W x + b + residual) + beta = W' x + b' + gamma * residual."""

    def __init__(self, output: ResidualOutput) -> None:
        super().__init__()
        norm = output.LayerNorm
        assert isinstance(norm, NoNorm)  # see _foldable
        self.dense = output.dense
        _scale_rows(output.dense, norm)
        self.gain = norm.weight
        if isinstance(output, BlockOutput) and hasattr(output, "bottleneck"):
            bottleneck = output.bottleneck
            self.bottleneck = FoldedOutput(bottleneck) if _foldable(bottleneck) else bottleneck

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.dense(x) + residual * self.gain  # type: ignore[no-any-return]


class Int8Linear(nn.Module):
    """A linear layer of frozen weight that reads its input rounded to 8 bits a token."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight) + self.bias  # type: ignore[no-any-return]


class Int8Lora(LoraLinear):
    """LoRA on a frozen product of 8-bit activations; the low-rank part stays float."""

    def __init__(self, lora: LoraLinear) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.scale = lora.weight, lora.bias, lora.scale
        self.lora_A, self.lora_B = lora.lora_A, lora.lora_B

    def forward(self, x: Tensor) -> Tensor:
        base = int8_linear(x, self.weight) + self.bias
        return base + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale  # type: ignore[no-any-return]


def _round_activations(model: TextClassifier, keep: Sequence[str]) -> None:
    """In place: every product with a frozen weight, but the head's."""
    for path, module in list(model.mobilebert.named_modules()):
        for name, child in module.named_children():
            if is_kept(f"{path}.{name}", keep):
                continue
            if type(child) is nn.Linear and not child.weight.requires_grad:  # its bias may be trained
                setattr(module, name, Int8Linear(child))
            elif type(child) is LoraLinear:
                setattr(module, name, Int8Lora(child))


@torch.library.custom_op("pocketfed::int8_linear", mutates_args=())
def int8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) times weight (out, in): x is rounded to 8 bits with one scale a row, max |x| / 127 (halves to even).

    Its gradient is that of the product without the rounding (Bengio et al. 2013, the straight-through estimator).
    """
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / INT8_LEVELS
    return F.linear(torch.round(x / scale), weight) * scale


@int8_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
    (weight,) = ctx.saved_tensors  # type: ignore[attr-defined]
    return gradient @ weight, None


int8_linear.register_autograd(_backward, setup_context=_keep)
