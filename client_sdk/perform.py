"""One assignment in, one reply out: the same code on a device, in a simulation and under Flower."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pocketfed.client_sdk.trainer import Examples, TrainConfig, Trainer, derive_seed, evaluate, train
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


@dataclass(frozen=True)
class Reply:
    """delta (P,) is empty for an evaluation."""

    delta: Vector
    num_examples: int
    metrics: Mapping[str, float]


def perform(
    trainer: Trainer,
    task: Task,
    examples: Examples,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Reply:
    """Do what is asked, on this device's examples.

    Raises:
        TrainingError: no examples, stopped, or diverged; nothing is to be sent.
    """
    if task.kind == "evaluate":
        return Reply(
            np.zeros(0, np.float32), len(examples), evaluate(trainer, task.theta, examples, should_stop=should_stop)
        )
    config = dataclasses.replace(task.config, seed=derive_seed(task.config.seed, task.round, task.device))
    trained = train(trainer, task.theta, examples, config, should_stop, progress)
    return Reply(trained.delta, trained.num_examples, trained.metrics)
