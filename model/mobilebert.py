"""MobileBERT, and its inverted-bottleneck teacher, in one file (Sun et al., ACL 2020, section 3).

State-dict names are those of `google/mobilebert-uncased`, so that checkpoint loads without renaming. Shapes below:
B examples, T tokens, N heads, H head size, D = hidden_size (between blocks), I = intra_bottleneck_size (inside one).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketfed.model.config import MobileBertConfig

SOFT_MASK_SCORE = -6.0  # google-research/mobilebert: finite, so that 8-bit activations keep their range


class NoNorm(nn.Module):
    """y = gamma * x + beta: the operational optimisation that replaces LayerNorm (Sun et al. 2020, eq. 2)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


def make_norm(config: MobileBertConfig, size: int, eps: float | None = None) -> nn.Module:
    if config.normalization_type == "no_norm":
        return NoNorm(size)
    return nn.LayerNorm(size, eps=config.layer_norm_eps if eps is None else eps)


def activate(config: MobileBertConfig, x: Tensor) -> Tensor:
    if config.hidden_act == "relu":
        return F.relu(x)
    if config.hidden_act == "relu6":
        return F.relu6(x)
    return F.gelu(x, approximate="tanh" if config.hidden_act == "gelu_tanh" else "none")


class Embeddings(nn.Module):
    """Token, trigram, position and type embeddings: a narrow table widened by a kernel-3 convolution (section 3.3)."""

    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embedding_size * (3 if config.trigram_input else 1)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.embedding_transformation = nn.Linear(width, config.hidden_size) if config.widens_embeddings else None
        self.LayerNorm = make_norm(config, config.hidden_size, eps=1e-5 if config.use_bottleneck else None)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"a sequence of {input_ids.shape[1]} tokens is longer than the model's "
                f"{self.config.max_position_embeddings} positions; cut it"
            )
        x = self.word_embeddings(input_ids)  # (B, T, E)
        if self.config.isolate_padding:
            # Else the last real token's trigram sees [PAD]'s embedding, and an example's output depends on its batch.
            x = x * attention_mask.unsqueeze(-1).to(x.dtype)
        if self.config.trigram_input:
            after = F.pad(x, (0, 0, -1, 1))  # (B, T, E): the next token, zero at the end
            before = F.pad(x, (0, 0, 1, -1))
            x = torch.cat([after, x, before], dim=2)  # (B, T, 3E)
        if self.embedding_transformation is not None:
            x = self.embedding_transformation(x)  # (B, T, D)
        x = x + self.position_embeddings.weight[: input_ids.shape[1]]
        types = self.token_type_embeddings.weight
        x = x + (types[0] if token_type_ids is None else F.embedding(token_type_ids, types))
        x = self.LayerNorm(x)
        return F.dropout(x, self.config.hidden_dropout_prob, self.training)


class SelfAttention(nn.Module):
    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Linear(config.query_key_size, config.intra_bottleneck_size)
        self.key = nn.Linear(config.query_key_size, config.intra_bottleneck_size)
        self.value = nn.Linear(config.value_size, config.intra_bottleneck_size)

    def split(self, x: Tensor) -> Tensor:
        n = self.config.num_attention_heads
        return x.view(x.shape[0], x.shape[1], n, x.shape[2] // n).transpose(1, 2)  # (B, T, I) -> (B, N, T, H)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """mask: (B, 1, 1, T) of 1 and 0. Returns (B, T, I) and the masked scores before the softmax (B, N, T, T)."""
        q, k, v = self.split(self.query(query)), self.split(self.key(key)), self.split(self.value(value))
        q = q * (1.0 / math.sqrt(q.shape[-1]))  # here, where it is T / H times smaller than the scores
        scores = q @ k.transpose(-1, -2)  # (B, N, T, T)
        if self.config.mask_style == "soft":
            scores = scores * mask + (1.0 - mask) * SOFT_MASK_SCORE
        else:
            scores = scores + (1.0 - mask) * torch.finfo(scores.dtype).min
        probabilities = F.dropout(scores.softmax(-1), self.config.attention_probs_dropout_prob, self.training)
        context = (probabilities @ v).transpose(1, 2)  # (B, T, N, H)
        return context.reshape(value.shape[0], value.shape[1], self.config.intra_bottleneck_size), scores


class ResidualOutput(nn.Module):
    """Norm(Dropout(Dense(x)) + residual)."""

    def __init__(
        self, config: MobileBertConfig, inputs: int, outputs: int, eps: float | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)
        self.LayerNorm = make_norm(config, outputs, eps)
        self.dropout = dropout

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        h = F.dropout(self.dense(x), self.dropout, self.training)
        return self.LayerNorm(h + residual)  # type: ignore[no-any-return]


def plain_dropout(config: MobileBertConfig) -> float:
    """Inside a block only plain BERT drops anything but attention."""
    return 0.0 if config.use_bottleneck else config.hidden_dropout_prob


class Attention(nn.Module):
    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = ResidualOutput(
            config, config.intra_bottleneck_size, config.intra_bottleneck_size, dropout=plain_dropout(config)
        )


class Intermediate(nn.Module):
    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__()
        self.config = config
        self.dense = nn.Linear(config.intra_bottleneck_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return activate(self.config, self.dense(x))


class FeedForward(nn.Module):
    """One of the stacked feed-forward networks but the last (section 3.2)."""

    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__()
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config, config.intermediate_size, config.intra_bottleneck_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.intermediate(x), x)  # type: ignore[no-any-return]


class BlockOutput(ResidualOutput):
    """The last feed-forward network's output, then the bottleneck that widens back to D (plain BERT has none)."""

    def __init__(self, config: MobileBertConfig) -> None:
        eps = 1e-5 if config.use_bottleneck else None
        super().__init__(config, config.intermediate_size, config.intra_bottleneck_size, eps, plain_dropout(config))
        if config.use_bottleneck:
            self.bottleneck = ResidualOutput(
                config, config.intra_bottleneck_size, config.hidden_size, dropout=config.hidden_dropout_prob
            )


class BottleneckInput(nn.Module):
    """Norm(Dense(x)): D -> I."""

    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intra_bottleneck_size)
        self.LayerNorm = make_norm(config, config.intra_bottleneck_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x))  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__()
        self.input = BottleneckInput(config)
        if config.key_query_shared_bottleneck and not config.use_bottleneck_attention:
            self.attention = BottleneckInput(config)


class Block(nn.Module):
    """One transformer block (section 3.1, figure 1; wiring as in google-research/mobilebert)."""

    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__()
        self.config = config
        if config.use_bottleneck:
            self.bottleneck = Bottleneck(config)
        self.attention = Attention(config)
        self.ffn = nn.ModuleList(FeedForward(config) for _ in range(config.num_feedforward_networks - 1))
        self.intermediate = Intermediate(config)
        self.output = BlockOutput(config)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        narrow = self.bottleneck.input(x) if self.config.use_bottleneck else x  # (B, T, I): also the residual inside
        if self.config.use_bottleneck_attention:
            query = value = narrow
        elif self.config.key_query_shared_bottleneck:
            query, value = self.bottleneck.attention(x), x
        else:
            query = value = x
        context, scores = self.attention.self(query, query, value, mask)
        h = self.attention.output(context, narrow)
        for ffn in self.ffn:
            h = ffn(h)
        h = self.output(self.intermediate(h), h)
        return self.output.bottleneck(h, x) if self.config.use_bottleneck else h, scores


class Encoder(nn.Module):
    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))


class Pooler(nn.Module):
    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)


@dataclass(frozen=True)
class Encoded:
    """last: (B, T, D); hidden: outputs of blocks 1..L, each (B, T, D); scores: masked, each (B, N, T, T)."""

    last: Tensor
    hidden: tuple[Tensor, ...]
    scores: tuple[Tensor, ...]


class MobileBert(nn.Module):
    """Token ids in, one vector a token out.

    Args:
        input_ids, attention_mask, token_type_ids: (B, T) int64, mask 1 on real tokens, T <= max_position_embeddings.
        depth: how many blocks to run (all by default); progressive transfer needs only the lower ones.
    """

    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config) if config.classifier_activation else None
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        """Truncated normal of two sigma, zero biases, as in BERT's own code."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            sigma = self.config.initializer_range
            nn.init.trunc_normal_(module.weight, std=sigma, a=-2 * sigma, b=2 * sigma)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None, depth: int | None = None
    ) -> Encoded:
        return self.encode(self.embeddings(input_ids, attention_mask, token_type_ids), attention_mask, 0, depth)

    def encode(self, x: Tensor, attention_mask: Tensor, start: int = 0, stop: int | None = None) -> Encoded:
        """Blocks start + 1 .. stop on the output (B, T, D) of the ones below (0: of the embeddings)."""
        mask = attention_mask[:, None, None, :].to(x.dtype)  # (B, 1, 1, T)
        hidden: list[Tensor] = []
        scores: list[Tensor] = []
        for block in self.encoder.layer[start:stop]:
            x, score = block(x, mask)
            hidden.append(x)
            scores.append(score)
        return Encoded(x, tuple(hidden), tuple(scores))

    def pool(self, last: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T, D) -> (B, D): what a sentence-level head reads."""
        if self.config.pooling == "mean" or self.pooler is None:
            return self.pool_tokens(last, attention_mask)
        return torch.tanh(self.pooler.dense(last[:, 0]))

    def pool_tokens(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T, any) -> (B, any): the mean over real tokens, or the first token's."""
        if self.config.pooling == "mean":
            weights = attention_mask.unsqueeze(-1).to(x.dtype)
            return (x * weights).sum(1) / weights.sum(1)
        return x[:, 0]


def count_flops(config: MobileBertConfig, tokens: int = 128) -> int:
    """FLOPs of one encoder pass over `tokens` tokens: matrix products only, 2 per multiply-add, as the paper counts."""
    d, i, f = config.hidden_size, config.intra_bottleneck_size, config.intermediate_size
    shared = config.key_query_shared_bottleneck and not config.use_bottleneck_attention
    bottlenecks = d * i * (3 if shared else 2) if config.use_bottleneck else 0  # in, shared by queries and keys, out
    projections = 2 * config.query_key_size * i + config.value_size * i + i * i
    feed_forward = config.num_feedforward_networks * 2 * i * f
    per_token = bottlenecks + projections + feed_forward + 2 * tokens * i  # the last: scores and context
    embedding = config.embedding_size * (3 if config.trigram_input else 1) * d if config.widens_embeddings else 0
    return 2 * tokens * (embedding + config.num_hidden_layers * per_token)


def count_parameters(config: MobileBertConfig) -> int:
    """Parameters of embeddings and encoder, without building them."""
    with torch.device("meta"):
        return sum(p.numel() for p in MobileBert(config).parameters())
