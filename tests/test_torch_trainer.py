"""PyTorch and the plans train alike: the same weights, the same order, the same updates."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketfed.client_sdk.artifacts import Artifact, open_artifact
from pocketfed.client_sdk.errors import ArtifactError, ConfigurationError
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.torch_trainer import TorchTrainer, has_bfloat16
from pocketfed.client_sdk.trainer import Examples, TrainConfig, evaluate, train
from pocketfed.coordinator.artifacts import build_artifact
from pocketfed.model.config import STUDENTS
from pocketfed.model.tasks import Dataset
from pocketfed.model.tokenization import train_vocabulary

SETS = ("head", "norms", "bias", "lora:4:qv@1", "last:1", "ladder", "full")
EPOCH = TrainConfig(epochs=1, batch_size=8, learning_rate=3e-3, schedule="linear", label_smoothing=0.1)


def artifact_of(dataset: Dataset, folder: Path, activations: str) -> Artifact:
    vocabulary = train_vocabulary((e.text for e in dataset.train), 256)
    sets = SETS if activations == "float32" else ("lora:4:qv@1", "norms")
    built = build_artifact(
        folder,
        config=STUDENTS["nano"].with_changes(vocab_size=len(vocabulary)),
        state={},
        vocabulary=vocabulary,
        labels=dataset.labels,
        trainable_sets=sets,
        quantized=True,
        activations=activations,
    )
    return open_artifact(built.folder)


@pytest.fixture(scope="module")
def artifact(tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return artifact_of(tiny_dataset, tmp_path_factory.mktemp("torch") / "artifact", "float32")


def examples_of(trainer: Any, dataset: Dataset) -> Examples:
    rows = trainer.encode([e.text for e in dataset.train], None, 32)
    return Examples(rows, np.array([dataset.labels.index(e.label or "") for e in dataset.train]))


@pytest.mark.parametrize("name", SETS)
def test_an_epoch_in_pytorch_ends_within_1e_4_of_an_epoch_with_the_plans(
    name: str, artifact: Artifact, tiny_dataset: Dataset
) -> None:
    plans, torch_ = PlanTrainer(artifact, name), TorchTrainer(artifact, name)
    examples, theta = examples_of(plans, tiny_dataset), plans.initial_theta()
    assert theta.tobytes() == torch_.initial_theta().tobytes()
    mine, theirs = (train(t, theta, examples, EPOCH) for t in (plans, torch_))
    assert np.abs(mine.delta).max() > 1e-3
    assert np.abs(mine.delta - theirs.delta).max() < 1e-4
    end = theta + mine.delta
    measured = [evaluate(t, end, examples) for t in (plans, torch_)]
    assert measured[0]["loss"] == pytest.approx(measured[1]["loss"], abs=1e-5)
    assert measured[0]["accuracy"] == measured[1]["accuracy"]
    ids = np.stack([examples.rows[0], examples.rows[0]])
    logits = [t.logits(end, ids, np.ones_like(ids)) for t in (plans, torch_)]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)


@pytest.mark.parametrize("name", ["lora:4:qv@1", "norms"])
def test_it_rounds_activations_as_the_plans_do(name: str, tiny_dataset: Dataset, tmp_path: Path) -> None:
    artifact = artifact_of(tiny_dataset, tmp_path / "artifact", "int8")
    plans, torch_ = PlanTrainer(artifact, name), TorchTrainer(artifact, name)
    examples, theta = examples_of(plans, tiny_dataset), plans.initial_theta()
    few = dataclasses.replace(EPOCH, max_steps=2)  # later, a value on a border may be rounded to either side
    mine, theirs = (train(t, theta, examples, few) for t in (plans, torch_))
    assert np.abs(mine.delta - theirs.delta).max() < 1e-4


def test_bfloat16_is_near_where_the_processor_has_it_and_refused_where_not(
    artifact: Artifact, tiny_dataset: Dataset
) -> None:
    if not has_bfloat16():
        with pytest.raises(ConfigurationError, match="no bfloat16 products; use precision float32 or auto"):
            TorchTrainer(artifact, "norms", "bfloat16")
        TorchTrainer(artifact, "norms", "auto")
        return
    exact, rounded = TorchTrainer(artifact, "norms"), TorchTrainer(artifact, "norms", "bfloat16")
    examples, theta = examples_of(exact, tiny_dataset), exact.initial_theta()
    losses = [evaluate(t, theta, examples)["loss"] for t in (exact, rounded)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_plan_without_a_weight_that_the_student_needs_is_refused(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocketfed.client_sdk import torch_trainer

    whole = torch_trainer._frozen_tensors

    def without(folder: Path, plan: Path) -> Any:
        tensors = whole(folder, plan)
        del tensors["mobilebert.encoder.layer.0.attention.self.query.weight"]
        return tensors

    monkeypatch.setattr(torch_trainer, "_frozen_tensors", without)
    with pytest.raises(ArtifactError, match=r"holds no 'mobilebert.encoder.layer.0.attention.self.query.weight'"):
        TorchTrainer(artifact, "head")
