"""Int8 weights: symmetric, one scale an output channel, activations untouched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 127  # symmetric: -128 is never used, so that a weight and its negative cost the same error
SCALE_STEPS = 1 << 16  # a scale keeps 16 significant bits
SCALE_SUFFIX = ".scale"
UNQUANTIZED_TABLES = ("position_embeddings.weight", "token_type_embeddings.weight")


class QuantizationError(ValueError):
    """Weights that cannot be quantized."""


@dataclass(frozen=True)
class TensorError:
    """How far one tensor's int8 values are from the original, in the weight's own unit."""

    largest: float
    mean: float


def quantize_per_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) float -> int8 (out, in) and float32 scales (out,): w is about q * scale, off by at most scale / 2.

    A row's scale is its largest magnitude over 127, kept to 16 significant bits: q * scale then needs 24, so it is
    exact in float32 on every device, and quantizing dequantized weights again changes nothing. A row of zeros gets 1.
    Halves round to even.

    >>> quantize_per_channel(torch.tensor([[0.5, -127.0], [0.0, 0.0]]))
    (tensor([[   0, -127],
            [   0,    0]], dtype=torch.int8), tensor([1., 1.]))

    Raises:
        QuantizationError: not a matrix, or a value that is not finite.
    """
    if weight.dim() != 2:
        raise QuantizationError(f"a weight of shape {tuple(weight.shape)} has no channels; give a matrix (out, in)")
    if not torch.isfinite(weight).all():
        raise QuantizationError("a weight is NaN or infinite, so it has no scale; train again at a lower rate")
    w = weight.detach().to(torch.float64)
    largest = w.abs().amax(dim=1) if w.shape[1] else w.new_zeros(w.shape[0])
    mantissa, exponent = torch.frexp(largest / LEVELS)
    scales = torch.ldexp(torch.round(mantissa * SCALE_STEPS) / SCALE_STEPS, exponent).to(torch.float32)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    q = torch.round(w / scales.to(torch.float64).unsqueeze(1)).clamp(-LEVELS, LEVELS)
    return q.to(torch.int8), scales


def dequantize(q: Tensor, scales: Tensor) -> Tensor:
    """int8 (out, in) and float32 (out,) -> float32 (out, in)."""
    return q.to(torch.float32) * scales.to(torch.float32).unsqueeze(1)


def is_quantized_name(name: str, dimensions: int) -> bool:
    """Whether int8 storage covers that tensor: all matrices but the two small tables that are added, not multiplied."""
    return dimensions == 2 and not name.endswith(UNQUANTIZED_TABLES)


def quantize_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, TensorError]]:
    """A model's tensors for storage: int8 "<name>" with float32 "<name>.scale" for matrices, float32 for the rest.

    Returns them with the error of each quantized tensor.

    Raises:
        QuantizationError: a value that is not finite; the message names the tensor.
    """
    tensors: dict[str, Tensor] = {}
    errors: dict[str, TensorError] = {}
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise QuantizationError(f"{name} holds a value that is NaN or infinite; train again at a lower rate")
        if not is_quantized_name(name, value.dim()):
            tensors[name] = value.detach().to(torch.float32)
            continue
        q, scales = quantize_per_channel(value)
        difference = (dequantize(q, scales) - value.detach().to(torch.float32)).abs().to(torch.float64)
        errors[name] = TensorError(float(difference.max()), float(difference.mean()))
        tensors[name], tensors[name + SCALE_SUFFIX] = q, scales
    return tensors, errors


def dequantize_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `quantize_state`, up to rounding.

    Raises:
        QuantizationError: an int8 tensor without scales, or scales that do not fit it; the message names the tensor.
    """
    state: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if value.dtype != torch.int8:
            if not (name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in tensors):
                state[name] = value
            continue
        scales = tensors.get(name + SCALE_SUFFIX)
        if scales is None:
            raise QuantizationError(f"{name} is int8 but {name}{SCALE_SUFFIX} is missing; quantize the model again")
        if value.dim() != 2 or scales.shape != value.shape[:1]:
            raise QuantizationError(
                f"{name}{SCALE_SUFFIX} has shape {tuple(scales.shape)}, which does not fit {name} of shape "
                f"{tuple(value.shape)}; quantize the model again"
            )
        state[name] = dequantize(value, scales)
    return state


def stored_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of tensors of these shapes once `quantize_state` has stored them, file header left out."""
    total = 0
    for name, shape in shapes.items():
        count = 1
        for size in shape:
            count *= size
        total += count + 4 * shape[0] if is_quantized_name(name, len(shape)) else 4 * count
    return total
