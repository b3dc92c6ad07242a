"""What a distillation will cost before it is begun: steps, tokens, FLOPs, and hours at the speed measured here."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from pocketfed.model.config import MobileBertConfig
from pocketfed.model.distillation import Distillation
from pocketfed.model.mobilebert import count_flops
from pocketfed.model.pretraining import MASK_SHARE, Batches
from pocketfed.model.schedules import DistillationError, phase_steps
from pocketfed.model.stages import MaskedWords, Predictions, Stage, Transfer, learning_only, make_optimizer

FIRST_TEXTS, GROWTH = 4, 4  # texts that are tried first, and how many times more after them,
LONGEST_S = 3.0  # up to what a process has at once in training, or to what takes so long
MEASURED_STEPS = 3


@dataclass(frozen=True)
class StageCost:
    """flops: matrix products of forward and backward passes (a backward pass is two), 2 per multiply-add, of all processes.

    texts: how many at once the hours were measured with. note: what one should know; empty if nothing.
    """

    name: str
    steps: int
    tokens: int
    flops: float
    hours: float
    texts: int
    note: str


def plan(run: Distillation) -> list[StageCost]:
    """Each stage's cost; some steps of each are run, at a rate of 0, which changes nothing.

    Raises:
        DistillationError: not even a few texts fit into memory.
    """
    tokens = float(run.batches.corpus.lengths.mean()) + 3
    costs = []
    for stage in run.stages:
        a_step = run.batches_of(stage).batch_size * tokens
        count = round(stage.steps * a_step)
        speed = _measure(stage, run)
        seconds = stage.steps * (a_step / run.place.ranks * speed.seconds_a_token + speed.update_s)
        flops = count * _flops_a_token(stage, run, round(tokens))
        costs.append(StageCost(stage.name, stage.steps, count, flops, seconds / 3600, speed.texts, speed.note))
    return costs


def _flops_a_token(stage: Stage, run: Distillation, length: int) -> float:
    def encoder(config: MobileBertConfig) -> float:
        return count_flops(config, length) / length

    most = run.schedule.most_hidden

    def head(config: MobileBertConfig) -> float:
        return (
            min(MASK_SHARE, most / length if most else 1.0)
            * 2
            * config.hidden_size
            * (config.vocab_size + config.hidden_size)
        )

    student, teacher = run.student.config, run.teacher.config
    if isinstance(stage, MaskedWords):
        config = stage.trained.config
        return 3 * (encoder(config) + head(config))
    if isinstance(stage, Transfer) and stage.progressive:
        # Layer l of L needs the lower ones too: the mean depth of a run, weighted by the phases' steps.
        phases = phase_steps(stage.steps, stage.layers)
        depth = sum(steps * (layer + 1) for layer, steps in enumerate(phases)) / (stage.layers * stage.steps)
        return depth * (3 * encoder(student) + encoder(teacher))
    both = 3 * encoder(student) + encoder(teacher)
    return both + (3 * head(student) + head(teacher) if isinstance(stage, Predictions) else 0.0)


@dataclass(frozen=True)
class _Speed:
    """Of one process. update_s: of the optimizer, once a step."""

    seconds_a_token: float
    update_s: float
    texts: int
    note: str = ""


def _measure(stage: Stage, run: Distillation) -> _Speed:
    """As many texts at once as in training, unless they take too long or do not fit into memory."""
    optimizer = make_optimizer(run.schedule.optimizer, stage.groups())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    batches = run.batches_of(stage)
    most = max(1, min(batches.batch_size // batches.least, len(batches.corpus)))  # `least`: processes times parts
    texts, note, passes, updates = min(FIRST_TEXTS, most), "", list[float](), list[float]()
    stage.trained.train(isinstance(stage, MaskedWords))
    try:
        with learning_only(stage.trained, [p for group in optimizer.param_groups for p in group["params"]]):
            at_once = _of_texts(batches, texts)
            _pass(stage, run, at_once, 0)  # sets things up
            taken, _ = _pass(stage, run, at_once, 0)
            while texts < most and taken * min(GROWTH, most / texts) <= LONGEST_S:
                tried = min(GROWTH * texts, most)
                more = _of_texts(batches, tried)
                try:
                    taken, _ = _pass(stage, run, more, 0)
                except RuntimeError as error:
                    if not _is_shortage(error):
                        raise
                    note = f"{tried} texts at once do not fit into memory, {texts} do: raise schedule.accumulate"
                    break
                texts, at_once = tried, more
            for number in range(MEASURED_STEPS):
                optimizer.zero_grad(set_to_none=True)
                seconds, tokens = _pass(stage, run, at_once, number)
                passes.append(seconds / tokens)
                begun = _now(run)
                optimizer.step()
                updates.append(_now(run) - begun)
    except RuntimeError as error:
        if not _is_shortage(error):
            raise
        raise DistillationError(
            f"{stage.name}: {texts} texts at once do not fit into memory; shorten them with schedule.max_length, or choose a "
            "smaller model"
        ) from None
    finally:
        stage.trained.eval()
        optimizer.zero_grad(set_to_none=True)
    return _Speed(statistics.median(passes), statistics.median(updates), texts, note)


def _of_texts(batches: Batches, texts: int) -> Batches:
    """Batches of exactly so many texts each."""
    corpus = batches.corpus
    whole = corpus.select(np.arange(len(corpus) - len(corpus) % texts))
    return replace(batches, corpus=whole, batch_size=texts, least=1)


def _pass(stage: Stage, run: Distillation, batches: Batches, number: int) -> tuple[float, int]:
    """Seconds that a batch takes, from text to gradients, and its tokens."""
    begun = _now(run)
    batch = batches.batch(number, stage.number)
    with run.precision():
        # The phase in the middle stands for all of a progressive transfer.
        loss = stage.loss(batch.to(run.place.device), stage.steps // 2)
    loss.backward()
    return _now(run) - begun, int(batch.attention_mask.sum())


def _now(run: Distillation) -> float:
    if run.place.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _is_shortage(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
