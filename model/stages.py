"""The stages of a distillation: what each trains, by which loss, at which rates (Sun et al. 2020, section 3.6)."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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


Terms = list[tuple[str, Tensor]]  # each a mean over what `MaskedBatch.counts` has under that name
WHOLE = {"hidden": 1.0, "pairs": 1.0, "tokens": 1.0, "texts": 1.0}


class Stage(ABC):
    """Some steps on one model. `groups` are the optimizer's; `rates(step)` gives one rate a group."""

    name: str
    number: int  # keeps the stages' batches apart
    steps: int
    trained: PreTrainingModel
    rate_name: str  # the schedule's setting of its peak

    @abstractmethod
    def groups(self) -> list[dict[str, Any]]: ...

    @abstractmethod
    def rates(self, step: int) -> list[float]: ...

    @abstractmethod
    def terms(self, batch: MaskedBatch, step: int) -> Terms:
        """What the loss is the sum of."""

    def loss(self, batch: MaskedBatch, step: int, shares: Mapping[str, float] = WHOLE) -> Tensor:
        """With what `batch.shares_of(whole)` gives, the losses of a whole batch's parts add up to its own."""
        # A mean over nothing is left out: it is no number.
        terms = [value * shares[what] for what, value in self.terms(batch, step) if shares[what]]
        return sum(terms, torch.zeros((), device=batch.input_ids.device))

    @functools.cached_property
    def _group_count(self) -> int:
        return len(self.groups())

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
    rate_name: str = "teacher_rate"

    def groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.trained.named_parameters(), self.peak)

    def rates(self, step: int) -> list[float]:
        return [self.peak * linear_decay(step, self.steps, self.warm_up)] * self._group_count

    def terms(self, batch: MaskedBatch, step: int) -> Terms:
        words, pairs = self.trained(batch.input_ids, batch.attention_mask, batch.chosen, batch.token_type_ids)
        return [
            ("hidden", masked_language_loss(words, batch.targets)),
            ("pairs", next_sentence_loss(pairs, batch.next_sentence)),
        ]


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
    rate_name: str = "transfer_rate"

    def __post_init__(self) -> None:
        self.steps = self.schedule.transfer_steps
        self.layers = self.trained.config.num_hidden_layers
        self.phases = phase_steps(self.steps, self.layers)
        self.progressive = self.schedule.strategy == "progressive"
        if self.progressive and self.steps < self.layers:
            raise DistillationError(
                f"{self.steps} transfer steps are too few for {self.layers} layers; give each layer at least one"
            )

    def label(self, step: int) -> str:
        return f"{self.name}/{phase_of(step, self.phases)[0] + 1}" if self.progressive else self.name

    def groups(self) -> list[dict[str, Any]]:
        return [group for groups in self._groups_of_layers() for group in groups]

    def _groups_of_layers(self) -> list[list[dict[str, Any]]]:
        of_layers = []
        for layer, block in enumerate(self.trained.mobilebert.encoder.layer):
            learning = list(block.named_parameters())
            if layer == 0 and not self.teacher.config.use_bottleneck:  # its embeddings were approximated, not copied
                learning += self.trained.mobilebert.embeddings.named_parameters()
            of_layers.append(parameter_groups(learning, self.schedule.transfer_rate))
        return of_layers

    @functools.cached_property
    def _layer_of_group(self) -> list[int]:
        return [layer for layer, groups in enumerate(self._groups_of_layers()) for _ in groups]

    def rates(self, step: int) -> list[float]:
        peak, warm_up = self.schedule.transfer_rate, self.schedule.phase_warm_up
        if not self.progressive:
            return [peak * phase_decay(step, self.steps, warm_up)] * len(self._layer_of_group)
        of_layer = layer_rates(step, self.phases, peak, warm_up)
        return [of_layer[layer] for layer in self._layer_of_group]

    def terms(self, batch: MaskedBatch, step: int) -> Terms:
        layers, depth = list(range(self.layers)), None
        if self.progressive:
            layer, _ = phase_of(step, self.phases)
            layers, depth = [layer], layer + 1
        ours, theirs = encode_both(self.trained, self.teacher, batch, depth)
        return [("tokens", transfer_loss(ours, theirs, batch.attention_mask, self.schedule, layers))]


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
    rate_name: str = "distillation_rate"

    def groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.trained.named_parameters(), self.schedule.distillation_rate)

    def rates(self, step: int) -> list[float]:
        rate = self.schedule.distillation_rate * linear_decay(step, self.steps, self.schedule.warm_up)
        return [rate] * self._group_count

    def terms(self, batch: MaskedBatch, step: int) -> Terms:
        ours, theirs = encode_both(self.trained, self.teacher, batch)
        with torch.no_grad():
            target = self.teacher.predict(theirs.last[batch.chosen])
        words = self.trained.predict(ours.last[batch.chosen])
        related = self.trained.relate(ours.last, batch.attention_mask)
        terms = [
            ("hidden", pretraining_distillation_loss(words, target, batch.targets)),
            ("pairs", next_sentence_loss(related, batch.next_sentence)),
        ]
        if self.transfer:
            layers = range(self.trained.config.num_hidden_layers)
            terms.append(("tokens", transfer_loss(ours, theirs, batch.attention_mask, self.schedule, layers)))
        return terms


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
    rate_name: str = "distillation_rate"

    def groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.trained.mobilebert.named_parameters(), self.schedule.distillation_rate)

    def rates(self, step: int) -> list[float]:
        rate = self.schedule.distillation_rate * linear_decay(step, self.steps, self.schedule.warm_up)
        return [rate] * self._group_count

    def terms(self, batch: MaskedBatch, step: int) -> Terms:
        ours, theirs = encode_both(self.trained, self.teacher, batch)
        mask, layers = batch.attention_mask, range(self.trained.config.num_hidden_layers)
        terms = [("tokens", transfer_loss(ours, theirs, mask, self.schedule, layers))]
        if self.schedule.sentence_weight:
            vectors = (
                self.trained.mobilebert.pool_tokens(ours.last, mask),
                self.teacher.mobilebert.pool_tokens(theirs.last, mask),
            )
            terms.append(("texts", self.schedule.sentence_weight * sentence_loss(*vectors)))
        return terms


@contextmanager
def learning_only(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Nothing else of the model gets gradients meanwhile: they would cost time and memory, and nobody would use them."""
    learning = {id(p) for p in parameters}
    resting = [p for p in model.parameters() if p.requires_grad and id(p) not in learning]
    try:
        for p in resting:
            p.requires_grad_(False)
            p.grad = None
        yield
    finally:
        for p in resting:
            p.requires_grad_(True)


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
        steps, rate_name = schedule.student_steps, "distillation_rate"
        return [MaskedWords(student, "masked words", 3, steps, peak, warm_up, rate_name)]
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
