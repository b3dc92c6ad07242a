"""The student for prediction only: the reference model, transformed step by step into fewer and larger products.

    lean                 norms into the products before them (`model.lean`)
    fold_embeddings      the embeddings' norm into their product and tables
    Stacked              products that read the same values become one; the scores' scale goes into the queries
    carry_gains          what a norm does to a residual goes into the products that read it: only x + W y is left
    first token only     a head that reads [CLS] needs the last block for that token alone

Each step leaves what the model computes as it was, up to float32's rounding; tests/test_fusing.py holds them to it one by one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketfed.model.config import MobileBertConfig
from pocketfed.model.heads import TextClassifier, segment_ids
from pocketfed.model.lean import FoldedOutput, lean
from pocketfed.model.mobilebert import (
    SOFT_MASK_SCORE,
    Block,
    Embeddings,
    MobileBert,
    NoNorm,
    ResidualOutput,
    activate,
)

SMALLEST_GAIN, LARGEST_GAIN = 2.0**-12, 2.0**12  # beyond, a gain stays where it is: dividing by it would lose digits

Scale = tuple[Tensor, Tensor]  # float64 (s, c): the value meant is s * x + c, a number a channel


class FusingError(ValueError):
    """A model that is more than a student and its head."""


def fuse(model: TextClassifier, carry: bool = True, first_only: bool = True) -> FusedStudent:
    """A frozen copy for prediction: (B, T) ids and mask -> logits.

    Args:
        carry: take the gains of residuals along. first_only: spare a [CLS] head all other tokens of the last block.

    Raises:
        FusingError: trained parts (LoRA, a ladder) that are not merged into the student.
    """
    added = next((type(m).__name__ for m in model.modules() if type(m).__name__ in ("LoraLinear", "Ladder")), None)
    if added:
        raise FusingError(f"the model has a {added}, which is no part of a student; export the student alone")
    folded = lean(copy.deepcopy(model).eval().requires_grad_(False))
    fold_embeddings(folded.mobilebert.embeddings)
    student = FusedStudent(folded, first_only)
    if carry:
        carry_gains(student)
    return student


# ---- embeddings ------------------------------------------------------------------------------------------------------


def fold_embeddings(embeddings: Embeddings) -> None:
    """gamma (W x + b + position + type) + beta, with gamma in all four and beta in the positions. In place."""
    norm, widening = embeddings.LayerNorm, embeddings.embedding_transformation
    if not isinstance(norm, NoNorm):
        return
    with torch.no_grad():
        gamma = norm.weight.double()
        if widening is None:
            embeddings.word_embeddings.weight.mul_(norm.weight)
        else:
            widening.weight.copy_(gamma.unsqueeze(1) * widening.weight.double())
            widening.bias.copy_(gamma * widening.bias.double())
        for table, shift in (
            (embeddings.position_embeddings.weight, norm.bias.double()),
            (embeddings.token_type_embeddings.weight, torch.zeros_like(gamma)),
        ):
            table.copy_(gamma * table.double() + shift)
    embeddings.LayerNorm = nn.Identity()


# ---- blocks ----------------------------------------------------------------------------------------------------------


class Stacked(nn.Module):
    """Linear layers that read the same values, as one product."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [linear.out_features for linear in linears]
        self.linear = nn.Linear(linears[0].in_features, sum(self.sizes)).requires_grad_(False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.cat([linear.weight for linear in linears]))
            self.linear.bias.copy_(torch.cat([linear.bias for linear in linears]))

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.linear(x)
        return [y] if len(self.sizes) == 1 else list(y.split(self.sizes, dim=-1))


class Residual(nn.Module):
    """gain * residual + W x + b, or Norm(residual + W x + b). Without gain and bias: residual + W x."""

    def __init__(self, output: nn.Module) -> None:
        super().__init__()
        assert isinstance(output, FoldedOutput | ResidualOutput)  # what `lean` leaves
        self.dense = output.dense
        self.norm = nn.Identity() if isinstance(output, FoldedOutput) else output.LayerNorm
        self.register_buffer("gain", output.gain.detach() if isinstance(output, FoldedOutput) else None)
        self.gain: Tensor | None

    @property
    def carries(self) -> bool:
        """Whether its norm is a gain, which may be moved."""
        return self.gain is not None

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.norm(self.dense(x) + (residual if self.gain is None else residual * self.gain))  # type: ignore[no-any-return]


class FusedBlock(nn.Module):
    """One block: a product of all that read x, one of all that read the bottleneck, attention, the stacked networks.

    names: what the first product gives, some of narrow, shared, query, key, value. `inner` gives the rest from what it reads.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        config, attention = block.config, block.attention.self
        self.config = config
        narrows = config.use_bottleneck
        shares = narrows and config.key_query_shared_bottleneck and not config.use_bottleneck_attention
        scale = 1.0 / math.sqrt(config.intra_bottleneck_size // config.num_attention_heads)
        outer = {"narrow": block.bottleneck.input.dense} if narrows else {}
        outer |= {"shared": block.bottleneck.attention.dense} if shares else {}
        products = {"query": _scaled(attention.query, scale), "key": attention.key, "value": attention.value}
        self.inner_reads = "narrow" if config.use_bottleneck_attention else "shared" if shares else ""
        within = {"narrow": ("query", "key", "value"), "shared": ("query", "key"), "": ()}[self.inner_reads]
        outer |= {name: linear for name, linear in products.items() if name not in within}
        self.outer_names, self.inner_names = tuple(outer), within
        self.outer = Stacked(list(outer.values()))
        self.inner = Stacked([products[name] for name in within]) if within else None
        self.norms = nn.ModuleDict(
            {name: getattr(block.bottleneck, part).LayerNorm for name, part in _NORMS.items() if name in outer}
        )
        self.attended = Residual(block.attention.output)
        networks: list[tuple[Any, Any]] = [(f.intermediate.dense, f.output) for f in list[Any](block.ffn)]
        networks.append((block.intermediate.dense, block.output))
        self.widen = nn.ModuleList(widen for widen, _ in networks)
        self.narrow = nn.ModuleList(Residual(output) for _, output in networks)
        self.widened = Residual(block.output.bottleneck) if narrows else None

    def forward(self, x: Tensor, mask: tuple[Tensor, ...], first_only: bool = False) -> Tensor:
        """mask: see `_masks`. first_only: the result is (B, 1, D)."""
        parts = dict(zip(self.outer_names, self.outer(x), strict=True))
        for name, norm in self.norms.items():
            parts[name] = norm(parts[name])
        if self.inner is not None:
            parts |= zip(self.inner_names, self.inner(parts[self.inner_reads]), strict=True)
        if first_only:
            x = x[:, :1]
            parts |= {name: parts[name][:, :1] for name in ("narrow", "query") if name in parts}
        context = self._attend(parts["query"], parts["key"], parts["value"], mask)
        if first_only:  # a batched product would be made of values with strides like these
            context = context.clone(memory_format=torch.contiguous_format)
        h = self.attended(context, parts.get("narrow", x))
        for widen, narrow in zip(self.widen, self.narrow, strict=True):
            h = narrow(activate(self.config, widen(h)), h)
        return h if self.widened is None else self.widened(h, x)  # type: ignore[no-any-return]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: tuple[Tensor, ...]) -> Tensor:
        q, k, v = (self._split(t) for t in (query, key, value))
        scores = q @ k.transpose(-1, -2)  # (B, N, T or 1, T); their scale is in the query's weights
        scores = scores + mask[0] if len(mask) == 1 else scores * mask[0] + mask[1]
        context = (scores.softmax(-1) @ v).transpose(1, 2)  # (B, T or 1, N, H)
        return context.reshape(context.shape[0], context.shape[1], self.config.intra_bottleneck_size)

    def _split(self, x: Tensor) -> Tensor:
        n = self.config.num_attention_heads
        return x.reshape(x.shape[0], x.shape[1], n, x.shape[2] // n).transpose(1, 2)  # (B, T, I) -> (B, N, T, H)


_NORMS = {"narrow": "input", "shared": "attention"}


def _scaled(linear: nn.Linear, factor: float) -> nn.Linear:
    scaled = copy.deepcopy(linear)
    with torch.no_grad():
        scaled.weight.copy_(linear.weight.double() * factor)
        scaled.bias.copy_(linear.bias.double() * factor)
    return scaled


def _masks(config: MobileBertConfig, attention_mask: Tensor) -> tuple[Tensor, ...]:
    """(B, T) of 1 and 0 -> what scores are added to, or first multiplied by: (B, 1, 1, T) each."""
    mask = attention_mask[:, None, None, :].to(torch.float32)
    if config.mask_style == "soft":
        return mask, (1.0 - mask) * SOFT_MASK_SCORE
    return ((1.0 - mask) * torch.finfo(torch.float32).min,)


class FusedStudent(nn.Module):
    """(B, T) int64 ids and mask -> logits, as `TextClassifier` gives them."""

    def __init__(self, model: TextClassifier, first_only: bool) -> None:
        super().__init__()
        self.config, self.task, self.separator = model.config, model.task, model.separator
        self.embeddings = model.mobilebert.embeddings
        self.blocks = nn.ModuleList(FusedBlock(block) for block in model.mobilebert.encoder.layer)  # type: ignore[arg-type]
        self.first_only = first_only and model.pools and self.config.pooling == "cls"
        self.register_buffer("gain", None)
        self.register_buffer("shift", None)
        self.gain: Tensor | None
        self.shift: Tensor | None
        self.pooler, self.classifier, self.pools = model.mobilebert.pooler, model.classifier, model.pools

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        types = segment_ids(input_ids, attention_mask, self.separator)
        x = self.embeddings(input_ids, attention_mask, types)
        masks = _masks(self.config, attention_mask)
        for i, block in enumerate(self.blocks):
            x = block(x, masks, self.first_only and i == len(self.blocks) - 1)
        if self.gain is not None:
            x = x * self.gain + self.shift
        if self.pools:
            x = MobileBert.pool(self, x, attention_mask)  # type: ignore[arg-type] # it reads config and pooler alone
            x = F.layer_norm(x, (self.config.hidden_size,)) if self.config.head_norm else x
        return self.classifier(x)  # type: ignore[no-any-return]

    pool_tokens = MobileBert.pool_tokens


# ---- gains of residuals ----------------------------------------------------------------------------------------------


def carry_gains(student: FusedStudent) -> None:
    """Between blocks and inside one, keep x' with x = s x' + c, where s and c are numbers a channel. In place.

    gamma (x + W y) + b is then s' (x' + (W / s') y) + c' with s' = gamma s: nothing is left but a sum, which a product can
    start from. What reads x reads W s and b + W c instead.
    """
    if not student.blocks or not all(block.widened is not None for block in student.blocks):
        return  # plain BERT has LayerNorm, which says itself how large a value is
    size = student.config.hidden_size
    outer = _identity(size)
    for block in student.blocks:
        assert isinstance(block, FusedBlock)
        assert block.widened is not None
        _read(block.outer.linear, outer)
        inner = _add(block.attended, _identity(student.config.intra_bottleneck_size), None)
        for widen, narrow in zip(block.widen, block.narrow, strict=True):
            _read(widen, inner)  # type: ignore[arg-type]
            inner = _add(narrow, inner, None)  # type: ignore[arg-type]
        outer = _add(block.widened, outer, inner)
    student.gain, student.shift = outer[0].float(), outer[1].float()


def _identity(size: int) -> Scale:
    return torch.ones(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)


def _read(linear: nn.Linear, scale: Scale) -> None:
    """W (s x + c) + b = (W s) x + (b + W c)."""
    with torch.no_grad():
        weight = linear.weight.double()
        linear.bias.copy_(linear.bias.double() + weight @ scale[1])
        linear.weight.copy_(weight * scale[0])


def _add(output: Residual, residual: Scale, inner: Scale | None) -> Scale:
    """How its result is kept, once it has been made a plain sum where that loses nothing. inner: how its input is."""
    if inner is not None:
        _read(output.dense, inner)
    size = output.dense.out_features
    if output.gain is None:  # LayerNorm reads the residual as it is
        return _identity(size)
    gain, bias = output.gain.double(), output.dense.bias.double()
    kept = gain * residual[0], gain * residual[1] + bias
    sizes = kept[0].abs()
    with torch.no_grad():
        if bool(((sizes >= SMALLEST_GAIN) & (sizes <= LARGEST_GAIN)).all()):
            output.dense.weight.copy_(output.dense.weight.double() / kept[0].unsqueeze(1))
            output.dense.bias = None  # type: ignore[assignment] # a product without one
            output.gain = None
            return kept
        output.gain = kept[0].float()
        output.dense.bias.copy_(kept[1])
    return _identity(size)
