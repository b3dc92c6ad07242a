"""A student that computes what a scheme's integers would: to measure it before anything is exported, and to train it so.

Rounding and its straight-through gradient are torch's own `fake_quantize_*` operators. What is here is where MobileBERT
needs them: products read 8 bits, residual sums stay float32, since NoNorm lets them grow beyond what 8 bits tell apart.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketfed.model.heads import TextClassifier
from pocketfed.model.lean import int8_linear
from pocketfed.model.mobilebert import SOFT_MASK_SCORE, MobileBert, NoNorm, SelfAttention
from pocketfed.model.quantization import LEVELS, channel_scales, is_kept
from pocketfed.model.schemes import Range, Scheme

STEPS = 255  # of an activation: 8 bits, asymmetric, so that what a ReLU gives uses all of them
SCORE_CLIP = (SOFT_MASK_SCORE, 60.0)  # google-research/mobilebert clips scores so before it trains with rounding
AVERAGING = 0.98  # of the ranges while training; Google's 0.999 is for ten times the steps of a fine-tuning here


class Site(nn.Module):
    """A place where activations become 8 bits: watches their range, or rounds to the one it has.

    Watching keeps the least, the greatest and up to SAMPLES values; rounding in training mode lets the range follow.
    """

    SAMPLES, FROM_A_BATCH = 1 << 15, 1 << 12
    low: Tensor
    high: Tensor

    def __init__(self, fixed: Range | None = None) -> None:
        super().__init__()
        self.fixed, self.watching, self.seen = fixed is not None, False, list[Tensor]()
        low, high = fixed or (0.0, 0.0)
        self.register_buffer("low", torch.tensor(low))
        self.register_buffer("high", torch.tensor(high))

    def forward(self, x: Tensor) -> Tensor:
        if self.watching:
            self._watch(x.detach())
            return x
        if self.training and not self.fixed:
            self._follow(x.detach())
        step = ((self.high - self.low) / STEPS).clamp_min(1e-30)
        zero = torch.round(-self.low / step).clamp(0, STEPS).to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(x, step, zero, 0, STEPS)

    def _watch(self, x: Tensor) -> None:
        self.low, self.high = torch.minimum(self.low, x.min()), torch.maximum(self.high, x.max())
        if sum(len(some) for some in self.seen) < self.SAMPLES:
            flat = x.flatten()
            self.seen.append(flat[:: max(1, len(flat) // self.FROM_A_BATCH)].clone())

    def _follow(self, x: Tensor) -> None:
        """An average of each batch's extremes (Jacob et al. 2018, section 3.1)."""
        low, high = x.min().clamp_max(0.0), x.max().clamp_min(0.0)
        self.low, self.high = torch.lerp(low, self.low, AVERAGING), torch.lerp(high, self.high, AVERAGING)


class RoundedLinear(nn.Module):
    """A linear layer that reads 8 bits of a fixed range; `learnt`: its weight is rounded on the way, for training."""

    def __init__(self, linear: nn.Linear, learnt: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.learnt = linear.weight, linear.bias, learnt
        self.input = Site()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.input(x), round_rows(self.weight) if self.learnt else self.weight, self.bias)


class DynamicLinear(nn.Module):
    """A linear layer that reads 8 bits with one scale a token, as `lean.Int8Linear` does; its gradient passes the rounding."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight) + self.bias  # type: ignore[no-any-return]


class RoundedNorm(NoNorm):
    """NoNorm whose gain and bias are in 8 bits, one scale each."""

    def __init__(self, norm: NoNorm) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return x * round_rows(self.weight[None])[0] + round_rows(self.bias[None])[0]


class RoundedAttention(SelfAttention):
    """Attention whose two products read 8 bits on both sides, and whose scores are 8 bits before the softmax."""

    def __init__(self, attention: SelfAttention, clip: Range | None) -> None:
        nn.Module.__init__(self)
        self.config, self.clip = attention.config, clip
        self.query, self.key, self.value = attention.query, attention.key, attention.value
        self.q, self.k, self.v, self.scores = Site(), Site(), Site(), Site()
        self.probabilities = Site((0.0, 1.0))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.split(self.query(query)), self.split(self.key(key)), self.split(self.value(value))
        q = self.q(q * (1.0 / math.sqrt(q.shape[-1])))
        scores = q @ self.k(k).transpose(-1, -2)  # (B, N, T, T)
        # Rounded before the mask: a hard mask's scores would take the whole range.
        scores = self.scores(scores.clamp(*self.clip) if self.clip else scores)
        if self.config.mask_style == "soft":
            scores = scores * mask + (1.0 - mask) * SOFT_MASK_SCORE
        else:
            scores = scores + (1.0 - mask) * torch.finfo(scores.dtype).min
        dropped = F.dropout(scores.softmax(-1), self.config.attention_probs_dropout_prob, self.training)
        context = (self.probabilities(dropped) @ self.v(v)).transpose(1, 2)  # (B, T, N, H)
        return context.reshape(value.shape[0], value.shape[1], self.config.intra_bottleneck_size), scores


def round_rows(weight: Tensor) -> Tensor:
    """(out, in) rounded to int8 with one scale a row and back, exactly as stored; the gradient passes as if it were not."""
    scales = channel_scales(weight.detach().to(torch.float64))
    zeros = torch.zeros(len(scales), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -LEVELS, LEVELS)


def as_scheme(
    model: TextClassifier, scheme: Scheme, keep: tuple[str, ...] = (), ranges: Mapping[str, Range] | None = None
) -> TextClassifier:
    """A copy whose products round what they read as the scheme does; its weights are rounded only where it is `learnt`.

    Args:
        keep: layers that read float32, as in `Storage`; so does the head.
        ranges: where they are known already (`ranges_of`); without them the sites have to watch first.
    """
    model = copy.deepcopy(model)
    if scheme.activations == "float32":
        return model
    for path, module in reversed(list(model.mobilebert.named_modules())):  # an attention after its linear layers
        for name, child in module.named_children():
            where = f"{path}.{name}" if path else name
            made = _rounded(child, where, scheme, keep)
            if made is not None:
                setattr(module, name, made)
    for name, low_high in (ranges or {}).items():
        site = model.mobilebert.get_submodule(name)
        assert isinstance(site, Site)
        site.low, site.high = torch.tensor(low_high[0]), torch.tensor(low_high[1])
    return model


def _rounded(child: nn.Module, where: str, scheme: Scheme, keep: tuple[str, ...]) -> nn.Module | None:
    if is_kept(where, keep):
        return None
    if type(child) is nn.Linear:
        return DynamicLinear(child) if scheme.activations == "dynamic" else RoundedLinear(child, scheme.learnt)
    if scheme.activations == "static" and type(child) is SelfAttention:
        return RoundedAttention(child, SCORE_CLIP if scheme.learnt else None)
    if scheme.learnt and type(child) is NoNorm:
        return RoundedNorm(child)
    return None


def sites(model: MobileBert) -> Iterator[tuple[str, Site]]:
    """Where activations are rounded to a range that is not fixed, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Site) and not module.fixed)
