"""One assignment in, one reply out: the same code on a device, in a simulation and under Flower."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pocketfed.client_sdk.checkpoint import Checkpoint
from pocketfed.client_sdk.errors import ConfigurationError
from pocketfed.client_sdk.order import derive_seed
from pocketfed.client_sdk.outgoing import NOTHING, Kept, UpdateForm, make_outgoing
from pocketfed.client_sdk.trainer import (
    Asking,
    Examples,
    Steering,
    TrainConfig,
    Trainer,
    converse,
    count,
    evaluate,
    training,
)
from pocketfed.model.parameters import ParametersError, Split, Vector, frozen_mask, split_private, split_withheld

Kind = Literal["train", "evaluate"]


@dataclass(frozen=True)
class Task:
    """What a device is asked to do: theta (P,) is where to start, `device` its name.

    seeded_noise: local noise from the run's seed, for simulations; the coordinator could subtract it.
    control: the run's control variate (P,), where it has one (SCAFFOLD).
    """

    kind: Kind
    theta: Vector
    config: TrainConfig
    round: int
    device: str
    form: UpdateForm = field(default_factory=UpdateForm)
    seeded_noise: bool = False
    control: Vector | None = None


@dataclass(frozen=True)
class Reply:
    """data: all of an update that leaves the device; empty for an evaluation. delta: (P,) as a coordinator reads it.

    kept: what stays, and is true once the coordinator has taken the reply.
    """

    data: bytes
    delta: Vector
    num_examples: int
    metrics: Mapping[str, float]
    kept: Kept


def perform(
    trainer: Trainer,
    task: Task,
    examples: Examples,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[float], None] = lambda fraction: None,
    checkpoint: Checkpoint | None = None,
    kept: Kept | None = None,
) -> Reply:
    """Do what is asked, on this device's examples.

    Args:
        checkpoint: as in `train`.
        kept: what stayed of the reply before in this run, if there is any.

    Raises:
        TrainingError: no examples, stopped, or diverged; nothing is to be sent.
        ConfigurationError: a form that this trainable set, or this version, cannot have.
    """
    return converse(performing(trainer, task, examples, should_stop, progress, checkpoint, kept), trainer)


def performing(
    trainer: Trainer,
    task: Task,
    examples: Examples,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[float], None] = lambda fraction: None,
    checkpoint: Checkpoint | None = None,
    kept: Kept | None = None,
) -> Asking[Reply]:
    """`perform`, but for the gradients of training: those it asks for."""
    kept = kept or Kept()
    own, sent = split_of(trainer, task.form), sent_of(trainer, task.form)
    theta = own.overlay(task.theta, kept.private) if kept.private.size else task.theta
    if task.kind == "evaluate":
        measured = _measure(trainer, theta, examples, task.form, should_stop)
        return Reply(b"", NOTHING, len(examples), _declared(measured, task.form), kept)
    config = dataclasses.replace(task.config, seed=derive_seed(task.config.seed, task.round, task.device))
    steering = _steering(trainer, task, kept)
    trained = yield from training(trainer, theta, examples, config, should_stop, progress, checkpoint, steering)
    waiting = own.spread(kept.residual) if kept.residual.size else np.zeros(trainer.size, np.float32)
    before = sent.shared(waiting) if kept.residual.size else NOTHING
    out = make_outgoing(task.form, sent.shared(trained.delta), before, _noise(task))
    residual = out.residual
    if residual.size and sent.ranges != own.ranges:  # what is frozen in this round has still to be sent in another
        residual = own.shared(sent.overlay(sent.spread(residual), sent.private(waiting)))
    private = own.private(theta + trained.delta) if own.ranges else NOTHING
    said, metrics = sent.spread(out.said), _declared(trained.metrics, task.form)
    control = NOTHING
    if steering.drift is not None:  # Karimireddy et al. 2020, eq. 4, option II: c_i - c + (x - y_i) / (K η)
        walked = trained.metrics["steps"] * config.learning_rate
        control = (-steering.drift - said / walked).astype(np.float32)
    return Reply(out.data, said, trained.num_examples, metrics, Kept(residual, private, control))


def split_of(trainer: Trainer, form: UpdateForm) -> Split:
    """
    Raises:
        ConfigurationError: private parameters that the trainable set does not have.
    """
    if not form.private:
        return Split(trainer.size)
    try:
        return split_private(trainer.layout, form.private)
    except ParametersError as error:
        raise ConfigurationError(str(error)) from None


def sent_of(trainer: Trainer, form: UpdateForm) -> Split:
    """As `split_of`, and without what this round leaves as it is."""
    if not (form.frozen or form.lora_rank):
        return split_of(trainer, form)
    try:
        return split_withheld(trainer.layout, form.private, form.frozen, form.lora_rank)
    except ParametersError as error:
        raise ConfigurationError(str(error)) from None


def _steering(trainer: Trainer, task: Task, kept: Kept) -> Steering:
    """
    Raises:
        ConfigurationError: a control variate for steps that are not plain ones.
    """
    form, config = task.form, task.config
    frozen = frozen_mask(trainer.layout, form.frozen, form.lora_rank) if form.frozen or form.lora_rank else None
    if task.control is None:
        return Steering(frozen)
    steps = config.optimizer == "sgd" and config.schedule == "constant" and config.learning_rate > 0
    steps = steps and not (config.momentum or config.proximal_mu or config.warmup or config.patience)
    if not steps or form.private or form.noise or form.how.feeds_back:
        raise ConfigurationError(
            f"a control variate is defined for plain sgd at a constant rate, sent whole, without noise or error feedback, not for "
            f"{config.optimizer} as {form.codec} with these settings; the run must be configured so"
        )
    own = kept.control if kept.control.size else np.zeros(trainer.size, np.float32)
    return Steering(frozen, task.control - own)  # eq. 3: g - c_i + c


def _measure(
    trainer: Trainer, theta: Vector, examples: Examples, form: UpdateForm, should_stop: Callable[[], bool]
) -> Mapping[str, float]:
    """Where theta is partly the device's own, counts and sums only."""
    if not form.private:
        return evaluate(trainer, theta, examples, should_stop=should_stop)
    counted = count(trainer, theta, examples, should_stop=should_stop)
    return {"examples": float(counted.answers), "correct": float(counted.right), "loss_sum": counted.loss_sum}


def _declared(metrics: Mapping[str, float], form: UpdateForm) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name in form.metrics}


def _noise(task: Task) -> np.random.Generator | None:
    """From the machine's entropy: whoever knows the run's seed must not know the noise. None where there is to be none."""
    if not task.form.noise:
        return None
    seeded = derive_seed(task.config.seed, task.round, f"{task.device}/noise")
    return np.random.Generator(np.random.PCG64(seeded if task.seeded_noise else secrets.randbits(128)))
