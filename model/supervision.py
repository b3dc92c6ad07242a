"""What each kind of task makes of its examples: targets, a loss, and a score of what a model says.

A kind is a frozen dataclass that is an `encoded.Kind`; `kind_of` picks it. Answers in passages are in `spans.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pocketfed.model.encoded import IGNORED, Encoded, Kind, encode_texts, joined
from pocketfed.model.metrics import (
    accuracy,
    classification_scores,
    entity_scores,
    judged_scores,
    regression_scores,
    scope_scores,
)
from pocketfed.model.spans import Spans
from pocketfed.model.tasks import DataError, Dataset, Example
from pocketfed.model.tokenization import Tokenizer


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
        if "choice of" in encoded.examples[0].fields:
            return self._choices(outputs, encoded.examples)
        return self.measured([self._guess(row) for row in outputs], encoded.examples)

    def measured(self, guesses: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """The measures of one guessed label an example."""
        expected = [e.label or "" for e in examples]
        if "answer to" in examples[0].fields:
            return judged_scores(guesses, expected, [e.fields["answer to"] for e in examples])
        scores = classification_scores(guesses, expected, self.labels)
        return scores | (scope_scores(guesses, expected, self.outside) if self.outside else {})

    def _guess(self, logits: NDArray[np.float32]) -> str:
        if self.threshold and self.outside and float(_softmax(logits).max()) < self.threshold:
            return self.outside
        return self.labels[int(logits.argmax())]

    def _choices(self, outputs: Sequence[NDArray[np.float32]], examples: Sequence[Example]) -> dict[str, float]:
        """Of the rows of one question, the one that is likeliest to be "1" is chosen (COPA)."""
        yes = self.labels.index("1")
        best: dict[str, tuple[float, str]] = {}
        for row, example in zip(outputs, examples, strict=True):
            margin = float(row[yes] - row[1 - yes])
            question = example.fields["choice of"]
            if question not in best or margin > best[question][0]:
                best[question] = (margin, example.label or "")
        return {"accuracy": accuracy([label for _, label in best.values()], ["1"] * len(best))}


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
    if dataset.kind == "spans":
        return Spans(any(not e.answers for e in dataset.train + dataset.dev + dataset.test))
    return Classification(dataset.labels, dataset.outside)
