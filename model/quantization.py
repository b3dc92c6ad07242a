"""A model's weights in eight or four bits: symmetric, activations untouched, and exactly the same a second time."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from pocketfed.model import int4

LEVELS = 127  # symmetric: -128 is never used, so that a weight and its negative cost the same error
SCALE_STEPS = 1 << 16  # a scale keeps 16 significant bits
SMALLEST = 2.0**-100  # a row below it is stored as zeros: its scale would be one of float32's denormals
SCALE_SUFFIX = ".scale"
UNQUANTIZED_TABLES = ("position_embeddings.weight", "token_type_embeddings.weight")
GROUP = 64  # weights that share a scale in four bits
Width = Literal["float32", "int8", "int4"]


class QuantizationError(ValueError):
    """Weights that cannot be quantized, or a way to do it that does not exist."""


@dataclass(frozen=True)
class TensorError:
    """How far one tensor's stored values are from the original, in the weight's own unit; relative: of their norms."""

    largest: float
    mean: float
    relative: float = 0.0


@dataclass(frozen=True)
class Storage:
    """How a model's tensors lie in its file.

    bits: of a matrix's values, 8 or 4. group: weights that share a scale in 4 bits. keep: layers kept wider, by name, the
    end or a part of one between dots, or a pattern (`encoder.layer.0`, `word_embeddings`, `*.value`): float32 instead of
    int8, int8 instead of int4.
    """

    bits: int = 8
    group: int = GROUP
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise QuantizationError(f"weights of {self.bits} bits cannot be stored; choose 8 or 4")
        if not 8 <= self.group <= 4096:
            raise QuantizationError(f"a group of {self.group} weights is out of range; choose from 8 to 4096")

    def width(self, name: str, dimensions: int) -> Width:
        """What holds the tensor's values. Position tables and heads are int8 whatever the bits of the others.

        >>> Storage(4, keep=("layer.0",)).width("encoder.layer.0.output.dense.weight", 2)
        'int8'
        """
        if dimensions != 2 or name.endswith("token_type_embeddings.weight"):
            return "float32"
        kept = is_kept(name, self.keep)
        if self.bits == 8 or name.endswith(("position_embeddings.weight", "classifier.weight")):
            return "float32" if kept else "int8"
        return "int8" if kept else "int4"


INT8 = Storage()


def is_kept(name: str, keep: Iterable[str]) -> bool:
    """
    >>> is_kept("encoder.layer.10.attention.self.query.weight", ("layer.1",))
    False
    """
    layer = name.removesuffix(".weight").removesuffix(".bias")
    return any(f".{pattern}." in f".{layer}." or fnmatchcase(layer, pattern) for pattern in keep)


def check_kept(keep: Iterable[str], names: Iterable[str]) -> None:
    """Raises QuantizationError if something to be kept is the name of no layer; the message has the nearest one."""
    layers = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    for pattern in keep:
        if not any(is_kept(layer, (pattern,)) for layer in layers):
            near = difflib.get_close_matches(pattern, layers, n=1, cutoff=0.0)
            hint = f", such as {near[0]}" if near else ""
            raise QuantizationError(f"there is no layer {pattern!r} to keep; name one of the model's{hint}")


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
    scales = channel_scales(w)
    q = torch.round(w / scales.to(torch.float64).unsqueeze(1)).clamp(-LEVELS, LEVELS)
    return q.to(torch.int8), scales


def channel_scales(weight: Tensor) -> Tensor:
    """(out, in) float64 -> the float32 scales (out,) of `quantize_per_channel`."""
    largest = weight.abs().amax(dim=1) if weight.shape[1] else weight.new_zeros(weight.shape[0])
    mantissa, exponent = torch.frexp(torch.where(largest < SMALLEST, 0.0, largest) / LEVELS)
    scales = torch.ldexp(torch.round(mantissa * SCALE_STEPS) / SCALE_STEPS, exponent).to(torch.float32)
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def dequantize(q: Tensor, scales: Tensor) -> Tensor:
    """int8 (out, in) and float32 (out,) -> float32 (out, in)."""
    return q.to(torch.float32) * scales.to(torch.float32).unsqueeze(1)


def is_quantized_name(name: str, dimensions: int) -> bool:
    """Whether plans hold that frozen tensor as int8: all matrices but the two tables that are added, not multiplied."""
    return dimensions == 2 and not name.endswith(UNQUANTIZED_TABLES)


def quantize_state(
    state: Mapping[str, Tensor], storage: Storage = INT8
) -> tuple[dict[str, Tensor], dict[str, TensorError]]:
    """A model's tensors for storage: "<name>" and "<name>.scale" for matrices, float32 for the rest.

    int8 values have float32 scales (out,), packed int4 ones (uint8) bfloat16 scales (out, groups). Returns them with the
    error of each quantized tensor.

    Raises:
        QuantizationError: a value that is not finite; the message names the tensor.
    """
    tensors: dict[str, Tensor] = {}
    errors: dict[str, TensorError] = {}
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise QuantizationError(f"{name} holds a value that is NaN or infinite; train again at a lower rate")
        width = storage.width(name, value.dim())
        if width == "float32":
            tensors[name] = value.detach().to(torch.float32)
            continue
        if width == "int8":
            q, scales = quantize_per_channel(value)
            rounded = dequantize(q, scales)
        else:
            q, scales = int4.quantize_groups(value, storage.group)
            rounded, q = int4.dequantize_groups(q, scales, storage.group), int4.pack(q)
        errors[name] = _error(rounded, value)
        tensors[name], tensors[name + SCALE_SUFFIX] = q, scales
    return tensors, errors


def _error(rounded: Tensor, value: Tensor) -> TensorError:
    original = value.detach().to(torch.float64)
    difference = (rounded.to(torch.float64) - original).abs()
    if not difference.numel():
        return TensorError(0.0, 0.0)
    norm = float(original.norm())
    return TensorError(
        float(difference.max()), float(difference.mean()), float(difference.norm()) / norm if norm else 0.0
    )


def dequantize_state(tensors: Mapping[str, Tensor], group: int = GROUP) -> dict[str, Tensor]:
    """The inverse of `quantize_state`, up to rounding.

    Raises:
        QuantizationError: a quantized tensor without scales, or scales that do not fit it; the message names the tensor.
    """
    state: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if value.dtype not in (torch.int8, torch.uint8):
            if not (name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in tensors):
                state[name] = value
            continue
        kind = "int8" if value.dtype == torch.int8 else "int4"
        scales = tensors.get(name + SCALE_SUFFIX)
        if scales is None:
            raise QuantizationError(f"{name} is {kind} but {name}{SCALE_SUFFIX} is missing; quantize the model again")
        try:
            q = value if kind == "int8" or value.dim() != 2 else int4.unpack(value)
        except ValueError as error:
            raise QuantizationError(f"{name} is damaged: {error}; quantize the model again") from None
        wanted = q.shape[:1] if kind == "int8" else (q.shape[0], int4.groups_of(q.shape[-1], group))
        if value.dim() != 2 or tuple(scales.shape) != tuple(wanted):
            raise QuantizationError(
                f"{name}{SCALE_SUFFIX} has shape {tuple(scales.shape)}, which does not fit {name} of shape "
                f"{tuple(q.shape)}; quantize the model again"
            )
        state[name] = dequantize(q, scales) if kind == "int8" else int4.dequantize_groups(q, scales, group)
    return state


def stored_bytes(shapes: Mapping[str, tuple[int, ...]], storage: Storage = INT8) -> int:
    """Bytes of tensors of these shapes as `quantize_state` makes them, before they are packed; without the file's header."""
    total = 0
    for name, shape in shapes.items():
        width = storage.width(name, len(shape))
        if width == "float32":
            total += 4 * math.prod(shape)
        elif width == "int8":
            total += math.prod(shape) + 4 * shape[0]
        else:
            total += shape[0] * (-(-shape[1] // 2) + 2 * int4.groups_of(shape[1], storage.group))
    return total
