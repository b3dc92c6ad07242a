"""One assignment in, one reply out: the same code on a device, in a simulation and under Flower."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pocketfed.client_sdk.checkpoint import Checkpoint
from pocketfed.client_sdk.order import derive_seed
from pocketfed.client_sdk.trainer import Examples, TrainConfig, Trained, Trainer, evaluate, train
from pocketfed.model.parameters import Vector

Kind = Literal["train", "evaluate"]


@dataclass(frozen=True)
class Task:
    """What a device is asked to do: theta (P,) is where to start, `device` its name."""

    kind: Kind
    theta: Vector
    config: TrainConfig
    round: int
    device: str


def perform(
    trainer: Trainer,
    task: Task,
    examples: Examples,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[float], None] = lambda fraction: None,
    checkpoint: Checkpoint | None = None,
) -> Trained:
    """Do what is asked, on this device's examples. The reply to an evaluation has an empty delta.

    Args:
        checkpoint: as in `train`.

    Raises:
        TrainingError: no examples, stopped, or diverged; nothing is to be sent.
    """
    if task.kind == "evaluate":
        return Trained(
            np.zeros(0, np.float32), len(examples), evaluate(trainer, task.theta, examples, should_stop=should_stop)
        )
    config = dataclasses.replace(task.config, seed=derive_seed(task.config.seed, task.round, task.device))
    return train(trainer, task.theta, examples, config, should_stop, progress, checkpoint)
