"""What several test modules share: a small dataset, and one artifact built from it per session."""

from __future__ import annotations

import os

# Before anything imports flwr, torch or onnxruntime.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import random
from typing import TYPE_CHECKING

import pytest

from pocketfed.model.tasks import Dataset, Example

if TYPE_CHECKING:
    from pocketfed.client_sdk.artifacts import Artifact
    from pocketfed.coordinator.artifacts import BuiltArtifact

TRAINABLE_SETS = ("full", "norms", "lora:4", "head")
# For each intent, how it is asked and about what. "the" and "please" say nothing, and "light" is in two intents.
_ASKED = {
    "alarm": (("wake me at", "set an alarm for", "get me up at"), ("six", "seven thirty", "noon", "first light")),
    "lights": (("turn on the", "switch off the", "dim the"), ("lamp", "kitchen light", "hall light", "bulbs")),
    "music": (("play", "put on", "i want to hear"), ("some jazz", "my songs", "the radio", "a waltz")),
    "weather": (("will it", "does it", "is it going to"), ("rain today", "snow at noon", "be cold", "be sunny")),
}


def make_examples(count: int, seed: int) -> tuple[Example, ...]:
    """The labels in turn, spoken by user-0 … user-5, a dozen sentences a label."""
    random_ = random.Random(seed)
    labels = sorted(_ASKED)
    examples = []
    for i in range(count):
        openings, subjects = _ASKED[labels[i % len(labels)]]
        text = f"{random_.choice(openings)} {random_.choice(subjects)}"
        text = f"please {text}" if random_.random() < 0.3 else text
        examples.append(Example(text, labels[i % len(labels)], user=f"user-{i % 6}"))
    return tuple(examples)


@pytest.fixture(scope="session")
def tiny_dataset() -> Dataset:
    """96 training and 24 test examples of 4 labels, equally many of each."""
    return Dataset(
        name="tiny",
        train=make_examples(96, seed=1),
        dev=(),
        test=make_examples(24, seed=2),
        labels=tuple(sorted(_ASKED)),
        skipped={},
    )


@pytest.fixture(scope="session")
def nano_built(tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> BuiltArtifact:
    """An untrained `nano` with int8 backbone and four trainable sets, as the coordinator builds it."""
    import torch

    from pocketfed.coordinator.artifacts import build_artifact
    from pocketfed.model.config import STUDENTS
    from pocketfed.model.tokenization import train_vocabulary

    torch.set_num_threads(1)
    vocabulary = train_vocabulary((e.text for e in tiny_dataset.train), 256)
    return build_artifact(
        tmp_path_factory.mktemp("nano") / "artifact",
        config=STUDENTS["nano"].with_changes(vocab_size=len(vocabulary)),
        state={},
        vocabulary=vocabulary,
        labels=tiny_dataset.labels,
        trainable_sets=TRAINABLE_SETS,
        quantized=True,
        max_length=32,
        preset="nano",
        seed=7,
    )


@pytest.fixture(scope="session")
def nano_artifact(nano_built: BuiltArtifact) -> Artifact:
    """`nano_built`, opened as a device opens it. Shared: do not change its files."""
    from pocketfed.client_sdk.artifacts import open_artifact

    return open_artifact(nano_built.folder, nano_built.version)
