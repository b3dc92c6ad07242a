"""The training loop, on a model small enough for paper, and on a real artifact's plans."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.errors import ConfigurationError, NoExamples, TrainingDiverged, TrainingStopped
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import (
    Batch,
    Examples,
    TrainConfig,
    check_labels,
    epoch_batches,
    evaluate,
    learning_rate_at,
    make_batch,
    pad,
    train,
)
from pocketfed.model.tasks import Dataset


class Counting:
    """A linear model on how often each of four tokens occurs: logits = counts W, softmax cross-entropy, 3 labels.

    `touched` holds every theta that a gradient was asked at.
    """

    identity = "counting"
    size = 4 * 3
    task = "classification"
    outputs = 3

    def __init__(self) -> None:
        self.touched: list[Any] = []

    def encode(self, texts: Sequence[str], pairs: Sequence[str | None] | None, max_length: int) -> tuple[Any, ...]:
        return tuple(np.array([ord(c) - ord("a") + 1 for c in t[:max_length]], np.int64) for t in texts)

    def prepare(self, rows: Any, should_stop: Any) -> None:
        pass

    def logits(self, theta: Any, ids: Any, mask: Any) -> Any:
        return self._counts(ids, mask) @ theta.reshape(4, 3)

    def evaluate(self, theta: Any, batch: Batch) -> tuple[float, int, float]:
        loss, right, _ = self._judge(theta, batch)
        return loss, right, batch.weight

    def gradient(self, theta: Any, batch: Batch) -> tuple[float, int, Any]:
        self.touched.append(theta.copy())
        return self._judge(theta, batch)

    def _judge(self, theta: Any, batch: Batch) -> tuple[float, int, Any]:
        counts = self._counts(batch.ids, batch.mask)
        logits = (counts @ theta.reshape(4, 3)).astype(np.float64)
        shifted = logits - logits.max(1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        share = np.ones(len(batch.ids)) if batch.weights is None else batch.weights.astype(np.float64)
        share = share / share.sum()
        target = np.full(logits.shape, batch.label_smoothing / 3)
        target[np.arange(len(share)), batch.labels] += 1 - batch.label_smoothing
        loss = -float((share[:, None] * np.where(target > 0, target * log_p, 0)).sum())
        right = int(((logits.argmax(1) == batch.labels) & (share > 0)).sum())
        gradient = counts.T @ (share[:, None] * (np.exp(log_p) - target))
        return loss, right, gradient.reshape(-1).astype(np.float32)

    def _counts(self, ids: Any, mask: Any) -> Any:
        return np.stack([((ids == token) & (mask == 1)).sum(1) for token in range(1, 5)], 1).astype(np.float32)


class Exploding(Counting):
    """A loss that is not a number from the third step on."""

    def gradient(self, theta: Any, batch: Batch) -> tuple[float, int, Any]:
        loss, right, gradient = super().gradient(theta, batch)
        return (math.nan if len(self.touched) == 3 else loss), right, gradient


def letters(*texts: str, labels: Sequence[int]) -> Examples:
    return Examples(Counting().encode(texts, None, 99), np.array(labels, np.int64))


EXAMPLES = letters("aa", "ab", "bb", "bc", "cc", "cca", "ddd", labels=[0, 0, 1, 1, 2, 2, 0])
ZERO = np.zeros(Counting.size, np.float32)
PLAIN = TrainConfig(optimizer="sgd", learning_rate=0.5, batch_size=7, max_grad_norm=0, max_length=16)


# ---- batches ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=120), st.integers(1, 9), st.integers(0, 2**32))
def test_an_epoch_covers_every_example_exactly_once(lengths: list[int], batch_size: int, seed: int) -> None:
    rows = tuple(np.full(length, i + 1, np.int64) for i, length in enumerate(lengths))
    examples = Examples(rows, np.arange(len(rows)))
    batches = list(epoch_batches(examples, batch_size, seed, 0))
    assert sorted(int(label) for b in batches for label in b.labels) == list(range(len(rows)))
    assert all(1 <= len(b.labels) <= batch_size for b in batches)
    for b in batches:
        for ids, mask, label in zip(b.ids, b.mask, b.labels, strict=True):
            assert ids[mask == 1].tolist() == [label + 1] * lengths[label]
            assert not ids[mask == 0].any()


def test_batches_depend_on_seed_and_epoch_and_on_nothing_else() -> None:
    examples = Examples(tuple(np.arange(1, 2 + i % 5) for i in range(40)), np.arange(40))

    def order(seed: int, epoch: int = 0) -> list[list[int]]:
        return [b.labels.tolist() for b in epoch_batches(examples, 4, seed, epoch)]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1) != order(1, epoch=1)


def test_examples_of_one_length_share_batches_so_that_little_is_padding() -> None:
    lengths = np.random.default_rng(0).integers(3, 33, 256)
    examples = Examples(tuple(np.ones(n, np.int64) for n in lengths), np.zeros(256, np.int64))
    batches = list(epoch_batches(examples, 16, 0, 0))
    real, all_ = sum(int(b.mask.sum()) for b in batches), sum(b.mask.size for b in batches)
    assert real == lengths.sum()
    assert real / all_ > 0.9, "in random order about half would be padding"


def test_padding_fills_with_zeros_up_to_the_longest_row() -> None:
    ids, mask = pad([np.array([2, 9, 3]), np.array([2, 3])])
    assert ids.tolist() == [[2, 9, 3], [2, 3, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]


# ---- the loop --------------------------------------------------------------------------------------------------------


def test_one_step_of_sgd_is_the_gradient_times_the_rate_and_theta_itself_stays() -> None:
    theta = ZERO.copy()
    trained = train(Counting(), theta, letters("a", labels=[0]), PLAIN)
    # p = 1/3 each, so for token a the gradient is (-2/3, 1/3, 1/3).
    np.testing.assert_allclose(trained.delta.reshape(4, 3)[0], [1 / 3, -1 / 6, -1 / 6], rtol=1e-6)
    assert not trained.delta.reshape(4, 3)[1:].any()
    assert not theta.any()
    assert trained.metrics["loss"] == pytest.approx(math.log(3))
    assert trained.metrics["steps"] == 1
    assert trained.num_examples == 1


def test_training_is_the_same_bits_for_the_same_seed_and_others_for_another() -> None:
    config = TrainConfig(epochs=3, batch_size=2, learning_rate=0.1, seed=4)
    first, again = (train(Counting(), ZERO, EXAMPLES, config).delta for _ in range(2))
    other = train(Counting(), ZERO, EXAMPLES, TrainConfig(epochs=3, batch_size=2, learning_rate=0.1, seed=5)).delta
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_a_long_gradient_is_clipped_to_the_norm_and_a_short_one_is_left() -> None:
    examples = letters("aaaaaaaa", labels=[0])  # gradient 8 * (-2/3, 1/3, 1/3): of norm 8 * sqrt(6) / 3 = 6.53

    def moved(max_norm: float) -> float:
        config = TrainConfig(optimizer="sgd", learning_rate=1.0, max_grad_norm=max_norm)
        return float(np.linalg.norm(train(Counting(), ZERO, examples, config).delta))

    assert moved(0) == pytest.approx(8 * math.sqrt(6) / 3, rel=1e-6)
    assert moved(2.0) == pytest.approx(2.0, rel=1e-6)
    assert moved(7.0) == pytest.approx(8 * math.sqrt(6) / 3, rel=1e-6)


def test_fedprox_pulls_back_by_mu_times_the_way_gone() -> None:
    """Two steps on one example, by hand: g2' = g(theta1) + mu (theta1 - theta0)."""
    one, rate, mu = letters("a", labels=[0]), 0.5, 0.4
    config = TrainConfig(epochs=2, optimizer="sgd", learning_rate=rate, max_grad_norm=0, proximal_mu=mu, batch_size=1)
    trainer = Counting()
    start = np.linspace(-1, 1, 12).astype(np.float32)
    delta = train(trainer, start, one, config).delta
    batch = Batch(np.array([[1]]), np.array([[1]]), np.array([0]))
    first = start - rate * trainer.gradient(start, batch)[2]
    second = first - rate * (trainer.gradient(first, batch)[2] + mu * (first - start))
    np.testing.assert_allclose(delta, second - start, atol=1e-6)
    without = train(Counting(), start, one, dataclasses.replace(config, proximal_mu=0.0)).delta
    assert np.linalg.norm(delta) < np.linalg.norm(without)


def test_a_stop_is_heeded_before_the_next_step() -> None:
    trainer = Counting()
    asked = Counter[str]()

    def should_stop() -> bool:
        asked["times"] += 1
        return asked["times"] > 3

    with pytest.raises(TrainingStopped, match="stopped after 3 of 35 steps"):
        train(trainer, ZERO, EXAMPLES, TrainConfig(epochs=5, batch_size=1), should_stop)
    assert len(trainer.touched) == 3


def test_a_loss_that_is_no_number_ends_training_and_names_the_step() -> None:
    with pytest.raises(TrainingDiverged, match=r"loss nan and gradient norm .* at step 3 are not both finite"):
        train(Exploding(), ZERO, EXAMPLES, TrainConfig(epochs=2, batch_size=1))


def test_parameters_that_overflow_are_not_handed_on() -> None:
    config = TrainConfig(optimizer="sgd", learning_rate=100.0, max_grad_norm=0, weight_decay=0)
    with pytest.raises(TrainingDiverged), np.errstate(all="ignore"):
        train(Counting(), np.full(12, 3.4e38, np.float32) * np.float32([1, -1] * 6), letters("dd", labels=[1]), config)


@pytest.mark.parametrize(
    ("max_steps", "steps", "share"),
    [(0, 6, 7), (1, 1, None), (4, 4, None), (2, 2, 7), (100, 6, 7)],
    ids=["no limit", "one", "in the second epoch", "just an epoch", "more than there are"],
)
def test_max_steps_ends_training_wherever_it_falls(max_steps: int, steps: int, share: int | None) -> None:
    told: list[float] = []
    config = TrainConfig(epochs=3, batch_size=4, max_steps=max_steps)  # 7 examples: 2 steps an epoch
    trainer = Counting()
    trained = train(trainer, ZERO, EXAMPLES, config, progress=told.append)
    assert len(trainer.touched) == trained.metrics["steps"] == steps
    assert told == [(i + 1) / steps for i in range(steps)]
    assert 0 < trained.metrics["loss"] < 3
    if share:  # a whole epoch: accuracy counts sevenths
        assert trained.metrics["accuracy"] * share == pytest.approx(round(trained.metrics["accuracy"] * share))


def test_without_examples_nothing_is_trained_or_evaluated() -> None:
    nobody = Examples((), np.zeros(0, np.int64))
    with pytest.raises(NoExamples, match="no labelled examples"):
        train(Counting(), ZERO, nobody, PLAIN)
    with pytest.raises(NoExamples, match="no labelled examples"):
        evaluate(Counting(), ZERO, nobody)


# ---- schedules, smoothing, weights, holdout --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "warmup", "shares"),
    [
        ("constant", 0.0, [1, 1, 1, 1]),
        ("linear", 0.0, [1, 3 / 4, 1 / 2, 1 / 4]),
        ("cosine", 0.0, [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
        ("constant", 0.5, [1 / 3, 2 / 3, 1, 1]),
        ("linear", 0.5, [1 / 3, 2 / 3, 1, 1 / 2]),
        ("cosine", 0.5, [1 / 3, 2 / 3, 1, 1 / 2]),
        ("constant", 0.3, [1 / 2, 1, 1, 1]),
        ("linear", 1.0, [1 / 5, 2 / 5, 3 / 5, 4 / 5]),
    ],
)
def test_the_rate_of_each_of_four_steps_is_what_its_schedule_says(
    schedule: str, warmup: float, shares: list[float]
) -> None:
    config = dataclasses.replace(PLAIN, schedule=schedule, warmup=warmup, learning_rate=0.2)
    assert [learning_rate_at(i, 4, config) for i in range(4)] == pytest.approx([0.2 * s for s in shares])
    trainer = Counting()
    one = letters("a", labels=[0])
    delta = train(trainer, ZERO, one, dataclasses.replace(config, epochs=4)).delta
    places = [*trainer.touched, ZERO + delta]
    batch = make_batch(one, [0])
    for i in range(4):
        gradient = trainer.gradient(places[i], batch)[2]
        np.testing.assert_allclose(places[i + 1] - places[i], -0.2 * shares[i] * gradient, atol=1e-6)


def test_label_smoothing_pulls_less_and_towards_every_label() -> None:
    """Of 3 labels with 0.3 spread: the target is (0.8, 0.1, 0.1), p = 1/3 each, the rate 1/2."""
    trained = train(Counting(), ZERO, letters("a", labels=[0]), dataclasses.replace(PLAIN, label_smoothing=0.3))
    np.testing.assert_allclose(trained.delta.reshape(4, 3)[0], [0.7 / 3, -0.35 / 3, -0.35 / 3], rtol=1e-6)


def test_an_examples_weight_is_its_share_of_the_step_and_of_the_loss() -> None:
    examples = letters("a", "b", "c", labels=[0, 1, 2])
    weighted = dataclasses.replace(examples, weights=np.array([3, 1, 0], np.float32))
    trained = train(Counting(), ZERO, weighted, PLAIN)
    step = trained.delta.reshape(4, 3)
    np.testing.assert_allclose(step[0], 0.75 * np.array([1 / 3, -1 / 6, -1 / 6]), rtol=1e-5)
    np.testing.assert_allclose(step[1], 0.25 * np.array([-1 / 6, 1 / 3, -1 / 6]), rtol=1e-5)
    assert not step[2:].any()
    assert trained.metrics["loss"] == pytest.approx(math.log(3))
    assert trained.metrics["accuracy"] == pytest.approx(1 / 2), "ties are label 0; what weighs nothing is not counted"


class Watched(Counting):
    """Tells which examples it has seen, by their first token, in training and in measuring; `losses` are told back."""

    def __init__(self, losses: Sequence[float] = ()) -> None:
        super().__init__()
        self.losses = list(losses)
        self.trained: list[int] = []
        self.measured: list[list[int]] = []

    def gradient(self, theta: Any, batch: Batch) -> tuple[float, int, Any]:
        self.trained += batch.ids[:, 0].tolist()
        return super().gradient(theta, batch)

    def evaluate(self, theta: Any, batch: Batch) -> tuple[float, int, float]:
        self.measured.append(sorted(batch.ids[:, 0].tolist()))
        loss, right, weight = super().evaluate(theta, batch)
        return (self.losses.pop(0) if self.losses else loss), right, weight


def numbered(count: int) -> Examples:
    """Each begins with a token of its own, and goes on with one that the model knows."""
    rows = tuple(np.array([10 + i, 1 + i % 4]) for i in range(count))
    return Examples(rows, np.arange(count) % 3)


def test_what_is_held_out_is_measured_after_every_epoch_and_never_trained_on() -> None:
    trainer = Watched()
    config = TrainConfig(epochs=3, batch_size=2, holdout=0.35, seed=3)
    trained = train(trainer, ZERO, numbered(10), config)
    assert len(trainer.measured) == 3
    held = trainer.measured[0]
    assert len(held) == 3  # floor(0.35 * 10)
    assert trainer.measured == [held] * 3
    assert sorted(trainer.trained) == sorted([10 + i for i in range(10) if 10 + i not in held] * 3)
    assert trained.metrics["steps"] == 3 * 4
    assert trained.num_examples == 10
    assert 0 < trained.metrics["holdout_loss"] < 2
    other = Watched()
    train(other, ZERO, numbered(10), dataclasses.replace(config, seed=4))
    assert other.measured[0] != held


def test_training_ends_when_the_holdout_no_longer_improves_and_gives_back_the_best() -> None:
    config = TrainConfig(epochs=9, batch_size=2, learning_rate=0.1, holdout=0.3, patience=2)
    trainer = Watched([3.0, 2.0, 2.5, 2.1, 0.1])
    trained = train(trainer, ZERO, numbered(10), config)
    assert len(trainer.measured) == 4, "two epochs without a better one"
    assert trained.metrics["holdout_loss"] == 2.0
    two = train(Watched(), ZERO, numbered(10), dataclasses.replace(config, epochs=2, patience=0))
    assert trained.delta.tobytes() == two.delta.tobytes(), "the parameters after the second epoch"


def test_with_too_few_examples_to_hold_one_out_all_are_trained_on() -> None:
    trainer = Watched()
    trained = train(trainer, ZERO, numbered(3), TrainConfig(holdout=0.3, patience=1, batch_size=1))
    assert sorted(trainer.trained) == [10, 11, 12]
    assert trainer.measured == []
    assert trained.delta.any()
    assert "holdout_loss" not in trained.metrics


def test_how_many_texts_lost_their_end_is_told() -> None:
    cut = dataclasses.replace(EXAMPLES, truncated=3)
    assert train(Counting(), ZERO, cut, PLAIN).metrics["truncated"] == 3
    assert "truncated" not in train(Counting(), ZERO, EXAMPLES, PLAIN).metrics


# ---- bad input -------------------------------------------------------------------------------------------------------


class OfTask(Counting):
    def __init__(self, task: str) -> None:
        super().__init__()
        self.task = task


ROWS = (np.array([1, 2, 3]), np.array([1, 2]))
BAD: dict[str, tuple[str, Any, str]] = {
    "a class too high": ("classification", np.array([0, 3]), "label 3 of example 1 is outside 0 to 2"),
    "a negative class": ("classification", np.array([-1, 0]), "label -1 of example 0 is outside 0 to 2"),
    "a token's class too high": (
        "tokens", (np.array([0, 1, 2]), np.array([-1, 7])), "label 7 of example 1 is outside 0 to 2",
    ),
    "a span beyond its text": ("spans", np.array([[0, 2], [0, 2]]), "label 2 of example 1 is outside 0 to 1"),
    "a span before its text": ("spans", np.array([[-1, 2], [0, 1]]), "label -1 of example 0 is outside 0 to 2"),
    "a value that is no number": (
        "regression", np.array([1, np.nan], np.float32), "the label of example 1 is not finite; leave it out",
    ),
    "an endless value": (
        "regression", np.array([np.inf, 1], np.float32), "the label of example 0 is not finite; leave it out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_label_that_cannot_be_is_refused_in_one_sentence_before_anything_is_computed(kind: str) -> None:
    task, labels, message = BAD[kind]
    trainer = OfTask(task)
    for call in (lambda x: train(trainer, ZERO, x, PLAIN), lambda x: evaluate(trainer, ZERO, x)):
        with pytest.raises(ConfigurationError, match=message) as caught:
            call(Examples(ROWS, labels))
        assert "\n" not in str(caught.value)
    assert trainer.touched == []


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        ("tokens", (np.array([-1, 2, -100]), np.array([0, 0]))),
        ("spans", np.array([[0, 2], [1, 1]])),
        ("regression", np.array([-1e9, 1e9], np.float32)),
        ("classification", np.array([0, 2])),
    ],
)
def test_labels_at_the_border_are_taken(task: str, labels: Any) -> None:
    check_labels(Examples(ROWS, labels), task, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_parameters_that_are_not_finite_are_refused_before_a_step(value: float) -> None:
    trainer, theta = Counting(), ZERO.copy()
    theta[5] = value
    with pytest.raises(TrainingDiverged, match="the parameters to start from are not finite"):
        train(trainer, theta, EXAMPLES, PLAIN)
    assert trainer.touched == []


@pytest.mark.parametrize("examples", [letters("ab", labels=[1]), letters("a", "bb", "c", labels=[1, 1, 1])])
def test_one_example_or_one_class_is_enough_to_train_on(examples: Examples) -> None:
    trained = train(Counting(), ZERO, examples, TrainConfig(epochs=2, batch_size=2, holdout=0.1))
    assert np.isfinite(trained.delta).all()
    assert trained.delta.any()


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_is_what_one_computes_by_hand() -> None:
    theta = ZERO.copy()
    theta.reshape(4, 3)[0, 0] = math.log(2)  # one "a" doubles the odds of label 0
    examples = letters("a", "aa", "b", labels=[0, 0, 2])
    # p: 2/4, 4/6, and 1/3 for "b", which ties and so counts as label 0
    expected = -(math.log(1 / 2) + math.log(2 / 3) + math.log(1 / 3)) / 3
    for batch_size in (1, 2, 64):
        measured = evaluate(Counting(), theta, examples, batch_size)
        assert measured["loss"] == pytest.approx(expected, abs=1e-6)
        assert measured["accuracy"] == pytest.approx(2 / 3)


def test_huge_logits_have_a_finite_loss() -> None:
    theta = np.full(12, 0, np.float32)
    theta[0] = 1e30
    assert evaluate(Counting(), theta, letters("a", labels=[0])) == {"loss": 0.0, "accuracy": 1.0}
    assert evaluate(Counting(), theta, letters("a", labels=[1]))["loss"] == pytest.approx(1e30)


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("epochs", True),
        ("batch_size", 0),
        ("batch_size", 5000),
        ("max_length", 2),
        ("learning_rate", -1e-3),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("learning_rate", "fast"),
        ("momentum", 1.1),
        ("seed", -1),
        ("max_grad_norm", -1.0),
        ("proximal_mu", math.nan),
        ("max_steps", -1),
        ("warmup", 1.5),
        ("label_smoothing", 1.0),
        ("holdout", 0.95),
        ("patience", 1.5),
    ],
)
def test_a_setting_out_of_its_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{field} is .*; it must be a .*number between"):
        TrainConfig(**{field: value})


def test_an_unknown_schedule_and_patience_without_a_holdout_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="there is no schedule 'step'; choose one of constant, linear, cosine"):
        TrainConfig(schedule="step")
    with pytest.raises(ConfigurationError, match=r"patience 2 needs a holdout to measure on; set one, e\.g\. 0\.1"):
        TrainConfig(patience=2)


def test_an_unknown_optimizer_is_refused_before_training() -> None:
    with pytest.raises(ConfigurationError, match="there is no optimizer 'rprop'"):
        TrainConfig(optimizer="rprop")


def test_settings_are_read_from_names_with_dashes_and_what_is_unknown_is_ignored() -> None:
    values = {"learning-rate": "0.25", "batch_size": 8, "server-round": 3, "optimizer": "sgd", "of-tomorrow": 1}
    assert TrainConfig.from_mapping(values) == TrainConfig(learning_rate=0.25, batch_size=8, optimizer="sgd")


# ---- a real artifact -------------------------------------------------------------------------------------------------


def test_training_all_of_an_artifact_from_nothing_beats_the_majority_and_nearly_learns_the_texts(
    nano_artifact: Artifact, tiny_dataset: Dataset
) -> None:
    trainer = PlanTrainer(nano_artifact, "full")
    index = {label: i for i, label in enumerate(nano_artifact.manifest.labels)}

    def encoded(split: Any) -> Examples:
        rows = trainer.encode([e.text for e in split], None, 32)
        return Examples(rows, np.array([index[e.label] for e in split]))

    theta = trainer.initial_theta()
    before = evaluate(trainer, theta, encoded(tiny_dataset.test))
    trained = train(trainer, theta, encoded(tiny_dataset.train), TrainConfig(epochs=8, learning_rate=3e-3, seed=1))
    after = evaluate(trainer, theta + trained.delta, encoded(tiny_dataset.test))
    majority = max(Counter(e.label for e in tiny_dataset.test).values()) / len(tiny_dataset.test)
    assert majority == 0.25
    assert before["accuracy"] <= 0.6
    assert after["accuracy"] >= 0.9
    assert after["loss"] < before["loss"]


@pytest.mark.parametrize("name", ["head", "norms", "lora:4"])
def test_every_smaller_set_learns_its_training_texts_too(
    name: str, nano_artifact: Artifact, tiny_dataset: Dataset
) -> None:
    trainer = PlanTrainer(nano_artifact, name)
    labels = nano_artifact.manifest.labels
    rows = trainer.encode([e.text for e in tiny_dataset.train])
    examples = Examples(rows, np.array([labels.index(e.label or "") for e in tiny_dataset.train]))
    theta = trainer.initial_theta()
    before = evaluate(trainer, theta, examples)
    trained = train(trainer, theta, examples, TrainConfig(epochs=10, learning_rate=3e-3))
    after = evaluate(trainer, theta + trained.delta, examples)
    assert after["loss"] < before["loss"]
    assert after["accuracy"] > 0.6 > before["accuracy"]
