"""The stages of a distillation: what each trains, by which loss, at which rates (Sun et al. 2020, section 3.6)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocketfed.model.config import SHARED_WITH_BERT, SHARED_WITH_TEACHER, MobileBertConfig
from pocketfed.model.lamb import Lamb, parameter_groups
from pocketfed.model.mobilebert import Encoded
from pocketfed.model.objectives import (
    attention_loss,
    feature_map_loss,
    masked_language_loss,
    next_sentence_loss,
    pretraining_distillation_loss,
    sentence_loss,
)
from pocketfed.model.pretraining import MaskedBatch
from pocketfed.model.schedules import (
    DistillationError,
    Schedule,
    layer_rates,
    linear_decay,
    phase_decay,
    phase_of,
    phase_steps,
)
from pocketfed.model.teacher import FeatureTeacher, PreTrainingModel, Teacher


def check_pair(student: MobileBertConfig, teacher: MobileBertConfig, attention: bool = True) -> None:
    """Raises DistillationError unless each student layer has a layer of the teacher to follow.

    Args:
        attention: attention maps are compared too, head by head.
    """
    shared = SHARED_WITH_TEACHER if teacher.use_bottleneck else SHARED_WITH_BERT
    for name in shared:
        if name == "num_attention_heads" and not attention:
            continue
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if ours != theirs:
            remedy = "set both" if teacher.use_bottleneck else f"set the student's to {theirs}"
            if name == "num_attention_heads":
                remedy += ", or schedule.attention=false"
            raise DistillationError(
                f"the student's {name} is {ours} and the teacher's is {theirs}; transfer needs them equal, so {remedy}"
            )
    if teacher.num_hidden_layers % student.num_hidden_layers:
        raise DistillationError(
            f"the student has {student.num_hidden_layers} layers and the teacher {teacher.num_hidden_layers}; give the "
            "student as many, or a divisor of them"
        )


def check_reading(teacher: MobileBertConfig, length: int, pairs: bool) -> None:
    """Raises DistillationError unless the teacher has positions for texts so long, and types for the segments of pairs."""
    if length > teacher.max_position_embeddings:
        most = teacher.max_position_embeddings
        raise DistillationError(
            f"texts have up to {length} tokens and the teacher reads {most}; shorten them with schedule.max_length={most}"
        )
    if pairs and teacher.type_vocab_size < 2:
        raise DistillationError(
            "the teacher has one type of token and cannot tell the segments of a pair apart; set schedule.pairs=false"
        )


class Stage(ABC):
    """Some steps on one model. `groups` are the optimizer's; `rates(step)` gives one rate a group, or one for all."""

    name: str
    number: int  # keeps the stages' batches apart
    steps: int
    trained: PreTrainingModel

    @abstractmethod
    def groups(self) -> list[dict[str, Any]]: ...

    @abstractmethod
    def rates(self, step: int) -> list[float]: ...

    @abstractmethod
    def loss(self, batch: MaskedBatch, step: int) -> Tensor: ...

    def label(self, step: int) -> str:
        """The stage, and what of it a step belongs to."""
        return self.name


@dataclass
class MaskedWords(Stage):
    """Pre-training without a teacher: hidden tokens and, where there are pairs, next sentences."""

    trained: PreTrainingModel
    name: str
    number: int
    steps: int
    peak: float
    warm_up: float

    def groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.trained.named_parameters(), self.peak)

    def rates(self, step: int) -> list[float]:
        return [self.peak * linear_decay(step, self.steps, self.warm_up)]

    def loss(self, batch: MaskedBatch, step: int) -> Tensor:
        words, pairs = self.trained(batch.input_ids, batch.attention_mask, batch.chosen, batch.token_type_ids)
        return masked_language_loss(words, batch.targets) + next_sentence_loss(pairs, batch.next_sentence)


@dataclass
class Transfer(Stage):
    """Knowledge transfer of block outputs and attention maps: layer after layer (progressive) or all at once (joint).

    Progressive: only blocks up to the phase's run; its block learns at the full rate, lower ones at a tenth, higher ones,
    embeddings and heads rest.
    """

    trained: PreTrainingModel
    teacher: Teacher
    schedule: Schedule
    number: int = 2
    name: str = "transfer"

    def __post_init__(self) -> None:
        self.steps = self.schedule.transfer_steps
        self.layers = self.trained.config.num_hidden_layers
        self.phases = phase_steps(self.steps, self.layers)
        self.progressive = self.schedule.strategy == "progressive"
        self._of_layer: list[int] = []  # the layer of each group
        if self.progressive and self.steps < self.layers:
            raise DistillationError(
                f"{self.steps} transfer steps are too few for {self.layers} layers; give each layer at least one"
            )

    def label(self, step: int) -> str:
        return f"{self.name}/{phase_of(step, self.phases)[0] + 1}" if self.progressive else self.name

    def groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = []
        self._of_layer = []
        for layer, block in enumerate(self.trained.mobilebert.encoder.layer):
            learning = list(block.named_parameters())
            if layer == 0 and not self.teacher.config.use_bottleneck:  # its embeddings were approximated, not copied
                learning += self.trained.mobilebert.embeddings.named_parameters()
            mine = parameter_groups(learning, self.schedule.transfer_rate)
            groups += mine
            self._of_layer += [layer] * len(mine)
        return groups

    def rates(self, step: int) -> list[float]:
        peak, warm_up = self.schedule.transfer_rate, self.schedule.phase_warm_up
        if not self.progressive:
            return [peak * phase_decay(step, self.steps, warm_up)]
        of_layer = layer_rates(step, self.phases, peak, warm_up)
        return [of_layer[layer] for layer in self._of_layer]

    def loss(self, batch: MaskedBatch, step: int) -> Tensor:
        if not self.progressive:
            ours, theirs = encode_both(self.trained, self.teacher, batch)
            return transfer_loss(ours, theirs, batch.attention_mask, self.schedule, range(self.layers))
        layer, _ = phase_of(step, self.phases)
        ours, theirs = encode_both(self.trained, self.teacher, batch, layer + 1)
        return transfer_loss(ours, theirs, batch.attention_mask, self.schedule, [layer])


@dataclass
class Predictions(Stage):
    """Pre-training distillation: everything in the student learns to predict as the teacher does, dropout off in both.

    With `transfer` the losses of all layers are added (auxiliary knowledge transfer).
    """

    trained: PreTrainingModel
    teacher: PreTrainingModel
    schedule: Schedule
    steps: int
    transfer: bool = False
    number: int = 3
    name: str = "distillation"

    def groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.trained.named_parameters(), self.schedule.distillation_rate)

    def rates(self, step: int) -> list[float]:
        return [self.schedule.distillation_rate * linear_decay(step, self.steps, self.schedule.warm_up)]

    def loss(self, batch: MaskedBatch, step: int) -> Tensor:
        ours, theirs = encode_both(self.trained, self.teacher, batch)
        with torch.no_grad():
            target = self.teacher.predict(theirs.last[batch.chosen])
        words = self.trained.predict(ours.last[batch.chosen])
        related = self.trained.relate(ours.last, batch.attention_mask)
        loss = pretraining_distillation_loss(words, target, batch.targets)
        loss = loss + next_sentence_loss(related, batch.next_sentence)
        if self.transfer:
            layers = range(self.trained.config.num_hidden_layers)
            loss = loss + transfer_loss(ours, theirs, batch.attention_mask, self.schedule, layers)
        return loss


@dataclass
class Representations(Stage):
    """The last stage under a teacher that predicts nothing: everything in the student learns to represent texts as it does.

    Feature maps and attention of all layers, and the vector of the whole text.
    """

    trained: PreTrainingModel
    teacher: FeatureTeacher
    schedule: Schedule
    steps: int
    number: int = 3
    name: str = "representations"

    def groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.trained.mobilebert.named_parameters(), self.schedule.distillation_rate)

    def rates(self, step: int) -> list[float]:
        return [self.schedule.distillation_rate * linear_decay(step, self.steps, self.schedule.warm_up)]

    def loss(self, batch: MaskedBatch, step: int) -> Tensor:
        ours, theirs = encode_both(self.trained, self.teacher, batch)
        mask, layers = batch.attention_mask, range(self.trained.config.num_hidden_layers)
        loss = transfer_loss(ours, theirs, mask, self.schedule, layers)
        if self.schedule.sentence_weight:
            vectors = (
                self.trained.mobilebert.pool_tokens(ours.last, mask),
                self.teacher.mobilebert.pool_tokens(theirs.last, mask),
            )
            loss = loss + self.schedule.sentence_weight * sentence_loss(*vectors)
        return loss


def encode_both(
    student: PreTrainingModel, teacher: Teacher, batch: MaskedBatch, depth: int | None = None
) -> tuple[Encoded, Encoded]:
    """Student and, without gradient, teacher on a batch, up to the student's block `depth`.

    A teacher without a head for hidden words has not learnt what to make of them: both read the whole text.
    """
    if isinstance(teacher, FeatureTeacher):
        batch = batch.whole()
    ratio = teacher.config.num_hidden_layers // student.config.num_hidden_layers
    inputs = (batch.input_ids, batch.attention_mask, batch.token_type_ids)
    with torch.no_grad():
        theirs = teacher.mobilebert(*inputs, depth=None if depth is None else depth * ratio)
    return student.mobilebert(*inputs, depth=depth), theirs


def transfer_loss(ours: Encoded, theirs: Encoded, mask: Tensor, schedule: Schedule, layers: Sequence[int]) -> Tensor:
    """Feature-map and attention losses, mean over `layers`; of a deeper teacher every r-th layer is followed."""
    ratio = len(theirs.hidden) // len(ours.hidden)
    total = ours.last.new_zeros(())
    for layer in layers:
        source = (layer + 1) * ratio - 1
        if schedule.feature_maps:
            total = total + feature_map_loss(ours.hidden[layer], theirs.hidden[source], mask)
        if schedule.attention:
            total = total + attention_loss(ours.scores[layer], theirs.scores[source], mask)
    return total / len(layers)


def make_optimizer(kind: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if kind == "lamb":
        return Lamb(groups, lr=0.0)  # each group brings its own rate
    plain = [{key: value for key, value in group.items() if key != "adapt"} for group in groups]
    # 0.98: a run of hundreds of steps is over before an average over a thousand has settled.
    return torch.optim.AdamW(plain, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=True)


def student_stages(student: PreTrainingModel, teacher: Teacher | None, schedule: Schedule) -> list[Stage]:
    """What a student goes through after its teacher is ready, by the schedule's strategy.

    Raises:
        DistillationError: nothing that the student could learn from this teacher.
    """
    if teacher is None or schedule.strategy == "none":
        peak, warm_up = schedule.distillation_rate, schedule.warm_up
        return [MaskedWords(student, "masked words", 3, schedule.student_steps, peak, warm_up)]
    transferred = bool((schedule.feature_maps or schedule.attention) and schedule.transfer_steps)
    if isinstance(teacher, FeatureTeacher):
        if not (schedule.feature_maps or schedule.attention or schedule.sentence_weight):
            raise DistillationError(
                "feature_maps and attention are false and sentence_weight is 0, and the teacher has no pre-training heads: "
                "nothing is left to learn from it, so turn one on"
            )
        if schedule.strategy == "auxiliary" or not transferred:
            return [Representations(student, teacher, schedule, schedule.student_steps)]
        transfer = Transfer(student, teacher, schedule)
        return [transfer, Representations(student, teacher, schedule, schedule.distillation_steps)]
    if schedule.strategy == "auxiliary":
        return [Predictions(student, teacher, schedule, schedule.student_steps, transfer=True)]
    after: list[Stage] = [Predictions(student, teacher, schedule, schedule.distillation_steps)]
    if not transferred:
        return [Predictions(student, teacher, schedule, schedule.student_steps)]
    return [Transfer(student, teacher, schedule), *after]
