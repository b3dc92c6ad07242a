"""The device's labelled examples as a model reads them: those it trains on, and those it holds out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pocketfed.client_sdk.errors import ConfigurationError
from pocketfed.client_sdk.examples import ExampleStore, Stored
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples

AT_LEAST = 8  # held-out examples; fewer judge nothing
AT_MOST = 256  # of them a model is judged by


def check_holdout(share: float) -> float:
    """
    Raises:
        ConfigurationError: not a share that could be held out.
    """
    if not 0 <= share <= 0.5:
        raise ConfigurationError(f"holdout is {share!r}; give the share of examples to hold out, 0 to 0.5")
    return share


class LocalExamples:
    """Tokenized once for as long as neither the examples nor the model change.

    Args:
        holdout: share that is never trained on, by a hash of the text; nothing is held out before it comes to AT_LEAST examples.
    """

    def __init__(self, store: ExampleStore, holdout: float) -> None:
        self._store, self._holdout = store, holdout
        self._split: tuple[Any, int, list[int]] | None = None  # state, how many to train on, ids of those held out
        self._encoded: tuple[Any, Examples] | None = None

    def count(self) -> int:
        """Labelled examples that could be trained on."""
        return self._parts()[0]

    def count_held_out(self) -> int:
        return len(self._parts()[1])

    def training(self, trainer: PlanTrainer, max_length: int) -> Examples:
        """Those with a label of the model, oldest first."""
        key = (self._store.state(), trainer.artifact.manifest.version, max_length)
        if self._encoded is None or self._encoded[0] != key:
            apart = set(self._parts()[1])
            self._encoded = (
                key,
                _encode([e for e in self._store.labelled() if e.id not in apart], trainer, max_length),
            )
        return self._encoded[1]

    def held_out(self, trainers: Sequence[PlanTrainer]) -> list[Examples]:
        """The same held-out examples as each of the models reads them; none where fewer than AT_LEAST have labels of all."""
        order = {example_id: place for place, example_id in enumerate(self._parts()[1])}
        known = set.intersection(*(set(t.artifact.manifest.labels) for t in trainers))
        usable = [e for e in self._store.labelled() if e.id in order and e.label in known] if order else []
        usable = sorted(usable, key=lambda e: order[e.id])[:AT_MOST]
        if len(usable) < AT_LEAST:
            return []
        return [_encode(usable, t, t.artifact.manifest.max_length) for t in trainers]

    def _parts(self) -> tuple[int, list[int]]:
        """How many to train on, and the ids of those held out, always in the same order. No text is kept in memory."""
        state = self._store.state()
        if self._split is None or self._split[0] != state:
            places = {e.id: _place(e) for e in self._store.labelled()} if self._holdout else {}
            held = sorted((i for i, place in places.items() if place < self._holdout), key=places.__getitem__)
            held = held if len(held) >= AT_LEAST else []
            count = len(places) if self._holdout else self._store.count(labelled=True)
            self._split = (state, count - len(held), held)
        return self._split[1], self._split[2]


def _place(example: Stored) -> float:
    """From 0 to 1, always the same for a text: the same words are never on both sides."""
    digest = hashlib.sha256(f"{example.text}\0{example.text_pair or ''}".encode("utf-8", "replace")).digest()
    return math.ldexp(int.from_bytes(digest[:8], "big"), -64)


def _encode(examples: list[Stored], trainer: PlanTrainer, max_length: int) -> Examples:
    index = {label: i for i, label in enumerate(trainer.artifact.manifest.labels)}
    usable = [e for e in examples if e.label in index]
    rows = trainer.encode([e.text for e in usable], [e.text_pair for e in usable], max_length) if usable else ()
    labels = np.array([index[e.label] for e in usable if e.label is not None], np.int64)
    return Examples(rows, labels, truncated=getattr(rows, "truncated", 0))
