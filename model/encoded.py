"""Examples as rows of tokens with targets, and what a kind of task is to the one who trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocketfed.model.tasks import Example
from pocketfed.model.tokenization import Tokenizer

IGNORED = -100  # the target of a token that is not asked about; cross_entropy's own default
BATCH_OF_TEXTS = 4096  # texts tokenized at once: the tokenizer pads them to one length


@dataclass(frozen=True)
class Encoded:
    """Examples as rows of ids, end to end: row i is ids[starts[i] : starts[i + 1]]. A long passage has several rows.

    targets: (N,) or (N, 2), or with `by_token` one an id. notes: what `score` needs to make sense of the outputs.
    """

    examples: tuple[Example, ...]
    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    targets: NDArray[Any]
    by_token: bool = False
    notes: tuple[Any, ...] = ()
    lengths: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", np.diff(self.starts))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and mask, (B, T) int64, and targets of some rows; T is the longest of them."""
        lengths = self.lengths[rows]
        mask = np.arange(int(lengths.max()))[None, :] < lengths[:, None]  # (B, T)
        places = (self.starts[:-1][rows][:, None] + np.arange(mask.shape[1])[None, :])[mask]
        ids = np.zeros(mask.shape, np.int64)
        ids[mask] = self.ids[places]
        targets = self.targets[rows] if not self.by_token else np.full(mask.shape, IGNORED, np.int64)
        if self.by_token:
            targets[mask] = self.targets[places]
        return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64)), torch.from_numpy(targets)


class Kind(Protocol):
    """One kind of task; `outputs` numbers come out of the head for an example, or for a token."""

    @property
    def kind(self) -> str: ...

    @property
    def outputs(self) -> int: ...

    def encode(self, examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> Encoded: ...

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean over what is asked about; logits float32."""

    def fitted(self, outputs: Sequence[NDArray[np.float32]], encoded: Encoded) -> Kind:
        """With what is chosen on dev rather than learnt, such as a threshold; itself where there is nothing."""

    def score(self, outputs: Sequence[NDArray[np.float32]], encoded: Encoded) -> dict[str, float]:
        """Measures by name, of one output a row: (outputs,), or (T, outputs) for tokens and spans."""


def encode_texts(examples: Sequence[Example], targets: NDArray[Any], tokenizer: Tokenizer, max_length: int) -> Encoded:
    """Each example's text, or pair of texts, as one row."""
    rows: list[NDArray[np.int64]] = []
    for start in range(0, len(examples), BATCH_OF_TEXTS):
        some = examples[start : start + BATCH_OF_TEXTS]
        ids, mask = tokenizer.encode([e.text for e in some], [e.text_pair for e in some], max_length)
        rows += [row[: int(length)] for row, length in zip(ids, mask.sum(1), strict=True)]
    return joined(examples, rows, targets)


def joined(
    examples: Sequence[Example], rows: Sequence[NDArray[np.int64]], targets: NDArray[Any], **more: Any
) -> Encoded:
    """Rows laid end to end."""
    starts = np.cumsum([0, *(len(row) for row in rows)])
    return Encoded(tuple(examples), np.concatenate([*rows, np.zeros(0, np.int64)]), starts, targets, **more)
