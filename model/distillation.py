"""Runs a distillation's stages one after the other, keeping checkpoints from which it goes on to the same bits."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pocketfed.model.config import MobileBertConfig
from pocketfed.model.divergence import LONG, has_diverged, is_calm
from pocketfed.model.places import Place
from pocketfed.model.pretraining import Batches, FeatureScore, MaskedScore, score_features, score_masked
from pocketfed.model.schedules import DistillationError, Schedule
from pocketfed.model.stages import MaskedWords, Stage, check_pair, learning_only, make_optimizer, student_stages
from pocketfed.model.teacher import FeatureTeacher, PreTrainingModel, Teacher, copy_from_teacher, make_teacher
from pocketfed.model.token_store import TokenCorpus, split_held_out
from pocketfed.model.tokenization import Vocabulary

log = logging.getLogger(__name__)
Score = MaskedScore | FeatureScore
GRADIENT_NORM = 1.0
CHECKPOINT = "checkpoint.safetensors"
SAVE_EVERY_S = 60.0
RATES = (
    "teacher_rate",
    "transfer_rate",
    "distillation_rate",
)  # may change between a checkpoint and what goes on from it


@dataclass(frozen=True)
class Tick:
    """After a step. tokens: real ones of all steps so far, in all processes; tokens_per_s: over the last steps."""

    stage: str
    step: int  # of the stage, from 1
    steps: int
    loss: float  # of that step, as are the next two
    gradient_norm: float  # before it was clipped
    rate: float  # the highest of all groups'
    tokens: int
    tokens_per_s: float
    seconds_left: float  # of all stages, at the pace of this one


Progress = Callable[[Tick], None]


@dataclass(frozen=True)
class Result:
    """A distilled student and how it came about.

    student: its tensors, named as in `MobileBert`. losses: one value a step, by stage ("teacher", "transfer/1", ...,
    "distillation" or "representations"). scores: on held-out text, of "teacher", "student before", "student transferred" and
    "student"; under a teacher without pre-training heads, of the student beside it.
    """

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    losses: dict[str, tuple[float, ...]]
    scores: dict[str, Score]
    schedule: Schedule
    seed: int
    seconds: float  # of this process; what went before an interruption does not count
    changes: tuple[str, ...] = ()  # of rates, when the run went on from a checkpoint


def no_progress(tick: Tick) -> None:
    """For callers that do not watch."""


class Distillation:
    """One run, from its arguments or from the checkpoint it left.

    Args:
        teacher: a trained one to learn from; without it, one is trained first.
        folder: for checkpoints; None keeps none.

    Raises:
        DistillationError: a pair that does not fit, or batches too small for so many processes and parts.
        CorpusError: too little text to hold some out.
    """

    def __init__(
        self,
        student_config: MobileBertConfig,
        teacher_config: MobileBertConfig,
        corpus: TokenCorpus,
        vocabulary: Vocabulary,
        schedule: Schedule,
        seed: int,
        teacher: Mapping[str, Tensor] | None = None,
        folder: Path | None = None,
        place: Place | None = None,
        progress: Progress = no_progress,
        save_every_s: float = SAVE_EVERY_S,
    ) -> None:
        check_pair(student_config, teacher_config, schedule.attention)
        self.schedule, self.seed, self.folder, self.place = schedule, seed, folder, place or Place()
        self.progress = progress if self.place.first else no_progress
        self.save_every_s = save_every_s
        training, held_out = split_held_out(corpus, np.random.default_rng(seed))
        how: dict[str, Any] = {
            "pairs": schedule.pairs,
            "whole_words": schedule.whole_words,
            "most_hidden": schedule.most_hidden,
        }
        least, larger = self.place.ranks * schedule.accumulate, schedule.teacher_batch_size
        fewest = min(len(training), schedule.batch_size, larger or schedule.batch_size)
        if fewest < least:
            raise DistillationError(
                f"{fewest} texts cannot be shared by {self.place.ranks} processes in {schedule.accumulate} parts each; give a "
                "larger corpus and schedule.batch_size, or fewer processes and a smaller schedule.accumulate"
            )
        self.batches = Batches(training, vocabulary, schedule.batch_size, seed, least=least, **how)
        self.teacher_batches = replace(self.batches, batch_size=larger) if larger else self.batches
        self.held_out = Batches(held_out, vocabulary, schedule.batch_size, seed, **how)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.teacher: Teacher = (
                PreTrainingModel(teacher_config) if teacher is None else make_teacher(teacher_config, teacher)
            )
            self.teacher.to(self.place.device)
            self.student = PreTrainingModel(student_config).to(self.place.device).eval()
        self._given = teacher is not None  # then no checkpoint need hold it
        if teacher is not None:
            self.teacher.load_state_dict(teacher)
        self.teacher.eval()
        alone = schedule.strategy == "none"
        self.stages: list[Stage] = []
        if not self._given and not alone and isinstance(self.teacher, PreTrainingModel):
            steps, rate = schedule.teacher_steps, schedule.teacher_rate
            self.stages.append(MaskedWords(self.teacher, "teacher", 1, steps, rate, schedule.warm_up))
        self.stages += student_stages(self.student, None if alone else self.teacher, schedule)
        self.losses: dict[str, list[float]] = {}
        self.scores: dict[str, Score] = {}
        self._stage, self._step, self._tokens = 0, 0, 0
        self._changes: list[str] = []
        self._identity = _identity(student_config, teacher_config, schedule, seed, corpus, vocabulary, teacher)

    # ---- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> Result:
        """Train to the end, from wherever the checkpoint stands; the same arguments give the same bits on a CPU.

        Raises:
            DistillationError: a loss no longer finite, or far above where its stage began (the message names stage and step;
                the last good checkpoint stays, and a run with lower rates goes on from it); a checkpoint of another run.
        """
        begun = time.monotonic()
        state = self._resume()
        with torch.random.fork_rng(devices=[]):
            while self._stage < len(self.stages):
                stage = self.stages[self._stage]
                if self._step == 0:
                    self._before(stage)
                self._train(stage, state)
                state = None
                self._after(stage)
                self._stage, self._step = self._stage + 1, 0
        student = {n: v.detach().cpu().clone() for n, v in self.student.mobilebert.state_dict().items()}
        teacher = {n: v.detach().cpu().clone() for n, v in self.teacher.state_dict().items()}
        losses = {name: tuple(values) for name, values in self.losses.items()}
        seconds, changes = time.monotonic() - begun, tuple(self._changes)
        return Result(student, teacher, losses, self.scores, self.schedule, self.seed, seconds, changes)

    def _before(self, stage: Stage) -> None:
        if stage.trained is self.student and not self.scores.get("student before"):
            if self.schedule.strategy != "none":
                if isinstance(self.teacher, PreTrainingModel):
                    self.scores.setdefault("teacher", score_masked(self.teacher, self.held_out))
                copy_from_teacher(self.student, self.teacher)
            self.scores["student before"] = self._score(self.student)

    def _after(self, stage: Stage) -> None:
        name = "teacher" if stage.trained is self.teacher else "student"
        score = self._score(stage.trained)
        values = [value for value in asdict(score).values() if value is not None]
        finite = all(bool(torch.isfinite(value).all()) for value in stage.trained.state_dict().values())
        if not finite or not all(map(math.isfinite, values)):
            raise DistillationError(
                f"{stage.name}: after its last step, {stage.steps}, the weights are useless (on held-out text: {score}); "
                f"{self._remedy(stage)}"
            )
        self.scores[f"{name} transferred" if stage.name == "transfer" else name] = score

    def _score(self, model: PreTrainingModel) -> Score:
        teacher = self.teacher
        return (
            score_features(model, teacher, self.held_out)
            if self._followed(teacher)
            else score_masked(model, self.held_out)
        )

    def _followed(self, teacher: Teacher) -> TypeGuard[FeatureTeacher]:
        """Whether scores are of a student beside a teacher that predicts nothing."""
        return isinstance(teacher, FeatureTeacher) and self.schedule.strategy != "none"

    def _train(self, stage: Stage, optimizer_state: Mapping[str, Tensor] | None) -> None:
        optimizer = make_optimizer(self.schedule.optimizer, stage.groups())
        if optimizer_state:
            _restore_optimizer(optimizer, optimizer_state)
        # The paper's recipe has dropout off while a student follows its teacher, on while a model learns by itself.
        stage.trained.train(isinstance(stage, MaskedWords))
        saved = time.monotonic()
        pace = _Pace()
        with learning_only(stage.trained, _parameters(optimizer)):
            while self._step < stage.steps:
                rates = stage.rates(self._step)
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate
                label = stage.label(self._step)
                loss, norm, tokens = self._descend(stage, optimizer)
                self._check(stage, label, self._step + 1, loss, norm)
                # Now the weights are known to be good: a checkpoint made after a step could hold what the next one dies of.
                due = self.folder is not None and time.monotonic() - saved >= self.save_every_s
                if due and is_calm(self.losses.get(label, []), loss):
                    self.save(optimizer)
                    saved = time.monotonic()
                optimizer.step()
                self._step += 1
                self._tokens += tokens
                self.losses.setdefault(label, []).append(loss)
                if self._step == stage.steps or stage.label(self._step) != label:
                    self._check(stage, label, self._step, self._loss_now(stage))  # no further step would tell
                pace.add(tokens)
                left = stage.steps - self._step + sum(later.steps for later in self.stages[self._stage + 1 :])
                self.progress(
                    Tick(
                        label,
                        self._step,
                        stage.steps,
                        loss,
                        norm,
                        max(rates),
                        self._tokens,
                        pace.tokens_per_s,
                        left * pace.seconds_a_step,
                    )
                )
        stage.trained.eval()

    def _check(self, stage: Stage, label: str, step: int, loss: float, norm: float | None = None) -> None:
        """Raises DistillationError where a step's loss or gradient says that the weights have run away."""
        where = f"{label}: the loss is {loss:g}"
        if not (math.isfinite(loss) and math.isfinite(norm or 0.0)):
            gradient = "" if norm is None else f" and the gradient's norm {norm:g}"
            raise DistillationError(f"{where}{gradient} at step {step} of {stage.steps}; {self._remedy(stage)}")
        before = self.losses.get(label, [])
        if before and has_diverged(before[0], [*before[1 - LONG :], loss]):
            raise DistillationError(
                f"{where} at step {step} of {stage.steps}, far above the {before[0]:g} that it began with; {self._remedy(stage)}"
            )

    def _remedy(self, stage: Stage) -> str:
        rate = f"schedule.{stage.rate_name}"
        remedy = f"use a lower rate ({rate} is {getattr(self.schedule, stage.rate_name):g})"
        if stage.trained.config.normalization_type != "layer_norm":
            remedy += ", or a student with normalization_type layer_norm"
        if self.folder is None or not (self.folder / CHECKPOINT).is_file():
            return remedy
        return f"{remedy}; with a lower {rate} the same command goes on from the last good checkpoint"

    def _descend(self, stage: Stage, optimizer: torch.optim.Optimizer) -> tuple[float, float, int]:
        """Gradients of one step, clipped. Returns its loss, the gradient's norm before, its tokens."""
        optimizer.zero_grad(set_to_none=True)
        loss, tokens = self._pass(stage, self._step)
        loss = self._add_up(_parameters(optimizer, moving=True), loss)
        norm = float(nn.utils.clip_grad_norm_(_parameters(optimizer), GRADIENT_NORM))
        return loss, norm, tokens

    @torch.no_grad()
    def _loss_now(self, stage: Stage) -> float:
        """The loss on the last step's batch with the weights as they are after it."""
        loss, _ = self._pass(stage, self._step - 1)
        return self._add_up([], loss)

    def _pass(self, stage: Stage, step: int) -> tuple[float, int]:
        """This process's share of a step's loss and, unless gradients are off, of its gradients; and the whole batch's tokens."""
        whole = self.batches_of(stage).batch(step, stage.number)
        # A step's dropout depends on where it is, not on how the process came there.
        torch.manual_seed(_mix(self.seed, stage.number, step, self.place.rank))
        mine = whole.rows(slice(self.place.rank, None, self.place.ranks)) if self.place.ranks > 1 else whole
        total = 0.0
        for part in mine.split(self.schedule.accumulate):
            with self.precision():
                loss = stage.loss(part.to(self.place.device), step, part.shares_of(whole))
            if loss.requires_grad:
                loss.backward()
            total += float(loss.detach())
        return total, int(whole.attention_mask.sum())

    def batches_of(self, stage: Stage) -> Batches:
        return self.teacher_batches if stage.trained is self.teacher else self.batches

    def precision(self) -> AbstractContextManager[Any]:
        if self.schedule.precision == "bfloat16":
            return torch.autocast(self.place.device.type, torch.bfloat16)
        return nullcontext()

    def _add_up(self, parameters: Sequence[nn.Parameter], loss: float) -> float:
        """Sums over processes, of the gradients in place and of the loss: each has its share of the batch's."""
        if self.place.ranks == 1:
            return loss
        # A part in which nothing is hidden has no gradient where the others have one.
        some = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        had = torch.tensor([float(p.grad is not None) for p in parameters] + [loss], device=self.place.device)
        flat = torch.cat([gradient.reshape(-1) for gradient in some] + [had])
        self.place.add_up(flat)
        at = 0
        for p, gradient, anywhere in zip(parameters, some, flat[-len(had) : -1].tolist(), strict=True):
            if anywhere:
                p.grad = gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
            at += gradient.numel()
        return float(flat[-1])

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def save(self, optimizer: torch.optim.Optimizer) -> None:
        """Write the checkpoint beside the last one, then in its place: a full disk leaves the last one.

        Raises:
            DistillationError: it cannot be written.
        """
        if self.folder is None or not self.place.first:
            return
        tensors = {f"student.{n}": v for n, v in self.student.state_dict().items()}
        if not self._given:
            tensors |= {f"teacher.{n}": v for n, v in self.teacher.state_dict().items()}
        tensors |= _optimizer_tensors(optimizer)
        tensors |= {f"losses.{n}": torch.tensor(v, dtype=torch.float64) for n, v in self.losses.items()}
        where = {
            "identity": self._identity,
            "stage": self._stage,
            "step": self._step,
            "tokens": self._tokens,
            "scores": {name: asdict(score) for name, score in self.scores.items()},
            "labels": list(self.losses),
            "rates": {name: getattr(self.schedule, name) for name in RATES},
            "changes": self._changes,
        }
        path = self.folder / CHECKPOINT
        partial = path.with_suffix(".partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            held = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            save_file(held, partial, metadata={"where": json.dumps(where)})
            with partial.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise DistillationError(
                f"the checkpoint cannot be written to {path}: {getattr(error, 'strerror', None) or error}; the one before is "
                "still there, so free some space and start again"
            ) from None

    def _resume(self) -> Mapping[str, Tensor] | None:
        """Take up the checkpoint of this very run, if there is one. Returns its optimizer's tensors."""
        path = None if self.folder is None else self.folder / CHECKPOINT
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                where = json.loads(file.metadata()["where"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            if where["identity"] != self._identity:
                raise DistillationError(
                    f"{path} is of a run with another corpus, seed, schedule, geometry or teacher; delete its folder, or use another"
                )
            for prefix, model in (("student.", self.student), ("teacher.", self.teacher)):
                if model is self.teacher and self._given:
                    continue
                model.load_state_dict({n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)})
            self._stage, self._step, self._tokens = (int(where[key]) for key in ("stage", "step", "tokens"))
            kind = FeatureScore if self._followed(self.teacher) else MaskedScore
            self.scores = {name: kind(**score) for name, score in where["scores"].items()}
            self.losses = {label: tensors[f"losses.{label}"].tolist() for label in where["labels"]}
            self._changes = [str(change) for change in where["changes"]]
            for name in RATES:
                before, now = float(where["rates"][name]), getattr(self.schedule, name)
                if before != now:
                    at = f"step {self._step} of {self.stages[self._stage].name}"
                    self._changes.append(f"schedule.{name} was {before:g} until {at} and is {now:g} from there")
                    if self.place.first:
                        log.warning("going on from %s: %s", path, self._changes[-1])
            return {n: v for n, v in tensors.items() if n.startswith("optimizer.")}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, DistillationError):
                raise
            raise DistillationError(f"{path} is damaged ({error}); delete it, and the run begins anew") from None


class _Pace:
    """Speed over the last steps."""

    def __init__(self, steps: int = 50) -> None:
        self._most = steps
        self._marks: list[tuple[float, int]] = [(time.monotonic(), 0)]

    def add(self, tokens: int) -> None:
        self._marks.append((time.monotonic(), self._marks[-1][1] + tokens))
        del self._marks[: -self._most - 1]

    @property
    def _span(self) -> tuple[float, int]:
        (t0, n0), (t1, n1) = self._marks[0], self._marks[-1]
        return max(t1 - t0, 1e-9), n1 - n0

    @property
    def tokens_per_s(self) -> float:
        seconds, tokens = self._span
        return tokens / seconds

    @property
    def seconds_a_step(self) -> float:
        return self._span[0] / max(1, len(self._marks) - 1)


def _parameters(optimizer: torch.optim.Optimizer, moving: bool = False) -> list[nn.Parameter]:
    """All that are in its groups; `moving`: in those whose rate is not 0."""
    return [p for group in optimizer.param_groups if group["lr"] or not moving for p in group["params"]]


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    held = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{name}": torch.as_tensor(v) for i, state in held.items() for name, v in state.items()}


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        _, index, name = key.split(".", 2)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _mix(*numbers: int) -> int:
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def _identity(
    student: MobileBertConfig,
    teacher: MobileBertConfig,
    schedule: Schedule,
    seed: int,
    corpus: TokenCorpus,
    vocabulary: Vocabulary,
    given: Mapping[str, Tensor] | None,
) -> str:
    """Of two runs that have it in common, one can go on with the other's checkpoint: all but the rates, which may be lowered."""
    kept = {name: value for name, value in asdict(schedule).items() if name not in RATES}
    content = [student.to_dict(), teacher.to_dict(), kept, seed, vocabulary.digest(), given is not None]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(corpus.chunks).tobytes())
    for shard in corpus.shards:
        digest.update(np.ascontiguousarray(shard.sentences).tobytes())
    for name in sorted(given or {}):  # another teacher of the same size is another run
        digest.update(name.encode() + (given or {})[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def mean_of_last(losses: Mapping[str, tuple[float, ...]], share: float = 0.1) -> dict[str, float]:
    """Each stage's loss averaged over its last tenth: one number a stage, for a table."""
    tails = {stage: values[-max(1, int(len(values) * share)) :] for stage, values in losses.items()}
    return {stage: sum(tail) / len(tail) for stage, tail in tails.items()}
