"""The same model without a federation: trained on all data in one place, or on one device's alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples, TrainConfig, evaluate, train
from pocketfed.model.parameters import Vector
from pocketfed.model.tasks import majority_accuracy, read_dataset
from pocketfed.simulations.preparing import encode_examples, prepare_artifact


def train_centrally(
    trainer: PlanTrainer,
    examples: Examples,
    config: TrainConfig,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Vector:
    """Trained parameters (P,), by the loop that devices run."""
    theta = trainer.initial_theta()
    return theta + train(trainer, theta, examples, config, progress=progress).delta


def evaluate_model(
    model_dir: Path,
    data: Path,
    trainable_set: str,
    config: TrainConfig,
    progress: Callable[[float], None] = lambda fraction: None,
) -> dict[str, Any]:
    """Test accuracy of a model folder: as it is where it has a classifier for the data's labels, else fine-tuned first.

    Raises:
        CheckpointError, DataError, TrainableSetError, TrainingError: what is wrong with the request.
    """
    from pocketfed.model.checkpoints import load

    labels = load(model_dir).labels
    dataset = read_dataset(data).with_test(seed=config.seed)
    fine_tune = labels is None or set(labels) != set(dataset.labels)
    with tempfile.TemporaryDirectory(prefix="pocketfed-") as scratch:
        chosen = trainable_set if fine_tune else "head"
        artifact = prepare_artifact(
            str(model_dir), dataset, chosen, Path(scratch) / "artifact", config.seed, config.max_length
        )
        trainer = PlanTrainer(artifact, chosen)
        theta = trainer.initial_theta()
        if fine_tune:
            train_examples = encode_examples(trainer, dataset.train, config.max_length)
            theta = train_centrally(trainer, train_examples, config, progress)
        measured = evaluate(trainer, theta, encode_examples(trainer, dataset.test, config.max_length))
    return {
        **measured,
        "fine_tuned": fine_tune,
        "trainable_set": chosen,
        "train_examples": len(dataset.train) if fine_tune else 0,
        "test_examples": len(dataset.test),
        "test_source": dataset.test_source,
        "majority_accuracy": majority_accuracy(dataset),
        "seed": config.seed,
    }
