"""What each kind of task makes of its examples: rows of tokens with targets, a loss, and a score of what a model says.

A kind is a frozen dataclass with `kind` (of `heads.TASKS`), `outputs`, `encode`, `loss` and `score`; `kind_of` picks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pocketfed.model.metrics import classification_scores, entity_scores, regression_scores, scope_scores
from pocketfed.model.tasks import DataError, Dataset, Example
from pocketfed.model.tokenization import Tokenizer

IGNORED = -100  # the target of a token that is not asked about; cross_entropy's own default
BATCH_OF_TEXTS = 4096  # texts tokenized at once: the tokenizer pads them to one length


@dataclass(frozen=True)
class Encoded:
    """Examples as rows of ids, end to end: row i is ids[starts[i] : starts[i + 1]].

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


@dataclass(frozen=True)
class Classification:
    """One label a text.

    outside: what an out-of-scope text is called. Where it is none of `labels`, a text is called so if no label has a
    probability of `threshold`, which is chosen on dev for accuracy over all (Larson et al. 2019's oos-threshold).
    """

    labels: tuple[str, ...]
    outside: str | None = None
    threshold: float = 0.0
    kind: str = "classification"

    @property
    def outputs(self) -> int:
        return len(self.labels)

    def encode(self, examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> Encoded:
        index = {label: i for i, label in enumerate(self.labels)}
        targets = np.array([index.get(e.label or "", IGNORED) for e in examples], np.int64)
        return encode_texts(examples, targets, tokenizer, max_length)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets)

    def fitted(self, outputs: Sequence[NDArray[np.float32]], encoded: Encoded) -> Kind:
        expected = [e.label for e in encoded.examples]
        if self.outside is None or self.outside in self.labels or self.outside not in expected:
            return self
        sure = [(float(_softmax(row).max()), self.labels[int(row.argmax())]) for row in outputs]
        order = sorted(range(len(sure)), key=lambda i: sure[i][0])
        # From threshold 0 upwards: whatever falls below it turns from its label into outside.
        right = sum(guess == true for (_, guess), true in zip(sure, expected, strict=True))
        best, threshold = right, 0.0
        for place, i in enumerate(order):
            right += (expected[i] == self.outside) - (sure[i][1] == expected[i])
            after = sure[order[place + 1]][0] if place + 1 < len(order) else 1.0
            if right > best and after > sure[i][0]:
                best, threshold = right, (sure[i][0] + after) / 2
        return replace(self, threshold=threshold)

    def score(self, outputs: Sequence[NDArray[np.float32]], encoded: Encoded) -> dict[str, float]:
        guesses = [self._guess(row) for row in outputs]
        expected = [e.label or "" for e in encoded.examples]
        scores = classification_scores(guesses, expected, self.labels)
        return scores | (scope_scores(guesses, expected, self.outside) if self.outside else {})

    def _guess(self, logits: NDArray[np.float32]) -> str:
        if self.threshold and self.outside and float(_softmax(logits).max()) < self.threshold:
            return self.outside
        return self.labels[int(logits.argmax())]


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    powers = np.exp(logits.astype(np.float64) - logits.max())
    probabilities: NDArray[np.float64] = powers / powers.sum()
    return probabilities


@dataclass(frozen=True)
class Regression:
    """One number a text; the head learns it standardised by train's mean and spread."""

    mean: float
    spread: float
    kind: str = "regression"
    outputs: int = 1

    def encode(self, examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> Encoded:
        scores = np.array([e.score for e in examples], np.float32)
        return encode_texts(examples, (scores - self.mean) / self.spread, tokenizer, max_length)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(logits[:, 0], targets)

    def fitted(self, outputs: Sequence[NDArray[np.float32]], encoded: Encoded) -> Kind:
        return self

    def score(self, outputs: Sequence[NDArray[np.float32]], encoded: Encoded) -> dict[str, float]:
        predicted = [float(row[0]) * self.spread + self.mean for row in outputs]
        return regression_scores(predicted, [e.score or 0.0 for e in encoded.examples])


@dataclass(frozen=True)
class Tagging:
    """One tag a word: a word's first piece carries it, the others are not asked about.

    Words cut off by `max_length` count as guessed O, so that a longer row is not an easier one.
    """

    tags: tuple[str, ...]
    kind: str = "tokens"

    @property
    def outputs(self) -> int:
        return len(self.tags)

    def encode(self, examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> Encoded:
        words = sorted({word for e in examples for word in e.words})
        vocabulary = tokenizer.vocabulary
        pieces = dict(zip(words, tokenizer.encode_plain(words), strict=True))
        index = {tag: i for i, tag in enumerate(self.tags)}
        rows, targets, notes = [], [], []
        for example in examples:
            row, wanted, firsts = [vocabulary.cls_id], [IGNORED], []
            for word, tag in zip(example.words, example.tags, strict=True):
                some = pieces[word] or [vocabulary.unk_id]  # every word keeps a place
                if len(row) < max_length - 1:
                    firsts.append(len(row))
                row += some
                wanted += [index.get(tag, IGNORED)] + [IGNORED] * (len(some) - 1)
            row, wanted = row[: max_length - 1], wanted[: max_length - 1]
            rows.append(np.array([*row, vocabulary.sep_id], np.int64))
            targets += [*wanted, IGNORED]
            notes.append(firsts)
        return joined(examples, rows, np.array(targets, np.int64), by_token=True, notes=tuple(notes))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def fitted(self, outputs: Sequence[NDArray[np.float32]], encoded: Encoded) -> Kind:
        return self

    def score(self, outputs: Sequence[NDArray[np.float32]], encoded: Encoded) -> dict[str, float]:
        predicted = []
        for example, logits, firsts in zip(encoded.examples, outputs, encoded.notes, strict=True):
            guesses = [self.tags[int(i)] for i in logits[firsts].argmax(1)] if firsts else []
            predicted.append(guesses + ["O"] * (len(example.tags) - len(guesses)))
        return entity_scores(predicted, [e.tags for e in encoded.examples])


def kind_of(dataset: Dataset) -> Kind:
    """The kind a data set is of, with what has to be known of its training part.

    Raises:
        DataError: a regression whose scores are all the same.
    """
    if dataset.kind == "regression":
        scores = np.array([e.score for e in dataset.train], np.float64)
        if not scores.std() > 0:
            raise DataError(f"every training score of {dataset.name} is {scores[0]:g}; there is nothing to learn")
        return Regression(float(scores.mean()), float(scores.std()))
    if dataset.kind == "tokens":
        return Tagging(dataset.labels)
    return Classification(dataset.labels, dataset.outside)
