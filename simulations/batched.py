"""Many devices' training in one step: each keeps its own loop, only the gradients are computed together.

A device's order of examples, optimizer, clipping and stopping are those of `trainer.training`, one loop a device. The loops stop
wherever they need a gradient; then a group of them is served by one pass through the stacked student (`model/stacked.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pocketfed.coordinator import flwr_compat  # noqa: F401 - first: it silences flwr before flwr is imported

# isort: split
from flwr.app import Message

from pocketfed.client_sdk.errors import TrainingError
from pocketfed.client_sdk.flower_app import answering
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Asking, Batch
from pocketfed.coordinator.store import Store
from pocketfed.model.parameters import Vector
from pocketfed.simulations.grids import DeviceMaterial, InProcessGrid, failed

if TYPE_CHECKING:
    from pocketfed.model.stacked import StackedStudent

log = logging.getLogger("pocketfed")
TOKENS = 2048  # of one step, padding included: more are no faster
DEVICES = 64  # whose loops are open at a time: each holds theta and moments
Gradient = tuple[float, int, Vector]


@dataclass
class _Device:
    """One loop under way: what it asks for, until it has answered. seconds: of its own steps, and its share of the common ones."""

    message: Message
    asking: Asking[Message]
    asked: tuple[Vector, Batch] | None = None
    answer: Message | None = None
    seconds: float = 0.0

    def go_on(self, told: Gradient | None) -> None:
        """To the next gradient that is asked for (told: the one before), or to the end."""
        began = time.perf_counter()
        try:
            self.asked = next(self.asking) if told is None else self.asking.send(told)
        except StopIteration as ended:
            self.asked, self.answer = None, ended.value
        except TrainingError as error:
            self.asked, self.answer = None, failed(self.message, error)
        self.seconds += time.perf_counter() - began
        if self.answer is not None and not self.answer.has_error() and "seconds" in self.answer.content["metrics"]:
            self.answer.content["metrics"]["seconds"] = self.seconds  # the loop's own clock ran for all others, too


class BatchedGrid(InProcessGrid):
    """Groups of devices in one step; what the stacked student does not take runs one device after another.

    Results differ from those of one device after another by rounding only, whatever is grouped with what.

    Args:
        tokens: of one step, at most (but for one device's batch).
    """

    def __init__(
        self, store: Store, run_id: int, devices: Mapping[int, str], material: DeviceMaterial, tokens: int = TOKENS
    ) -> None:
        super().__init__(store, run_id, material.app(), devices, material.artifact_bytes)
        self.material, self.tokens = material, tokens
        self.student = stack(material.trainer)

    def work(self, messages: Sequence[Message]) -> Iterator[Message]:
        if self.student is None:
            yield from super().work(messages)
            return
        for start in range(0, len(messages), DEVICES):
            yield from self._together(self.student, messages[start : start + DEVICES])

    def _together(self, student: StackedStudent, messages: Sequence[Message]) -> list[Message]:
        trainer, local = self.material.trainer, self.material.local
        devices = [_Device(m, answering(m, self.context_of(m), trainer, local, seeded_noise=True)) for m in messages]
        for device in devices:
            device.go_on(None)
        while waiting := [device for device in devices if device.asked is not None]:
            asked = [device.asked for device in waiting if device.asked is not None]
            for group in grouped([batch for _, batch in asked], self.tokens, trainer.set.keeps_tokens):
                began = time.perf_counter()
                found = list(gradients(student, trainer, [asked[i] for i in group]))
                share = (time.perf_counter() - began) / len(group)
                for i, told in zip(group, found, strict=True):
                    waiting[i].seconds += share
                    waiting[i].go_on(told)
        return [device.answer for device in devices if device.answer is not None]


def stack(trainer: PlanTrainer) -> StackedStudent | None:
    """The student of a trainer's artifact for many thetas at once; None where its trainable set has no such form."""
    from pocketfed.client_sdk.torch_trainer import load_student
    from pocketfed.model.stacked import StackedStudent

    student = load_student(trainer.artifact, trainer.set_name)
    if not StackedStudent.takes(student):
        log.warning("%s has no batched form here: its devices train one after another", trainer.set_name)
        return None
    return StackedStudent(student)


def grouped(batches: Sequence[Batch], tokens: int, per_token: bool = True) -> list[list[int]]:
    """Which batches go into one step: of similar size, their padding counted, at most so many tokens or a single one.

    Args:
        per_token: the work grows with the length of the texts; else with their number alone.
    """
    sizes = [(b.ids.shape[1] if per_token else 1, b.ids.shape[0]) for b in batches]
    groups: list[list[int]] = []
    members: list[int] = []
    for i in sorted(range(len(batches)), key=lambda i: (batches[i].label_smoothing, sizes[i], i)):
        rows = max(sizes[j][1] for j in [*members, i])
        fits = (len(members) + 1) * rows * sizes[i][0] <= tokens  # sorted: the last is the longest
        if members and not (fits and batches[members[0]].label_smoothing == batches[i].label_smoothing):
            groups.append(members)
            members = []
        members = [*members, i]
    return [*groups, members] if members else groups


def gradients(
    student: StackedStudent, trainer: PlanTrainer, asked: Sequence[tuple[Vector, Batch]]
) -> Iterator[Gradient]:
    """Mean loss, right answers and gradient (P,) of each theta on its batch, in one step."""
    batches = [batch for _, batch in asked]
    count, rows = len(batches), max(len(b.ids) for b in batches)
    length = max(b.ids.shape[1] for b in batches)
    ids, mask = np.zeros((count, rows, length), np.int64), np.zeros((count, rows, length), np.int64)
    mask[:, :, 0] = 1  # also of what only fills up: no mean over nothing
    weights = np.zeros((count, rows), np.float32)
    first = batches[0].labels
    wide = (length,) if batches[0].per_token else first.shape[1:]
    labels = np.full((count, rows, *wide), -1 if batches[0].per_token else 0, first.dtype)
    hidden: Vector | None = None
    for i, batch in enumerate(batches):
        size, tokens = batch.ids.shape
        ids[i, :size, :tokens], mask[i, :size, :tokens] = batch.ids, batch.mask
        weights[i, :size] = 1.0 if batch.weights is None else batch.weights
        if batch.per_token:
            labels[i, :size, :tokens] = batch.labels
        else:
            labels[i, :size] = batch.labels
        if trainer.set.prefix:
            read = trainer.hidden(batch)  # (size, tokens, D) or (size, D)
            if hidden is None:
                hidden = np.zeros((count, rows, *((length,) if read.ndim == 3 else ()), read.shape[-1]), np.float32)
            hidden[(i, slice(size), slice(tokens)) if read.ndim == 3 else (i, slice(size))] = read
    theta = np.stack([theta for theta, _ in asked])
    losses, right, found = student.gradient(theta, hidden, ids, mask, labels, weights, batches[0].label_smoothing)
    for i in range(count):
        yield float(losses[i]), int(right[i]), found[i]
