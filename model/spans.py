"""Answers as spans of a passage: windows with stride over long ones, and the best spans put together again.

Devlin et al. 2019, section 4.2 and 4.3, and the settings of their code. Answers are cut from the passage as it was
written, by the offsets of their pieces, where that code aligns normalised text.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pocketfed.model.answers import answer_f1, answer_scores, best_threshold, exact_match
from pocketfed.model.encoded import Encoded, Kind, joined
from pocketfed.model.tasks import Example
from pocketfed.model.tokenization import Tokenizer

Offsets = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Window:
    """A part of an example's passage, as a row. Its pieces start at `base` in the row, at `first` in the passage.

    offsets: of its pieces, in the passage's characters. widest: whether no other window shows more around the piece.
    """

    example: int
    base: int
    first: int
    offsets: Offsets
    widest: NDArray[np.bool_]


@dataclass(frozen=True)
class Answer:
    """The best answer to a question. null_score: how much likelier no answer is, in logits."""

    text: str
    null_score: float


@dataclass(frozen=True)
class Guess:
    """One of the likeliest answers to a question, with the logits of its two ends; "" is that there is none."""

    text: str
    start_logit: float
    end_logit: float


@dataclass(frozen=True)
class Spans:
    """Start and end of the answer to a question, in pieces.

    nullable: there may be no answer; then "" is said where the null score is above `null_threshold`, chosen on dev for F1.
    """

    nullable: bool
    null_threshold: float = 0.0
    doc_stride: int = 128  # pieces; half of a window where that is less
    max_query_length: int = 64
    n_best: int = 20
    max_answer_length: int = 30
    kind: str = "spans"
    outputs: int = 2

    def encode(self, examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> Encoded:
        passages = sorted({e.text_pair or "" for e in examples})
        read = dict(zip(passages, tokenizer.encode_offsets(passages), strict=True))
        vocabulary = tokenizer.vocabulary
        rows, targets, notes = [], [], []
        questions = tokenizer.encode_plain([e.text for e in examples])
        for number, (example, question) in enumerate(zip(examples, questions, strict=True)):
            pieces, offsets = read[example.text_pair or ""]
            asked = question[: min(self.max_query_length, (max_length - 3) // 2)]
            room = max_length - len(asked) - 3
            answer = _piece_span(example, offsets)
            starts = _starts(len(pieces), room, min(self.doc_stride, max(1, room // 2)))
            for first in starts:
                part = pieces[first : first + room]
                base = len(asked) + 2
                rows.append(
                    np.array([vocabulary.cls_id, *asked, vocabulary.sep_id, *part, vocabulary.sep_id], np.int64)
                )
                targets.append(_target(answer, first, len(part), base))
                widest = _widest(starts, first, len(part), len(pieces), room)
                notes.append(Window(number, base, first, offsets[first : first + room], widest))
        return joined(examples, rows, np.array(targets, np.int64).reshape(-1, 2), notes=tuple(notes))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        starts, ends = logits.unbind(2)  # (B, T) each
        return (F.cross_entropy(starts, targets[:, 0]) + F.cross_entropy(ends, targets[:, 1])) / 2

    def fitted(self, outputs: Sequence[NDArray[np.float32]], encoded: Encoded) -> Kind:
        if not self.nullable:
            return self
        answers = self.answers(outputs, encoded)
        values = [answer_f1(a.text, [t for t, _ in e.answers]) for a, e in zip(answers, encoded.examples, strict=True)]
        answered = [bool(e.answers) for e in encoded.examples]
        return replace(self, null_threshold=best_threshold(values, [a.null_score for a in answers], answered)[1])

    def score(self, outputs: Sequence[NDArray[np.float32]], encoded: Encoded) -> dict[str, float]:
        answers = self.answers(outputs, encoded)
        gold = [[text for text, _ in e.answers] for e in encoded.examples]
        said = [self.said(answer) for answer in answers]
        scores = answer_scores(said, gold)
        if not self.nullable:
            return scores
        null_scores, answered = [a.null_score for a in answers], [bool(texts) for texts in gold]
        for name, measure in (("best_exact", exact_match), ("best_f1", answer_f1)):
            values = [measure(a.text, texts) for a, texts in zip(answers, gold, strict=True)]
            scores[name] = best_threshold(values, null_scores, answered)[0]
        return scores

    def said(self, answer: Answer) -> str:
        return "" if self.nullable and answer.null_score > self.null_threshold else answer.text

    def answers(self, outputs: Sequence[NDArray[np.float32]], encoded: Encoded) -> list[Answer]:
        """The best span of each question over all windows of its passage; never empty, unless the passage is."""
        best: list[tuple[float, str]] = [(-math.inf, "")] * len(encoded.examples)
        null = [math.inf] * len(encoded.examples)
        for logits, window in zip(outputs, encoded.notes, strict=True):
            null[window.example] = min(null[window.example], float(logits[0].sum()))
            found = self._best_span(logits, window)
            if found is not None and found[0] > best[window.example][0]:
                score, start, end = found
                passage = encoded.examples[window.example].text_pair or ""
                best[window.example] = (score, passage[window.offsets[start][0] : window.offsets[end][1]])
        return [Answer(text, none - score) for (score, text), none in zip(best, null, strict=True)]

    def guesses(self, outputs: Sequence[NDArray[np.float32]], encoded: Encoded) -> list[list[Guess]]:
        """The `n_best` likeliest answers to each question, the best first, no text twice.

        Where there may be none, that is among them, and comes on top of them where others are likelier.
        """
        every: list[list[Guess]] = [[] for _ in encoded.examples]
        windows = zip(outputs, encoded.notes, strict=True)
        for example, some in itertools.groupby(windows, key=lambda pair: pair[1].example):
            passage = encoded.examples[example].text_pair or ""
            found: list[tuple[float, Guess]] = []
            nulls: list[tuple[float, Guess]] = []
            for logits, window in some:
                nulls.append((float(logits[0].sum()), Guess("", float(logits[0, 0]), float(logits[0, 1]))))
                for score, start, end in self._spans(logits, window):
                    text = passage[window.offsets[start][0] : window.offsets[end][1]]
                    ends = logits[window.base + start, 0], logits[window.base + end, 1]
                    found.append((score, Guess(text, float(ends[0]), float(ends[1]))))
            none = [min(nulls, key=lambda scored: scored[0])] if self.nullable else []
            by_text: dict[str, Guess] = {}
            for _, guess in sorted(found + none, key=lambda scored: -scored[0]):
                by_text.setdefault(guess.text, guess)
            best = list(by_text.values())[: self.n_best]
            every[example] = best + [guess for _, guess in none if guess not in best]
        return every

    def _best_span(self, logits: NDArray[np.float32], window: Window) -> tuple[float, int, int] | None:
        return max(self._spans(logits, window), key=lambda span: span[0], default=None)  # max keeps the first of equals

    def _spans(self, logits: NDArray[np.float32], window: Window) -> Iterator[tuple[float, int, int]]:
        """Score, first and last piece of each span of a window that may be the answer."""
        inside = logits[window.base : window.base + len(window.offsets)]  # (pieces, 2)
        starts, ends = (np.argsort(-inside[:, side], kind="stable")[: self.n_best] for side in (0, 1))
        for start in map(int, starts):
            if not window.widest[start]:
                continue
            for end in map(int, ends):
                if start <= end < start + self.max_answer_length:
                    yield float(inside[start, 0] + inside[end, 1]), start, end


def _starts(pieces: int, room: int, stride: int) -> list[int]:
    """Where windows of `room` pieces begin.

    >>> _starts(10, 5, 3), _starts(5, 5, 3)
    ([0, 3, 6], [0])
    """
    starts = [0]
    while starts[-1] + room < pieces:
        starts.append(starts[-1] + stride)
    return starts


def _widest(starts: Sequence[int], first: int, length: int, pieces: int, room: int) -> NDArray[np.bool_]:
    """Of each piece of a window, whether it has the most context there: the smaller side counts, the earliest of equals."""
    places = np.arange(first, first + length)
    ends = [min(start + room, pieces) for start in starts]
    sides = np.array(
        [
            np.where(
                (places >= start) & (places < end),
                np.minimum(places - start, end - 1 - places) + 0.01 * (end - start),
                -np.inf,
            )
            for start, end in zip(starts, ends, strict=True)
        ]
    )  # (windows, pieces of this one)
    chosen: NDArray[np.bool_] = sides.argmax(0) == starts.index(first)
    return chosen


def _piece_span(example: Example, offsets: Offsets) -> tuple[int, int] | None:
    """First and last piece of the first answer; None where there is none, or nothing of it can be read."""
    if not example.answers:
        return None
    text, begin = example.answers[0]
    end = begin + len(text)
    inside = [i for i, (start, stop) in enumerate(offsets) if start < end and stop > begin]
    return (inside[0], inside[-1]) if inside else None


def _target(answer: tuple[int, int] | None, first: int, length: int, base: int) -> tuple[int, int]:
    """Start and end in the row; [CLS] twice where the window does not hold the whole answer."""
    if answer is None or answer[0] < first or answer[1] >= first + length:
        return 0, 0
    return answer[0] - first + base, answer[1] - first + base
