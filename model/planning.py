"""What a distillation will cost before it is begun: steps, tokens, FLOPs, and hours at the speed measured here."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace

from pocketfed.model.config import MobileBertConfig
from pocketfed.model.distillation import Distillation
from pocketfed.model.mobilebert import count_flops
from pocketfed.model.pretraining import MASK_SHARE
from pocketfed.model.schedules import phase_steps
from pocketfed.model.stages import MaskedWords, Predictions, Stage, Transfer

MEASURED_TEXTS = 4  # a step of thousands of texts is not tried, it is reckoned from a few
MEASURED_STEPS = 3


@dataclass(frozen=True)
class StageCost:
    """flops: matrix products of forward and backward passes (a backward pass is two), 2 per multiply-add."""

    name: str
    steps: int
    tokens: int
    flops: float
    hours: float


def plan(run: Distillation) -> list[StageCost]:
    """Each stage's cost; a few small steps of each are run, which change nothing."""
    lengths = run.batches.corpus.lengths
    texts, tokens = len(lengths), float(lengths.mean()) + 3
    costs = []
    for stage in run.stages:
        count = round(stage.steps * run.batches_of(stage).batch_size * tokens)
        costs.append(
            StageCost(
                stage.name,
                stage.steps,
                count,
                count * _flops_a_token(stage, run, round(tokens)),
                count * _seconds_a_token(stage, run, min(MEASURED_TEXTS, texts)) / 3600,
            )
        )
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


def _seconds_a_token(stage: Stage, run: Distillation, texts: int) -> float:
    batches = replace(run.batches, batch_size=texts)
    stage.groups()
    speeds = []
    for number in range(MEASURED_STEPS):
        batch = batches.batch(number, stage.number).to(run.place.device)
        begun = time.perf_counter()
        with run.precision():
            # The phase in the middle stands for all of a progressive transfer.
            loss = stage.loss(batch, stage.steps // 2)
        loss.backward()
        float(loss.detach())  # waits for a GPU
        speeds.append((time.perf_counter() - begun) / int(batch.attention_mask.sum()))
        stage.trained.zero_grad(set_to_none=True)
    return statistics.median(speeds[1:])  # the first one also sets things up
