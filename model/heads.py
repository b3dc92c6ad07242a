"""What sits on the student for a task, and where the student may be cut in two."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketfed.model.config import MobileBertConfig
from pocketfed.model.mobilebert import MobileBert

TASKS = ("classification", "regression", "tokens", "spans")


def segment_ids(input_ids: Tensor, attention_mask: Tensor, separator: int) -> Tensor:
    """Token types of `[CLS] a [SEP] b [SEP]`, read off the separators: 0 up to the first, 1 after it. (B, T) -> (B, T).

    Derived, so that a plan needs no third input and text pairs work on every device.
    """
    is_separator = (input_ids == separator).to(torch.int64)
    closed = torch.cumsum(is_separator, 1) - is_separator  # separators strictly before each token
    return (closed > 0).to(torch.int64) * attention_mask


class Ladder(nn.Module):
    """A thin side network over hidden states of the frozen student: training it needs no backward pass through the student.

    Ladder side-tuning (Sung et al. 2022), with position-wise rungs: s <- s + W_i LN(h_i); s <- s + FFN_i(s).

    Args:
        rungs: how many blocks' outputs are read, evenly spaced, the last block's among them.
        width: of the side network.
    """

    def __init__(
        self, config: MobileBertConfig, labels: int, rungs: int, width: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        layers = config.num_hidden_layers
        self.blocks = tuple(sorted({layers - (layers * i) // rungs for i in range(rungs)}))  # 1-based
        self.down = nn.ModuleList(nn.Linear(config.hidden_size, width) for _ in self.blocks)
        self.widen = nn.ModuleList(nn.Linear(width, 2 * width) for _ in self.blocks)
        self.narrow = nn.ModuleList(nn.Linear(2 * width, width) for _ in self.blocks)
        self.classifier = nn.Linear(width, labels, bias=False)
        with torch.no_grad():
            for linear in (*self.down, *self.widen, *self.narrow):
                bound = linear.in_features**-0.5
                linear.weight.uniform_(-bound, bound, generator=generator)
                linear.bias.zero_()
            self.classifier.weight.zero_()  # training starts from the student as it is

    def forward(self, taps: Sequence[Tensor]) -> Tensor:
        """A tap (B, T, D) a rung, normalised, to the side state (B, T, width)."""
        state = self.down[0](taps[0])
        for i, tap in enumerate(taps):
            if i:
                state = state + self.down[i](tap)
            state = state + self.narrow[i](F.relu(self.widen[i](state)))
        return state  # type: ignore[no-any-return]


class TextClassifier(nn.Module):
    """The student with a head. State-dict names as in Hugging Face's sequence and token classifiers.

    Computed in two parts: `prefix`, below the lowest trainable parameter, whose result a device may keep, and `suffix`.

    Args:
        num_labels: outputs an example (classification, regression) or a token (tokens; 2 for spans: start and end).
        separator: id of `[SEP]`.
        task: one of TASKS.
    """

    def __init__(self, config: MobileBertConfig, num_labels: int, separator: int, task: str = "classification") -> None:
        super().__init__()
        if task not in TASKS:
            raise ValueError(f"there is no task {task!r}; choose one of {', '.join(TASKS)}")
        self.config = config
        self.separator = separator
        self.task = task
        self.depth = 0  # blocks in the prefix; 0: the prefix is the embeddings, and there is no point in keeping it
        self.mobilebert = MobileBert(config)
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        self.ladder: Ladder | None = None
        nn.init.trunc_normal_(self.classifier.weight, std=config.initializer_range)
        nn.init.zeros_(self.classifier.bias)

    @property
    def pools(self) -> bool:
        """Whether the head reads one vector an example, not one a token."""
        return self.task in ("classification", "regression")

    @property
    def keeps_tokens(self) -> bool:
        """Whether the prefix's result has one row a token: a head alone on a sentence needs its pooled vector only."""
        return not (self.pools and self.depth == self.config.num_hidden_layers and self.ladder is None)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) int64 twice -> (B, labels), or (B, T, labels) for tokens and spans."""
        return self.suffix(self.prefix(input_ids, attention_mask), attention_mask)

    def prefix(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Output of the lowest `depth` blocks (B, T, D); pooled (B, D) where no block is above; a ladder's taps (B, T, r D)."""
        types = segment_ids(input_ids, attention_mask, self.separator)
        embedded = self.mobilebert.embeddings(input_ids, attention_mask, types)
        encoded = self.mobilebert.encode(embedded, attention_mask, 0, self.depth)
        if self.ladder is not None:
            taps = [self._normalised(encoded.hidden[i - 1]) for i in self.ladder.blocks[:-1]]
            return torch.cat([*taps, encoded.last], dim=2)
        return encoded.last if self.keeps_tokens else self._features(encoded.last, attention_mask)

    def suffix(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """From what `prefix` gave to the logits."""
        if not self.keeps_tokens:
            return self.classifier(hidden)  # type: ignore[no-any-return]
        if self.ladder is not None:
            *lower, last = hidden.chunk(len(self.ladder.blocks), dim=2)
            state = self.ladder([*lower, self._normalised(last)])
            side = self.mobilebert.pool_tokens(state, attention_mask) if self.pools else state
            features = self._features(last, attention_mask) if self.pools else last
            return self.classifier(features) + self.ladder.classifier(side)  # type: ignore[no-any-return]
        last = self.mobilebert.encode(hidden, attention_mask, self.depth).last
        return self.classifier(self._features(last, attention_mask) if self.pools else last)  # type: ignore[no-any-return]

    def _features(self, last: Tensor, attention_mask: Tensor) -> Tensor:
        pooled = self.mobilebert.pool(last, attention_mask)
        # Parameter-free: NoNorm lets features grow, and a head on raw ones starts saturated.
        return self._normalised(pooled) if self.config.head_norm else pooled

    def _normalised(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.config.hidden_size,))
