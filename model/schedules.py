"""How long a distillation trains what, and at which rate (Sun et al. 2020, sections 3.6 and 4.2)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

LOWER_LAYER_RATE = 0.1  # layers already transferred go on learning, ten times slower
STRATEGIES = ("progressive", "joint", "auxiliary", "none")
PRECISIONS = ("float32", "bfloat16")
LEAST_LENGTH = 8  # tokens of a text: three are special, and a hidden word needs others around it


class DistillationError(RuntimeError):
    """A distillation that cannot be set up, or one that went wrong on the way."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast. Steps are batches of `batch_size` texts; rates are peaks, after warm-up.

    strategy: "progressive" transfers layer after layer, then distils predictions; "joint" transfers all layers at once,
    then distils; "auxiliary" does both together for all steps; "none" has no teacher: the student guesses hidden tokens
    for as many steps as the others take. The four give a student the same number of steps.
    """

    teacher_steps: int
    transfer_steps: int  # all layers together
    distillation_steps: int
    batch_size: int
    teacher_rate: float
    transfer_rate: float
    distillation_rate: float
    warm_up: float = 0.1  # share of a stage
    phase_warm_up: float = 0.1  # share of a layer's phase
    optimizer: Literal["lamb", "adamw"] = "lamb"  # LAMB pays with batches of thousands; small ones want AdamW
    strategy: str = "progressive"
    feature_maps: bool = True
    attention: bool = True
    pairs: bool = True  # next-sentence prediction, where a text has two sentences
    whole_words: bool = False  # hide words rather than pieces
    most_hidden: int = 0  # tokens of a text; 0 for 15 % of however many
    accumulate: int = 1  # parts of a batch whose gradients are averaged
    precision: str = "float32"
    max_length: int = 0  # tokens; 0 for the model's
    teacher_batch_size: int = 0  # while the teacher is trained; 0 for `batch_size`
    sentence_weight: float = (
        10.0  # of the loss between whole texts' vectors, under a teacher without pre-training heads
    )

    def __post_init__(self) -> None:
        for name, allowed in (
            ("optimizer", ("lamb", "adamw")),
            ("strategy", STRATEGIES),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in allowed:
                raise DistillationError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        least = {"teacher_steps": 1, "transfer_steps": 0, "distillation_steps": 1, "batch_size": 1, "accumulate": 1}
        for name, low in (least | {"max_length": 0, "teacher_batch_size": 0, "most_hidden": 0}).items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise DistillationError(f"{name} is {value!r}; it must be a whole number of at least {low}")
        if 0 < self.max_length < LEAST_LENGTH:
            raise DistillationError(
                f"max_length is {self.max_length} and texts of so few tokens teach nothing, three being special; set at least "
                f"{LEAST_LENGTH}, or 0 for the model's own"
            )
        for name in ("teacher_rate", "transfer_rate", "distillation_rate"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
                raise DistillationError(f"{name} is {value!r}; it must be a positive number, such as 0.003")
        weight = self.sentence_weight
        if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 <= weight < math.inf:
            raise DistillationError(f"sentence_weight is {weight!r}; it must be a number of at least 0, such as 10")
        for name in ("warm_up", "phase_warm_up"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
                raise DistillationError(f"{name} is {value!r}; it must be a share of a stage, such as 0.1")
        for name in ("feature_maps", "attention", "pairs", "whole_words"):
            if not isinstance(getattr(self, name), bool):
                raise DistillationError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        for size in (self.batch_size, self.teacher_batch_size):
            if size % self.accumulate:
                raise DistillationError(
                    f"a batch of {size} cannot be cut into {self.accumulate} equal parts; choose a divisor"
                )

    @property
    def student_steps(self) -> int:
        return self.transfer_steps + self.distillation_steps

    @property
    def steps(self) -> int:
        return (0 if self.strategy == "none" else self.teacher_steps) + self.student_steps

    def scaled(self, steps: int, layers: int, taught_first: bool = True) -> Schedule:
        """The same schedule over `steps` in all, its stages in proportion.

        Args:
            taught_first: a teacher is trained first, and has its share of them; else all are the student's.

        Raises:
            DistillationError: fewer than a step for the teacher, for each layer and for the distillation.
        """
        # Only a phase for each layer needs a step for each; where none is to be transferred, none is.
        layers = layers if self.transfer_steps and self.strategy == "progressive" else 0
        others = 2 if taught_first else 1
        if steps < layers + others:
            raise DistillationError(f"{steps} steps are too few; {layers} layers need at least {layers + others}")
        whole = self.student_steps + (self.teacher_steps if taught_first else 0)
        transfer = min(max(layers, round(steps * self.transfer_steps / whole)), steps - others)
        if not taught_first:
            return dataclasses.replace(self, transfer_steps=transfer, distillation_steps=steps - transfer)
        distillation = min(max(1, round(steps * self.distillation_steps / whole)), steps - transfer - 1)
        teacher = steps - transfer - distillation
        return dataclasses.replace(
            self, teacher_steps=teacher, transfer_steps=transfer, distillation_steps=distillation
        )


# Sun et al. 2020, section 4.2, and google-research/mobilebert, on sequences of 512: 740,000 steps of the student, of which 24 phases
# of 10,000 transfer a layer each at three times the rate, and a teacher of 500,000 before. A TPU pod's work, kept as it is.
REFERENCE_SCHEDULE = Schedule(
    teacher_steps=500_000,
    transfer_steps=240_000,
    distillation_steps=500_000,
    batch_size=2048,
    teacher_rate=1.5e-3,
    transfer_rate=4.5e-3,
    distillation_rate=1.5e-3,
    warm_up=0.02,  # 10,000 steps
    teacher_batch_size=4096,
    most_hidden=20,
)
# The reference at a fifth of the steps, a quarter of the texts and half of their length, at rates smaller by the square root of
# a quarter (You et al. 2020, section 4.3): 5.1e18 FLOPs, which at 60e12 a second, a sixteenth of an H100's bfloat16 peak, are
# 23 hours. No GPU has run it yet: `--dry-run` says what it takes on a given one.
MINI_SCHEDULE = Schedule(
    teacher_steps=100_000,
    transfer_steps=48_000,
    distillation_steps=100_000,
    batch_size=512,
    teacher_rate=7.5e-4,
    transfer_rate=2.25e-3,
    distillation_rate=7.5e-4,
    warm_up=0.02,
    precision="bfloat16",
    accumulate=2,  # what a teacher keeps for its backward pass is then some 35 GB, by counting
)
# The teacher's part of the reference alone: hidden words and next sentences.
PRETRAINING_SCHEDULE = dataclasses.replace(
    REFERENCE_SCHEDULE, strategy="none", transfer_steps=0, batch_size=4096, teacher_batch_size=0
)
SCHEDULES: dict[str, Schedule] = {
    "bert-base": PRETRAINING_SCHEDULE,
    "bert-large": PRETRAINING_SCHEDULE,
    "ib-bert-large": PRETRAINING_SCHEDULE,
    "mini": MINI_SCHEDULE,
    # From a BERT of the same width, whose steps are none of ours. Sentences of everyday length, all losses at once; what the other
    # strategies give at this budget has not been measured.
    "pocket": Schedule(
        teacher_steps=20_000,
        transfer_steps=1_000,
        distillation_steps=3_000,
        batch_size=64,
        teacher_rate=2e-3,
        transfer_rate=2e-3,
        distillation_rate=2e-3,
        warm_up=0.05,
        optimizer="adamw",
        strategy="auxiliary",
        pairs=False,
        precision="bfloat16",
        max_length=40,
    ),
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


def phase_steps(total: int, layers: int) -> list[int]:
    """`total` steps over the layers, the remainder to the lowest."""
    return [total // layers + (index < total % layers) for index in range(layers)]


def phase_of(step: int, phases: list[int]) -> tuple[int, int]:
    """The layer (from 0) whose phase a step is in, and the step within it."""
    for layer, steps in enumerate(phases):
        if step < steps:
            return layer, step
        step -= steps
    raise ValueError(f"step {step} is after the last phase")


def layer_rates(step: int, phases: list[int], peak: float, warm_up: float) -> list[float]:
    """Progressive transfer: each layer's rate at a step. Full for the phase's layer, a tenth below, 0 above."""
    layer, within = phase_of(step, phases)
    rate = peak * phase_decay(within, phases[layer], warm_up)
    return [rate if i == layer else rate * LOWER_LAYER_RATE if i < layer else 0.0 for i in range(len(phases))]


def _warm(step: int, steps: int, warm_up: float) -> float:
    """Linear warm-up: the share of the peak rate at a step counted from 0."""
    return min(1.0, (step + 1) / max(1.0, warm_up * steps))


def linear_decay(step: int, steps: int, warm_up: float) -> float:
    """Warm-up, then down to a ten-thousandth at the end."""
    return min(_warm(step, steps, warm_up), max(1e-4, (steps - step) / steps))


def phase_decay(step: int, steps: int, warm_up: float) -> float:
    """Warm-up, then gently down to nine tenths, anew for each layer (google-research/mobilebert)."""
    return min(_warm(step, steps, warm_up), 0.9 + 0.1 * math.sqrt(1.0 - step / steps))
