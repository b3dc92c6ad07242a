"""A student learns from its teacher: feature maps, attention maps, then predictions (Sun et al. 2020, section 3.5)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketfed.model.config import MobileBertConfig
from pocketfed.model.lamb import Lamb, parameter_groups
from pocketfed.model.pretraining import (
    MaskedBatch,
    MaskedScore,
    TokenCorpus,
    masked_batches,
    score_masked,
    split_held_out,
)
from pocketfed.model.teacher import PreTrainingModel, copy_from_teacher
from pocketfed.model.tokenization import Vocabulary

# google-research/mobilebert: the feature-map loss taken apart, so that norm-free features can follow normed ones.
FEATURE_WEIGHT, MEAN_WEIGHT, VARIANCE_WEIGHT = 100.0, 5000.0, 5.0
GROUND_TRUTH_SHARE = 0.5
LOWER_LAYER_RATE = 0.1  # layers already transferred go on learning, ten times slower
GRADIENT_NORM = 1.0
Progress = Callable[[str, int, int, float], None]  # stage, step done, steps in all, loss


class DistillationError(RuntimeError):
    """A distillation that cannot be set up, or one that went wrong on the way."""


# ---- losses --------------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, T) values over real tokens."""
    weights = mask.to(values.dtype)
    return (values * weights).sum() / weights.sum()


def feature_map_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Feature map transfer (Sun et al. 2020, eq. 3), as Google's code takes it apart.

    100 * MSE of the features after a LayerNorm without gain, 5000 * squared difference of their means, 5 * absolute
    difference of their variances; means over real tokens.

    Args:
        student, teacher: (B, T, D) block outputs. mask: (B, T), 1 on real tokens.
    """
    s, t = _wide(student), _wide(teacher)
    width = (s.shape[-1],)
    shape = (F.layer_norm(s, width) - F.layer_norm(t, width)).square().mean(-1)  # (B, T)
    means = (s.mean(-1) - t.mean(-1)).square()
    variances = (s.var(-1, unbiased=False) - t.var(-1, unbiased=False)).abs()
    return _over_tokens(FEATURE_WEIGHT * shape + MEAN_WEIGHT * means + VARIANCE_WEIGHT * variances, mask)


def attention_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Attention map transfer (Sun et al. 2020, eq. 4): cross-entropy of student and teacher maps, head by head.

    Same gradient as their KL divergence. Mean over examples, heads and real query positions.

    Args:
        student, teacher: (B, N, T, T) masked scores before the softmax. mask: (B, T), 1 on real tokens.
    """
    s, t = _wide(student), _wide(teacher)
    cross = -(t.softmax(-1) * s.log_softmax(-1)).sum(-1)  # (B, N, T): one a query
    return _over_tokens(cross.mean(1), mask)


def pretraining_distillation_loss(
    student: Tensor, teacher: Tensor, targets: Tensor, ground_truth: float = GROUND_TRUTH_SHARE
) -> Tensor:
    """Pre-training distillation (Sun et al. 2020, eq. 5, without next-sentence prediction).

    Cross-entropy against `ground_truth` of the hidden token and 1 - `ground_truth` of the teacher's prediction.

    Args:
        student, teacher: (M, V) logits of the hidden positions. targets: (M,) token ids.
    """
    s, t = _wide(student), _wide(teacher)
    log_probabilities = s.log_softmax(-1)
    hard = F.nll_loss(log_probabilities, targets)
    soft = -(t.softmax(-1) * log_probabilities).sum(-1).mean()
    return ground_truth * hard + (1.0 - ground_truth) * soft


# ---- schedule ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """How long and how fast. Steps are batches of `batch_size` lines; rates are peaks, after warm-up."""

    teacher_steps: int
    transfer_steps: int  # all layers together
    distillation_steps: int
    batch_size: int
    teacher_rate: float
    transfer_rate: float
    distillation_rate: float
    warm_up: float = 0.1  # share of a stage, and of a layer's phase
    optimizer: Literal["lamb", "adamw"] = "lamb"  # LAMB pays with batches of thousands; small ones want AdamW

    def __post_init__(self) -> None:
        if self.optimizer not in ("lamb", "adamw"):
            raise DistillationError(f"optimizer is {self.optimizer!r}; choose lamb or adamw")
        for name in ("teacher_steps", "transfer_steps", "distillation_steps", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise DistillationError(f"{name} is {value!r}; it must be a whole number of at least 1")
        for name in ("teacher_rate", "transfer_rate", "distillation_rate"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise DistillationError(f"{name} is {value!r}; it must be a positive number, such as 0.003")
        if not isinstance(self.warm_up, (int, float)) or not 0 <= self.warm_up < 1:
            raise DistillationError(f"warm_up is {self.warm_up!r}; it must be a share of a stage, such as 0.1")

    @property
    def steps(self) -> int:
        return self.teacher_steps + self.transfer_steps + self.distillation_steps

    def scaled(self, steps: int, layers: int) -> Schedule:
        """The same schedule over `steps` in all, its stages in proportion.

        Raises:
            DistillationError: fewer than a step for the teacher, for each layer and for the distillation.
        """
        if steps < layers + 2:
            raise DistillationError(f"{steps} steps are too few; {layers} layers need at least {layers + 2}")
        transfer = max(layers, round(steps * self.transfer_steps / self.steps))
        distillation = max(1, round(steps * self.distillation_steps / self.steps))
        transfer = min(transfer, steps - 2)
        distillation = min(distillation, steps - transfer - 1)
        teacher = steps - transfer - distillation
        return dataclasses.replace(
            self, teacher_steps=teacher, transfer_steps=transfer, distillation_steps=distillation
        )


# Sun et al. 2020, section 4.2, and google-research/mobilebert: a TPU pod's work, kept as the reference.
REFERENCE_SCHEDULE = Schedule(
    teacher_steps=500_000,
    transfer_steps=240_000,
    distillation_steps=500_000,
    batch_size=2048,
    teacher_rate=1.5e-3,
    transfer_rate=4.5e-3,
    distillation_rate=1.5e-3,
    warm_up=0.02,
)
SCHEDULES: dict[str, Schedule] = {
    "nano": Schedule(
        teacher_steps=800,
        transfer_steps=600,
        distillation_steps=600,
        batch_size=32,
        teacher_rate=5e-3,
        transfer_rate=5e-3,
        distillation_rate=5e-3,
        optimizer="adamw",
    ),
    "micro": Schedule(
        teacher_steps=2000,
        transfer_steps=1500,
        distillation_steps=1500,
        batch_size=32,
        teacher_rate=3e-3,
        transfer_rate=3e-3,
        distillation_rate=3e-3,
        optimizer="adamw",
    ),
}


def schedule_for(preset: str) -> Schedule:
    """The preset's own schedule; for the published sizes, the paper's."""
    return SCHEDULES.get(preset, REFERENCE_SCHEDULE)


# ---- the stages ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """A distilled student and how it came about.

    student: its tensors, named as in `MobileBert`. losses: one value a step, by stage ("teacher", "transfer/1", ...,
    "distillation"). scores: on held-out lines, of "teacher", "student before", "student transferred" and "student".
    """

    student: dict[str, Tensor]
    losses: dict[str, tuple[float, ...]]
    scores: dict[str, MaskedScore]
    schedule: Schedule
    seed: int


def no_progress(stage: str, step: int, steps: int, loss: float) -> None:
    """For callers that do not watch."""


def check_pair(student: MobileBertConfig, teacher: MobileBertConfig) -> None:
    """Raises DistillationError unless each student layer can follow the same layer of the teacher."""
    for name in (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "vocab_size",
        "embedding_size",
        "trigram_input",
        "max_position_embeddings",
        "type_vocab_size",
    ):
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if ours != theirs:
            raise DistillationError(
                f"the student's {name} is {ours} and the teacher's is {theirs}; transfer needs them equal, so set both"
            )


def _warm(step: int, steps: int, warm_up: float) -> float:
    """Linear warm-up: the share of the peak rate at a step counted from 0."""
    return min(1.0, (step + 1) / max(1.0, warm_up * steps))


def linear_decay(step: int, steps: int, warm_up: float) -> float:
    """Warm-up, then down to a ten-thousandth at the end."""
    return min(_warm(step, steps, warm_up), max(1e-4, (steps - step) / steps))


def phase_decay(step: int, steps: int, warm_up: float) -> float:
    """Warm-up, then gently down to nine tenths, anew for each layer (google-research/mobilebert)."""
    return min(_warm(step, steps, warm_up), 0.9 + 0.1 * math.sqrt(1.0 - step / steps))


def _optimizer(kind: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if kind == "lamb":
        return Lamb(groups, lr=0.0)  # each group brings its own rate
    plain = [{key: value for key, value in group.items() if key != "adapt"} for group in groups]
    # 0.98: a run of hundreds of steps is over before an average over a thousand has settled.
    return torch.optim.AdamW(plain, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=True)


def _descend(
    stage: str,
    steps: int,
    optimizer: torch.optim.Optimizer,
    share: Callable[[int, int], float],
    loss_of: Callable[[MaskedBatch], Tensor],
    batches: Iterator[MaskedBatch],
    progress: Progress,
) -> tuple[float, ...]:
    """Minimise `loss_of` for some steps; `share` gives each step's fraction of the peak rates."""
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses: list[float] = []
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share(step, steps)
        loss = loss_of(next(batches))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM))
        losses.append(float(loss.detach()))
        if not (math.isfinite(losses[-1]) and math.isfinite(norm)):
            raise DistillationError(
                f"{stage}: the loss is {losses[-1]} and the gradient's norm {norm} at step {step + 1} of {steps}; "
                "use a lower rate, or a student with normalization_type layer_norm"
            )
        optimizer.step()
        progress(stage, step + 1, steps, losses[-1])
    return tuple(losses)


def train_masked(
    model: PreTrainingModel,
    batches: Iterator[MaskedBatch],
    schedule: Schedule,
    progress: Progress = no_progress,
) -> tuple[float, ...]:
    """Pre-train a model, in place, by guessing hidden tokens for `teacher_steps`; returns the loss of each step."""

    def loss_of(batch: MaskedBatch) -> Tensor:
        return F.cross_entropy(_wide(model(batch.input_ids, batch.attention_mask, batch.chosen)), batch.targets)

    model.train()
    optimizer = _optimizer(schedule.optimizer, parameter_groups(model.named_parameters(), schedule.teacher_rate))
    share = functools.partial(linear_decay, warm_up=schedule.warm_up)
    losses = _descend("teacher", schedule.teacher_steps, optimizer, share, loss_of, batches, progress)
    model.eval()
    return losses


def transfer_layer(
    student: PreTrainingModel,
    teacher: PreTrainingModel,
    layer: int,
    batches: Iterator[MaskedBatch],
    steps: int,
    schedule: Schedule,
    progress: Progress = no_progress,
) -> tuple[float, ...]:
    """One phase of progressive transfer, in place: the student's block `layer` (from 0) follows the teacher's.

    Only blocks up to that one run. Lower blocks learn at a tenth of the rate; embeddings, head and higher blocks rest.
    """
    blocks, rate = student.mobilebert.encoder.layer, schedule.transfer_rate
    groups = [
        group
        for index in range(layer + 1)
        for group in parameter_groups(
            blocks[index].named_parameters(), rate if index == layer else rate * LOWER_LAYER_RATE
        )
    ]

    def loss_of(batch: MaskedBatch) -> Tensor:
        with torch.no_grad():
            theirs = teacher.mobilebert(batch.input_ids, batch.attention_mask, depth=layer + 1)
        ours = student.mobilebert(batch.input_ids, batch.attention_mask, depth=layer + 1)
        mask = batch.attention_mask
        features = feature_map_loss(ours.hidden[layer], theirs.hidden[layer], mask)
        return features + attention_loss(ours.scores[layer], theirs.scores[layer], mask)

    optimizer = _optimizer(schedule.optimizer, groups)
    share = functools.partial(phase_decay, warm_up=schedule.warm_up)
    return _descend(f"transfer/{layer + 1}", steps, optimizer, share, loss_of, batches, progress)


def distill_predictions(
    student: PreTrainingModel,
    teacher: PreTrainingModel,
    batches: Iterator[MaskedBatch],
    schedule: Schedule,
    progress: Progress = no_progress,
) -> tuple[float, ...]:
    """Pre-training distillation, in place: everything in the student is trained, dropout off in both."""

    def loss_of(batch: MaskedBatch) -> Tensor:
        with torch.no_grad():
            theirs = teacher(batch.input_ids, batch.attention_mask, batch.chosen)
        ours = student(batch.input_ids, batch.attention_mask, batch.chosen)
        return pretraining_distillation_loss(ours, theirs, batch.targets)

    groups = parameter_groups(student.named_parameters(), schedule.distillation_rate)
    optimizer = _optimizer(schedule.optimizer, groups)
    share = functools.partial(linear_decay, warm_up=schedule.warm_up)
    return _descend("distillation", schedule.distillation_steps, optimizer, share, loss_of, batches, progress)


def _phase_steps(total: int, layers: int) -> list[int]:
    """`total` steps over the layers, the remainder to the lowest."""
    return [total // layers + (index < total % layers) for index in range(layers)]


def distill(
    student_config: MobileBertConfig,
    teacher_config: MobileBertConfig,
    corpus: TokenCorpus,
    vocabulary: Vocabulary,
    schedule: Schedule,
    seed: int,
    progress: Progress = no_progress,
) -> Result:
    """Train a teacher, hand its knowledge to a student layer by layer, then let the student predict like it.

    The same arguments give the same student, to the last bit, on the same machine and number of threads. The global
    random state is left as it was.

    Raises:
        DistillationError: a pair that does not fit, or a loss no longer finite; the message names stage and step.
        CorpusError: too few lines to hold one out.
    """
    check_pair(student_config, teacher_config)
    if schedule.transfer_steps < student_config.num_hidden_layers:
        raise DistillationError(
            f"{schedule.transfer_steps} transfer steps are too few for {student_config.num_hidden_layers} layers; "
            "give each layer at least one"
        )
    rng = np.random.default_rng(seed)
    training, held_out = split_held_out(corpus, rng)
    batches = masked_batches(training, vocabulary, schedule.batch_size, rng)
    losses: dict[str, tuple[float, ...]] = {}
    scores: dict[str, MaskedScore] = {}

    def measure(name: str, model: PreTrainingModel) -> None:
        scores[name] = score_masked(model, held_out, vocabulary, seed)

    with torch.random.fork_rng(devices=[]):  # initial weights and dropout draw from torch's global generator
        torch.manual_seed(seed)
        teacher, student = PreTrainingModel(teacher_config), PreTrainingModel(student_config).eval()
        losses["teacher"] = train_masked(teacher, batches, schedule, progress)
        measure("teacher", teacher)
        copy_from_teacher(student, teacher)
        measure("student before", student)
        phases = _phase_steps(schedule.transfer_steps, student_config.num_hidden_layers)
        for layer, steps in enumerate(phases):
            losses[f"transfer/{layer + 1}"] = transfer_layer(
                student, teacher, layer, batches, steps, schedule, progress
            )
        measure("student transferred", student)
        losses["distillation"] = distill_predictions(student, teacher, batches, schedule, progress)
        measure("student", student)
    state = {name: value.detach().clone() for name, value in student.mobilebert.state_dict().items()}
    return Result(state, losses, scores, schedule, seed)


def mean_of_last(losses: Mapping[str, tuple[float, ...]], share: float = 0.1) -> dict[str, float]:
    """Each stage's loss averaged over its last tenth: one number a stage, for a table."""
    tails = {stage: values[-max(1, int(len(values) * share)) :] for stage, values in losses.items()}
    return {stage: sum(tail) / len(tail) for stage, tail in tails.items()}
