"""Trainable sets: which parameters a device trains, and what must be added to the model for that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketfed.model.heads import Ladder, TextClassifier
from pocketfed.model.mobilebert import Attention, Block
from pocketfed.model.parameters import Parameter, Vector, lay_out

TRAINABLE_SETS = (
    "head, norms[@BLOCKS], bias[@BLOCKS], lora:RANK[:TARGETS][@BLOCKS], last:BLOCKS, ladder[:WIDTH], full "
    "(TARGETS: some of qkvo; @BLOCKS: in the last so many blocks only)"
)
LORA_ALPHA = 16.0  # Hu et al. 2022: the update is alpha / rank * B A
LADDER_WIDTH = 24
LADDER_RUNGS = 4
# kind -> least and most options after it, and whether @BLOCKS may follow
_FORMS = {
    "head": (0, 0, False),
    "norms": (0, 0, True),
    "bias": (0, 0, True),
    "lora": (1, 2, True),
    "last": (1, 1, False),
    "ladder": (0, 1, False),
    "full": (0, 0, False),
}


class TrainableSetError(ValueError):
    """A trainable set that does not exist or does not fit the model."""


@dataclass(frozen=True)
class TrainableSet:
    """A name, taken apart. number: LoRA's rank, the blocks of `last`, the ladder's width; blocks: 0 for all."""

    kind: str
    number: int = 0
    targets: str = ""
    blocks: int = 0


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


def parse_set(name: str) -> TrainableSet:
    """
    >>> parse_set("lora:8:qv@6")
    TrainableSet(kind='lora', number=8, targets='qv', blocks=6)

    Raises:
        TrainableSetError: not one of TRAINABLE_SETS.
    """
    left, at, scope = name.partition("@")
    kind, *options = left.split(":")
    least, most, scoped = _FORMS.get(kind, (0, -1, False))
    numbers = [*options[:1], *([scope] if at else [])]
    targets = options[1] if len(options) > 1 else "qkvo"
    known = bool(targets) and set(targets) <= set("qkvo") and len(set(targets)) == len(targets)
    whole = all(n.isascii() and n.isdigit() and 0 < int(n) < 1_000_000 for n in numbers)
    if not (least <= len(options) <= most and (scoped or not at) and known and whole):
        raise TrainableSetError(f"there is no trainable set {name!r}; choose one of {TRAINABLE_SETS}")
    number = int(options[0]) if options else LADDER_WIDTH if kind == "ladder" else 0
    return TrainableSet(kind, number, targets if kind == "lora" else "", int(scope) if at else 0)


def select(model: TextClassifier, name: str, seed: int = 0) -> TextClassifier:
    """Mark the parameters of a trainable set with requires_grad, adding what the set adds (LoRA, a ladder). In place.

    The head is in every set: its labels are the task.

    Raises:
        TrainableSetError: unknown set, or more blocks or rank than the model has.
    """
    chosen = parse_set(name)
    layers = model.mobilebert.encoder.layer
    for asked in (chosen.blocks, chosen.number if chosen.kind == "last" else 0):
        if asked > len(layers):
            raise TrainableSetError(f"{name!r} asks for {asked} blocks; the model has {len(layers)}")
    if chosen.kind == "lora" and chosen.number > model.config.intra_bottleneck_size:
        raise TrainableSetError(
            f"rank {chosen.number} of {name!r} exceeds the width {model.config.intra_bottleneck_size}"
        )
    lowest = len(layers) - (chosen.number if chosen.kind == "last" else chosen.blocks or len(layers))
    generator = torch.Generator().manual_seed(seed)
    if chosen.kind == "lora":
        for block in layers[lowest:]:
            _add_lora(block, chosen.number, chosen.targets, generator)  # type: ignore[arg-type]
    if chosen.kind == "ladder":
        labels = model.classifier.out_features
        model.ladder = Ladder(model.config, labels, LADDER_RUNGS, chosen.number, generator)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_trained(chosen, parameter_name, lowest))
    model.depth = _frozen_blocks(model)
    return model


def _is_trained(chosen: TrainableSet, name: str, lowest: int) -> bool:
    """`lowest`: index of the first block that the set may touch."""
    if chosen.kind == "full" or name.startswith(("classifier.", "ladder.")):
        return True
    _, in_block, rest = name.partition("encoder.layer.")
    if in_block:
        if int(rest.split(".", 1)[0]) < lowest:
            return False
    elif chosen.blocks or chosen.kind == "last":
        return False
    return (
        chosen.kind == "last"
        or (chosen.kind == "norms" and ".LayerNorm." in name)
        or (chosen.kind == "bias" and name.endswith(".bias"))
        or (chosen.kind == "lora" and ".lora_" in name)
    )


def _frozen_blocks(model: TextClassifier) -> int:
    """How many of the lowest blocks lie below every trainable parameter; 0 where the embeddings are trained."""
    if any(p.requires_grad for p in model.mobilebert.embeddings.parameters()):
        return 0
    layers = model.mobilebert.encoder.layer
    trained = [i for i, block in enumerate(layers) if any(p.requires_grad for p in block.parameters())]
    pooler = model.mobilebert.pooler
    if not trained and pooler is not None and any(p.requires_grad for p in pooler.parameters()):
        return len(layers) - 1  # the prefix of all blocks would pool
    return trained[0] if trained else len(layers)


def _add_lora(block: Block, rank: int, targets: str, generator: torch.Generator) -> None:
    attention: Attention = block.attention
    for target, name in (("q", "query"), ("k", "key"), ("v", "value")):
        if target in targets:
            setattr(attention.self, name, LoraLinear(getattr(attention.self, name), rank, generator))
    if "o" in targets:
        attention.output.dense = LoraLinear(attention.output.dense, rank, generator)  # type: ignore[assignment]


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
