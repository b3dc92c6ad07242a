"""Answers to questions on passages, in the files that BERT's code writes and SQuAD's own script scores."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketfed.model.encoded import Encoded
from pocketfed.model.spans import Guess, Spans
from pocketfed.model.tasks import DataError, Dataset

PREDICTIONS = "predictions.json"  # id -> text; the last that is written: where it is, the others are
N_BEST = "nbest_predictions.json"  # id -> [{text, probability, start_logit, end_logit}, ...]
NULL_ODDS = "null_odds.json"  # id -> how much likelier no answer is, in logits; only where there may be none
WITHOUT_DOUBT = 1e6  # of no answer, where no span could be said at all: JSON has no infinity


def check_answerable(dataset: Dataset) -> None:
    """Can its answers be told apart by the ids of its questions?

    Raises:
        DataError: no; the sentence says why.
    """
    if dataset.kind != "spans":
        raise DataError(
            f"{dataset.name} is of the kind {dataset.kind}, and answers are written to questions on passages alone; "
            "leave --predictions out"
        )
    identity, times = Counter(e.fields.get("id", "") for e in dataset.test).most_common(1)[0]
    if times > 1:
        raise DataError(f"{times} questions of {dataset.name} have the id {identity!r}; give each an id of its own")


def write_answers(folder: Path, kind: Spans, outputs: Sequence[NDArray[np.float32]], encoded: Encoded) -> None:
    """What a model says to each question, into a folder that is made where it is not there."""
    ids = [e.fields.get("id", "") for e in encoded.examples]
    answers = kind.answers(outputs, encoded)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / N_BEST, dict(zip(ids, map(n_best_rows, kind.guesses(outputs, encoded)), strict=True)))
    if kind.nullable:
        _write(folder / NULL_ODDS, {i: min(a.null_score, WITHOUT_DOUBT) for i, a in zip(ids, answers, strict=True)})
    _write(folder / PREDICTIONS, {i: kind.said(a) for i, a in zip(ids, answers, strict=True)})


def n_best_rows(guesses: Sequence[Guess]) -> list[dict[str, Any]]:
    """Guesses with their probabilities among themselves.

    >>> [row["probability"] for row in n_best_rows([Guess("a", 1.0, 2.0), Guess("b", 2.0, 1.0)])]
    [0.5, 0.5]
    """
    scores = [guess.start_logit + guess.end_logit for guess in guesses]
    powers = [math.exp(score - max(scores)) for score in scores]
    return [
        {"text": g.text, "probability": power / sum(powers), "start_logit": g.start_logit, "end_logit": g.end_logit}
        for g, power in zip(guesses, powers, strict=True)
    ]


def _write(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
