"""Regression, token and span heads: built, checked, trained and measured as a device does it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketfed.client_sdk.artifacts import Artifact, open_artifact
from pocketfed.client_sdk.errors import ConfigurationError
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples, TrainConfig, evaluate, make_batch, pad, train
from pocketfed.coordinator.artifacts import PublishError, build_artifact
from pocketfed.model.config import MobileBertConfig

CLS, SEP, FIRST = 2, 3, 10
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LABELS: dict[str, tuple[str, ...]] = {"regression": ("warmth",), "tokens": ("even", "odd"), "spans": ("start", "end")}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    from pocketfed.model.tokenization import train_vocabulary

    vocabulary = train_vocabulary([f"{a}{b}" for a in LETTERS for b in LETTERS], 60)
    config = MobileBertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        intra_bottleneck_size=16, embedding_size=16, num_feedforward_networks=1, max_position_embeddings=16,
        attention_probs_dropout_prob=0.0, initializer_range=0.1,
    )  # fmt: skip
    built = {}
    for task, labels in LABELS.items():
        folder = tmp_path_factory.mktemp(task) / "artifact"
        made = build_artifact(
            folder, config=config, state={}, vocabulary=vocabulary, labels=labels, task=task,
            trainable_sets=("full", "head"), quantized=True, seed=3,
        )  # fmt: skip
        built[task] = open_artifact(made.folder, made.version)
    return built


def make_examples(task: str, count: int, seed: int) -> Examples:
    """Rows `[CLS] … [SEP]` of 4 to 10 random ids from 10 to 29.

    regression: the share of ids above 19. tokens: whether an id is odd, none for the special ones. spans: 30 and 31 stand
    around the answer.
    """
    generator = np.random.default_rng(seed)
    rows: list[Any] = []
    labels: list[Any] = []
    for _ in range(count):
        inner = generator.integers(FIRST, 30, generator.integers(4, 11))
        if task == "spans":
            first = int(generator.integers(0, len(inner) - 1))
            last = int(generator.integers(first + 1, len(inner)))
            inner[first], inner[last] = 30, 31
            labels.append([first + 1, last + 1])
        elif task == "tokens":
            labels.append(np.array([-1, *(inner % 2), -1], np.int64))
        else:
            labels.append(float((inner > 19).mean()))
        rows.append(np.array([CLS, *inner, SEP], np.int64))
    if task == "tokens":
        return Examples(tuple(rows), tuple(labels))
    return Examples(tuple(rows), np.array(labels, np.float32 if task == "regression" else np.int64))


@pytest.mark.parametrize("task", LABELS)
def test_a_head_learns_its_task_from_nothing_on_the_device(task: str, artifacts: dict[str, Artifact]) -> None:
    trainer = PlanTrainer(artifacts[task], "full")
    learn, test = make_examples(task, 192, seed=1), make_examples(task, 48, seed=2)
    theta = trainer.initial_theta()
    before = evaluate(trainer, theta, test)
    config = TrainConfig(epochs=12, batch_size=16, learning_rate=5e-3, schedule="linear", warmup=0.1)
    trained = train(trainer, theta, learn, config)
    after = evaluate(trainer, theta + trained.delta, test)
    if task == "regression":
        assert after["loss"] < 0.4 * float(np.var(np.asarray(test.labels))), "the mean alone has the variance"
        assert "accuracy" not in after
        assert "accuracy" not in trained.metrics
    else:
        assert after["accuracy"] > 0.9 > 0.7 > before["accuracy"]


@pytest.mark.parametrize("task", LABELS)
def test_the_head_alone_trains_on_what_the_prefix_kept(task: str, artifacts: dict[str, Artifact]) -> None:
    trainer = PlanTrainer(artifacts[task], "head")
    assert trainer.set.prefix
    assert trainer.set.keeps_tokens == (task != "regression")
    examples = make_examples(task, 48, seed=1)
    theta = trainer.initial_theta()
    before = evaluate(trainer, theta, examples)
    trained = train(trainer, theta, examples, TrainConfig(epochs=5, batch_size=16, learning_rate=1e-2))
    assert evaluate(trainer, theta + trained.delta, examples)["loss"] < before["loss"]


@pytest.mark.parametrize(("task", "shape"), [("regression", (3, 1)), ("tokens", (3, 12, 2)), ("spans", (3, 12, 2))])
def test_logits_are_one_row_an_example_or_one_a_token(
    task: str, shape: tuple[int, ...], artifacts: dict[str, Artifact]
) -> None:
    trainer = PlanTrainer(artifacts[task], "full")
    ids, mask = pad([np.arange(FIRST, FIRST + n) for n in (5, 12, 7)])
    assert trainer.logits(trainer.initial_theta(), ids, mask).shape == shape


@pytest.mark.parametrize("task", LABELS)
def test_loss_and_right_answers_are_those_of_the_logits(task: str, artifacts: dict[str, Artifact]) -> None:
    """The plan's own numbers, computed again in numpy from what `predict` gives."""
    trainer = PlanTrainer(artifacts[task], "full")
    examples = make_examples(task, 7, seed=4)
    batch, theta = make_batch(examples, range(7)), trainer.initial_theta()
    logits = trainer.logits(theta, batch.ids, batch.mask).astype(np.float64)
    loss, right, weight = trainer.evaluate(theta, batch)
    if task == "regression":
        assert loss == pytest.approx(float(((logits[:, 0] - batch.labels) ** 2).mean()), rel=1e-5)
        assert weight == 7
    elif task == "tokens":
        losses = [(_nll(logits[i, t], k), logits[i, t].argmax() == k) for i, t, k in _labelled(examples.labels)]
        assert loss == pytest.approx(np.mean([a for a, _ in losses]), rel=1e-5)
        assert (right, weight) == (sum(b for _, b in losses), len(losses))
    else:
        losses, hits = [], 0
        for i, row in enumerate(examples.rows):
            ends = logits[i, : len(row)]
            losses += [_nll(ends[:, e], batch.labels[i, e]) for e in (0, 1)]
            hits += all(ends[:, e].argmax() == batch.labels[i, e] for e in (0, 1))
        assert loss == pytest.approx(np.mean(losses), rel=1e-5)
        assert (right, weight) == (hits, 7)


def _nll(logits: Any, label: int) -> float:
    return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label])


def _labelled(labels: Sequence[Any]) -> list[tuple[int, int, int]]:
    return [(i, t, int(k)) for i, row in enumerate(labels) for t, k in enumerate(row) if k >= 0]


def test_a_batch_without_a_labelled_token_changes_nothing_and_stops_nothing(artifacts: dict[str, Artifact]) -> None:
    trainer = PlanTrainer(artifacts["tokens"], "full")
    theta = trainer.initial_theta()
    some = make_examples("tokens", 6, seed=1)
    none = Examples(some.rows, tuple(np.full(len(r), -1) for r in some.rows))
    loss, right, gradient = trainer.gradient(theta, make_batch(none, range(6)))
    assert (loss, right) == (0.0, 0)
    assert not gradient.any()
    mixed = Examples(some.rows, (some.labels[0], *(np.full(len(r), -1) for r in some.rows[1:])))
    trained = train(trainer, theta, mixed, TrainConfig(batch_size=2))
    assert np.isfinite(trained.delta).all()
    assert trained.delta.any()
    assert evaluate(trainer, theta, none) == {"loss": 0.0, "accuracy": 0.0}


def test_what_padding_says_changes_no_task(artifacts: dict[str, Artifact]) -> None:
    for task, artifact in artifacts.items():
        trainer = PlanTrainer(artifact, "full")
        theta, examples = trainer.initial_theta(), make_examples(task, 8, seed=5)
        together = trainer.evaluate(theta, make_batch(examples, range(8)))
        alone = [trainer.evaluate(theta, make_batch(examples, [i])) for i in range(8)]
        assert together[0] == pytest.approx(sum(a * w for a, _, w in alone) / sum(w for _, _, w in alone), rel=1e-5)
        assert together[1] == sum(right for _, right, _ in alone)


def test_a_label_outside_a_tasks_head_is_refused_and_the_trainer_goes_on(artifacts: dict[str, Artifact]) -> None:
    trainer = PlanTrainer(artifacts["tokens"], "full")
    theta, good = trainer.initial_theta(), make_examples("tokens", 4, seed=1)
    bad = Examples(good.rows, (*good.labels[:3], np.full(len(good.rows[3]), 2)))
    with pytest.raises(ConfigurationError, match="label 2 of example 3 is outside 0 to 1"):
        train(trainer, theta, bad, TrainConfig())
    assert train(trainer, theta, good, TrainConfig()).delta.any()


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("regression", ("a", "b"), "regression has 1 outputs; 2 labels were given"),
        ("spans", ("a",), "spans has 2 outputs; 1 labels were given"),
        ("tokens", ("a",), "needs at least two labels"),
    ],
)
def test_an_artifact_whose_labels_do_not_fit_its_task_is_not_built(
    task: str, labels: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    from pocketfed.model.config import STUDENTS
    from pocketfed.model.tokenization import train_vocabulary

    vocabulary = train_vocabulary(["some words"], 40)
    with pytest.raises(PublishError, match=message):
        build_artifact(
            tmp_path / "artifact", config=STUDENTS["nano"].with_changes(vocab_size=len(vocabulary)), state={},
            vocabulary=vocabulary, labels=labels, task=task, trainable_sets=("head",), quantized=True,
        )  # fmt: skip
    assert not (tmp_path / "artifact").exists()


def test_a_manifest_names_its_task(artifacts: dict[str, Artifact]) -> None:
    assert {task: artifact.manifest.task for task, artifact in artifacts.items()} == {t: t for t in LABELS}
    assert {t: a.manifest.labels for t, a in artifacts.items()} == LABELS
