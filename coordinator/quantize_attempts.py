"""A model tried with one scheme after another: what each would weigh, and what it costs layers and a task."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is imported only where models are read
    from pocketfed.model.checkpoints import Checkpoint
    from pocketfed.model.downstream import Trial
    from pocketfed.model.encoded import Encoded
    from pocketfed.model.heads import TextClassifier
    from pocketfed.model.quantization import TensorError
    from pocketfed.model.schemes import Scheme

Progress = Callable[[str, float], None]
HEAD_SHARE, AWARE_SHARE = 10.0, 0.5  # of the learning rate that a whole model is fine-tuned at


@dataclass(frozen=True)
class QuantizeOptions:
    """scheme: "" for int8, or with `budget` for any that needs no training.

    dev, task: data to measure on, as `read_task` reads it. calibrate: texts for the ranges of activations, by default
    those that `dev` trains on. keep, group: as in `Storage`. budget: points that the measure may lose;
    layers that lose most are then kept wider where that helps. The rest is for what is trained: the whole model (int8-qat), or
    with ten times the rate a head for a model without one; learning_rate: by default as `evaluate` has it.
    """

    scheme: str = ""
    dev: Path | None = None
    task: str = ""
    calibrate: Path | None = None
    keep: tuple[str, ...] = ()
    group: int = 64
    budget: float | None = None
    epochs: int = 3
    learning_rate: float | None = None
    batch_size: int = 32
    max_length: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Attempt:
    """A scheme tried: what would be saved, what it weighs, and what it costs where that was measured.

    digest: sha256 in hex of the stored tensors, before they are packed: the same model and scheme, the same digest.
    """

    checkpoint: Checkpoint
    bytes: int
    digest: str
    errors: dict[str, TensorError]
    outputs: dict[str, float]
    value: float | None

    def worst(self) -> list[str]:
        """Layers from the one that loses most on; by what they give where texts were read, else by their weights."""
        lost = self.outputs or {name.removesuffix(".weight"): error.relative for name, error in self.errors.items()}
        return sorted(lost, key=lambda name: (-lost[name], name))


class Attempts:
    """One model, made ready to be tried with several schemes."""

    def __init__(
        self, checkpoint: Checkpoint, schemes: Sequence[Scheme], options: QuantizeOptions, progress: Progress
    ) -> None:
        from pocketfed.model.calibration import read_calibration, some_rows
        from pocketfed.model.checkpoints import tokens_of
        from pocketfed.model.quantization import check_kept
        from pocketfed.model.tokenization import Tokenizer

        self.checkpoint, self.schemes, self.options, self.progress = checkpoint, schemes, options, progress
        check_kept(options.keep, self.checkpoint.state)
        length = min(options.max_length, self.checkpoint.config.max_position_embeddings)
        self.trial = self._trial(options.dev, length) if options.dev is not None else None
        self.texts: Encoded | None = None
        if options.calibrate is not None:
            progress("reading texts", 0.0)
            self.texts = read_calibration(options.calibrate, Tokenizer(tokens_of(checkpoint)), length)
        elif self.trial is not None:
            self.texts = some_rows(self.trial.train)
        self.model = self._model() if self.texts is not None else None
        self.value = self.trial.score(self.model) if self.trial is not None and self.model is not None else None

    def _trial(self, dev: Path, length: int) -> Trial:
        from pocketfed.model.downstream import trial_of
        from pocketfed.model.task_kinds import read_task

        self.progress("reading data", 0.0)
        return trial_of(self.checkpoint, read_task(dev, self.options.task), length)

    def _model(self) -> TextClassifier:
        """In float32: with the model's own head, one trained on the task, or, where nothing is measured, one never read."""
        from pocketfed.model.downstream import classifier_of

        if self.trial is None:
            return _headless(self.checkpoint, self.options.seed)
        what = "measuring" if self.checkpoint.labels is not None else "training a head to measure with"
        return classifier_of(
            self.checkpoint,
            self.trial,
            self._recipe(HEAD_SHARE),
            self.options.seed,
            lambda done: self.progress(what, done),
        )

    def _recipe(self, share: float) -> Any:
        """share: of the learning rate at which a whole model is fine-tuned."""
        from pocketfed.model.finetuning import Recipe

        options = self.options
        usual = 4e-5 if self.checkpoint.config.hidden_size >= 512 else 1e-3
        return Recipe(
            epochs=options.epochs,
            batch_size=options.batch_size,
            learning_rate=share * (usual if options.learning_rate is None else options.learning_rate),
            max_length=options.max_length,
        )

    def attempt(self, scheme: Scheme, keep: tuple[str, ...]) -> Attempt:
        from pocketfed.model.downstream import layer_losses, quantized, rounding_aware, train_aware
        from pocketfed.model.packing import packed, serialised
        from pocketfed.model.quantization import Storage, quantize_state

        self.progress(scheme.name, 0.0)
        storage = Storage(scheme.bits, self.options.group, keep)
        kept = replace(self.checkpoint, quantization=scheme.name, group=storage.group, keep=keep)
        model, made = self.model, None
        if scheme.learnt:
            assert model is not None  # see quantizing.wanted_schemes
            assert self.trial is not None
            assert self.texts is not None
            aware = rounding_aware(kept, keep)
            told = lambda done: self.progress(f"training {scheme.name}", done)  # noqa: E731
            recipe = self._recipe(AWARE_SHARE)
            model, made, ranges = train_aware(aware, model, self.trial, self.texts, recipe, self.options.seed, told)
            kept = replace(aware, state=_state(model), labels=_labels(self.trial), ranges=ranges)
        elif model is not None:
            made, fixed = quantized(model, scheme, storage, self.texts)
            kept = replace(kept, ranges=fixed)
        tensors, errors = quantize_state(kept.state, storage)
        outputs = layer_losses(model, made, self.texts) if model and made and self.texts is not None else {}
        value = self.trial.score(made) if self.trial is not None and made is not None else None
        digest = hashlib.sha256(serialised(tensors)).hexdigest()
        return Attempt(kept, len(packed(tensors)), digest, errors, outputs, value)

    def within_budget(self) -> Iterator[Attempt]:
        """Attempts in order of size, up to the first within the budget."""
        from pocketfed.model.quantization import QuantizationError

        assert self.options.budget is not None  # see quantizing.wanted_schemes
        assert self.value is not None
        assert self.trial is not None
        told: list[str] = []
        for attempt in self._candidates():
            yield attempt
            assert attempt.value is not None
            lost, wide = self.value - attempt.value, len(attempt.checkpoint.keep)
            if lost <= self.options.budget:
                return
            told.append(f"{attempt.checkpoint.quantization}{f' with {wide} kept' if wide else ''} {lost:.2f}")
        raise QuantizationError(
            f"no scheme stays within {self.options.budget:g} points of {self.value:.2f} on {self.trial.name} (lost: "
            f"{', '.join(told)}); allow more with --budget, keep layers with --keep, or train one with --scheme int8-qat"
        )

    def _candidates(self) -> Iterator[Attempt]:
        """Four bits, then those with some layers in eight, then eight bits, then those with some layers in float32."""
        for bits in (4, 8):
            tried = []
            for scheme in (scheme for scheme in self.schemes if scheme.bits == bits):
                tried.append((scheme, self.attempt(scheme, self.options.keep)))
                yield tried[-1][1]
            for scheme, attempt in tried:
                yield from self._kept_wider(scheme, attempt.worst())

    def _kept_wider(self, scheme: Scheme, worst: Sequence[str]) -> Iterator[Attempt]:
        """With 1, 2, 4, ... of the layers that lose most kept wider, up to a quarter of all."""
        count = 1
        while not scheme.learnt and count <= len(worst) // 4:
            yield self.attempt(scheme, (*self.options.keep, *worst[:count]))
            count *= 2


def _headless(checkpoint: Checkpoint, seed: int) -> TextClassifier:
    """The model to calibrate with where nothing is measured; its head is never read."""
    from pocketfed.model.checkpoints import tokens_of
    from pocketfed.model.finetuning import make_model
    from pocketfed.model.supervision import Classification

    return make_model(
        checkpoint.config, checkpoint.state, tokens_of(checkpoint).sep_id, Classification(("0", "1")), seed
    ).eval()


def _state(model: TextClassifier) -> dict[str, Any]:
    from pocketfed.model.downstream import state_of

    return state_of(model)


def _labels(trial: Trial) -> tuple[str, ...] | None:
    return getattr(trial.kind, "labels", None) or getattr(trial.kind, "tags", None)
