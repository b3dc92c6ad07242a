"""Int4 weights: symmetric, one scale a group of a row's neighbours, two values a byte."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 7  # -8 is never a value: as a nibble it marks the end of a row with an odd number of them
END = -8
SMALLEST = 2.0**-100  # a group below it is stored as zeros: its scale would be one of float32's denormals
# A group's range may be cut to one of these shares, whichever leaves the least squared error: one large weight then costs the
# others fewer steps. 1 comes first and wins a tie, so quantizing dequantized values again finds the range it had.
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


def quantize_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(out, in) float -> int8 (out, in) of -7 .. 7 and bfloat16 scales (out, groups): w is about q * scale.

    A scale has 8 significant bits and a value 3, so q * scale is exact in float32. Halves round to even.

    >>> quantize_groups(torch.tensor([[7.0, -3.0, 0.0, 14.0, 4.0]]), 3)
    (tensor([[ 7, -3,  0,  7,  2]], dtype=torch.int8), tensor([[1., 2.]], dtype=torch.bfloat16))
    """
    w = _grouped(weight.detach().to(torch.float32), group)  # (out, groups, group)
    largest = w.abs().amax(dim=2)
    largest = torch.where(largest < SMALLEST, 0.0, largest)
    best = torch.full_like(largest, torch.inf, dtype=torch.float64)
    chosen = torch.ones_like(largest, dtype=torch.bfloat16)
    values = torch.zeros_like(w, dtype=torch.int8)
    for share in SHARES:
        scales = (largest * (share / LEVELS)).to(torch.bfloat16)
        scales = torch.where(largest > 0, scales, 1.0).to(torch.bfloat16)
        steps = scales.to(torch.float32).unsqueeze(2)
        q = torch.round(w / steps).clamp_(-LEVELS, LEVELS)
        error = (q * steps - w).to(torch.float64).square().sum(dim=2)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, scales, chosen)
        values = torch.where(better.unsqueeze(2), q.to(torch.int8), values)
    return values.flatten(1)[:, : weight.shape[1]].contiguous(), chosen


def dequantize_groups(q: Tensor, scales: Tensor, group: int) -> Tensor:
    """int8 (out, in) and (out, groups) -> float32 (out, in)."""
    wide = _grouped(q.to(torch.float32), group) * scales.to(torch.float32).unsqueeze(2)
    return wide.flatten(1)[:, : q.shape[1]].contiguous()


def pack(q: Tensor) -> Tensor:
    """(out, in) of -7 .. 7 -> uint8 (out, ceil(in / 2)), the first of two in the low half.

    >>> pack(torch.tensor([[1, -1, 7]], dtype=torch.int8))
    tensor([[241, 135]], dtype=torch.uint8)
    """
    even = F.pad(q, (0, q.shape[1] % 2), value=END).to(torch.int16) & 0xF
    return (even[:, 0::2] | even[:, 1::2] << 4).to(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`: int8 (out, in).

    Raises:
        ValueError: a value that `pack` does not write.
    """
    wide = packed.to(torch.int16)
    q = torch.stack((wide & 0xF, wide >> 4), dim=2).flatten(1)  # (out, 2 * bytes), 0 .. 15
    q = torch.where(q > LEVELS, q - 16, q).to(torch.int8)
    if q.numel() and bool((q[:, -1] == END).all()):
        q = q[:, :-1]
    if bool((q == END).any()):
        raise ValueError(f"it holds the value {END}, which four-bit weights do not use")
    return q.contiguous()


def groups_of(columns: int, group: int) -> int:
    """
    >>> groups_of(100, 64)
    2
    """
    return -(-columns // group)


def _grouped(values: Tensor, group: int) -> Tensor:
    """(out, in) -> (out, groups, group), zeros after the last column."""
    groups = groups_of(values.shape[1], group)
    grouped: Tensor = F.pad(values, (0, groups * group - values.shape[1])).unflatten(1, (groups, group))
    return grouped
