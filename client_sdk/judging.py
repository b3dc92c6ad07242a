"""Is a new model worse for this device? Counted on its own held-out examples, beside the model it ran before."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketfed.client_sdk.errors import ArtifactError, ConfigurationError, TrainingStopped
from pocketfed.client_sdk.link import log
from pocketfed.client_sdk.local import LocalExamples
from pocketfed.client_sdk.models import Models
from pocketfed.client_sdk.trainer import Examples, Trainer, make_batch
from pocketfed.model.parameters import Vector

BATCH = 16


@dataclass(frozen=True)
class Comparison:
    """Two models on the same examples. loss_sum: nats. lost: examples that only the old one gets right; won: only the new."""

    examples: int
    correct: int
    correct_before: int
    loss_sum: float
    loss_sum_before: float
    lost: int
    won: int

    def is_worse(self, margin: float) -> bool:
        """Beyond `margin` in accuracy, and beyond chance: two standard errors of the difference (McNemar 1947).

        >>> Comparison(100, 70, 85, 0.0, 0.0, lost=17, won=2).is_worse(0.1)
        True
        >>> Comparison(8, 6, 8, 0.0, 0.0, lost=2, won=0).is_worse(0.1)
        False
        """
        difference = self.lost - self.won
        return difference > margin * self.examples and difference > 2 * math.sqrt(self.lost + self.won)

    def to_report(self, release_id: int, before_id: int) -> dict[str, Any]:
        """Fields of ReleaseReport in fleet.proto."""
        return {
            "release_id": release_id,
            "before_id": before_id,
            "examples": self.examples,
            "correct": self.correct,
            "correct_before": self.correct_before,
            "loss_sum": self.loss_sum,
            "loss_sum_before": self.loss_sum_before,
        }


def score(
    trainer: Trainer, theta: Vector, examples: Examples, should_stop: Callable[[], bool] = lambda: False
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Of each classified example whether it is right, and its loss.

    Raises:
        TrainingStopped: should_stop, asked before every batch, said so.
    """
    right, losses = np.zeros(len(examples), np.bool_), np.zeros(len(examples))
    order = np.argsort([len(row) for row in examples.rows], kind="stable")
    for start in range(0, len(order), BATCH):
        if should_stop():
            raise TrainingStopped(f"stopped after {start} of {len(order)} held-out examples")
        chosen = order[start : start + BATCH]
        batch = make_batch(examples, chosen)
        logits = trainer.logits(theta, batch.ids, batch.mask).astype(np.float64)  # (B, labels)
        top = logits.max(1)
        losses[chosen] = (
            np.log(np.exp(logits - top[:, None]).sum(1)) + top - logits[np.arange(len(chosen)), batch.labels]
        )
        right[chosen] = logits.argmax(1) == batch.labels
    return right, losses


def compare(
    new: tuple[NDArray[np.bool_], NDArray[np.float64]], before: tuple[NDArray[np.bool_], NDArray[np.float64]]
) -> Comparison:
    """From what `score` says of both. A loss that is not finite makes every answer of its model wrong."""
    (right, losses), (right_before, losses_before) = (_finite(*new), _finite(*before))
    return Comparison(
        examples=len(right),
        correct=int(right.sum()),
        correct_before=int(right_before.sum()),
        loss_sum=float(losses.sum()),
        loss_sum_before=float(losses_before.sum()),
        lost=int((right_before & ~right).sum()),
        won=int((right & ~right_before).sum()),
    )


def _finite(right: NDArray[np.bool_], losses: NDArray[np.float64]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    usable = np.isfinite(losses)
    return right & usable, np.where(usable, losses, 0.0)


def judge(
    models: Models,
    local: LocalExamples,
    margin: float,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda status: None,
) -> bool:
    """Compare a new release with the one before on the held-out examples; go back if it is worse. Once a release.

    Returns:
        False where there are not enough examples to judge by.

    Raises:
        TrainingStopped: should_stop said so; it is done another time.
    """
    if not local.count_held_out():
        return False
    pair = models.pair_to_judge()
    if pair is None:
        return True
    new, before = pair
    held_out = local.held_out([new.trainer, before.trainer])
    if not held_out:
        return False
    say("comparing the new model with the one before")
    try:
        found = compare(
            score(new.trainer, new.theta, held_out[0], should_stop),
            score(before.trainer, before.theta, held_out[1], should_stop),
        )
    except (ArtifactError, ConfigurationError) as error:  # no memory for both, say: then the new one stays
        log.warning("release %d cannot be compared with the one before: %s", new.release_id, error)
        models.judged(new.release_id, {}, None)
        return True
    report = found.to_report(new.release_id, before.release_id)
    if models.judged(new.release_id, report, before if found.is_worse(margin) else None):
        say(
            f"went back to the model before: of {found.examples} held-out examples the new one gets {found.correct} right, "
            f"that one {found.correct_before}"
        )
    return True
