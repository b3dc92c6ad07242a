"""What virtual devices are given: the artifact of a preset or a model folder, their names, examples as ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pocketfed.client_sdk.artifacts import Artifact, open_artifact
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples
from pocketfed.coordinator.artifacts import build_artifact
from pocketfed.model.tasks import Dataset, Example


def prepare_artifact(model: str, dataset: Dataset, train: str, folder: Path, seed: int, max_length: int) -> Artifact:
    """Build the artifact that a preset's or a model folder's student makes for a data set's labels.

    An untrained student's vocabulary is trained on the training texts: fine in a simulation; a real fleet's texts never
    come together, so there it has to come from a public corpus (`pocketfed distill`).
    """
    from pocketfed.model.checkpoints import load, tokens_of
    from pocketfed.model.config import preset
    from pocketfed.model.shipped import located, starts_untrained
    from pocketfed.model.tokenization import train_vocabulary

    if starts_untrained(model):
        config = preset(model)
        vocabulary = train_vocabulary([t for e in dataset.train for t in (e.text, e.text_pair) if t], config.vocab_size)
        config = config.with_changes(vocab_size=len(vocabulary))
        built = build_artifact(
            folder,
            config=config,
            state={},
            vocabulary=vocabulary,
            labels=dataset.labels,
            trainable_sets=[train or "full"],
            quantized=False,
            max_length=max_length,
            preset=model,
            seed=seed,
        )
    else:
        given = located(model)
        checkpoint = load(given)
        built = build_artifact(
            folder,
            config=checkpoint.config,
            state=checkpoint.state,
            vocabulary=tokens_of(checkpoint),
            labels=dataset.labels,
            trainable_sets=[train or "lora:8"],
            quantized=checkpoint.quantization is not None,
            keep=checkpoint.kept_float,
            head_labels=checkpoint.labels,
            max_length=max_length,
            preset=given.name,
            seed=seed,
        )
    return open_artifact(built.folder, built.version)


def encode_examples(trainer: PlanTrainer, examples: Sequence[Example], max_length: int) -> Examples:
    """Labelled examples as ids and label indices."""
    index = {label: i for i, label in enumerate(trainer.artifact.manifest.labels)}
    usable = [e for e in examples if e.label in index]
    rows = trainer.encode([e.text for e in usable], [e.text_pair for e in usable], max_length)
    return Examples(rows, np.array([index[e.label or ""] for e in usable], np.int64), truncated=rows.truncated)


def device_names(count: int) -> list[str]:
    """device-000 … : their order is that of their numbers."""
    width = max(3, len(str(count - 1)))
    return [f"device-{i:0{width}d}" for i in range(count)]
