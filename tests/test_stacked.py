"""One pass for K sets of trained parameters gives what K passes give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pocketfed.model.adapters import get_theta, select, set_theta
from pocketfed.model.config import STUDENTS
from pocketfed.model.heads import TextClassifier
from pocketfed.model.lean import lean
from pocketfed.model.losses import task_loss
from pocketfed.model.stacked import StackedStudent

SMALL = {
    "vocab_size": 30,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intra_bottleneck_size": 16,
    "intermediate_size": 24,
}


def student(
    trainable_set: str, task: str = "classification", activations: str = "float32", **changes: object
) -> TextClassifier:
    torch.manual_seed(1)
    config = STUDENTS["nano"].with_changes(**SMALL | {"embedding_size": 16} | changes)
    labels = {"classification": 3, "regression": 1, "tokens": 4, "spans": 2}[task]
    return lean(select(TextClassifier(config, labels, 2, task).eval(), trainable_set), activations)


@pytest.mark.parametrize(
    ("trainable_set", "task", "changes"),
    [
        ("head", "classification", {}),
        ("norms", "classification", {}),
        ("norms", "classification", {"normalization_type": "layer_norm"}),
        ("bias", "classification", {}),
        ("lora:4", "classification", {}),
        ("lora:2:qv@1", "regression", {}),
        ("ladder:8", "classification", {}),
        ("ladder:8", "tokens", {}),
        ("last:1", "classification", {}),
        ("lora:4", "spans", {}),
    ],
)
def test_losses_and_gradients_of_three_thetas_are_those_of_each_alone(
    trainable_set: str, task: str, changes: dict[str, object]
) -> None:
    """Batches of 4, 2 and 1 texts: what fills a batch up has weight 0 and one real token."""
    random = np.random.default_rng(2)
    ids, mask = random.integers(5, 30, (3, 4, 6)), np.ones((3, 4, 6), np.int64)
    mask[0, 1, 4:], mask[1, :, 5:], mask[1, 2:, 1:], mask[2, 1:, 1:] = 0, 0, 0, 0
    weights = np.array([[1, 1, 0.5, 1], [1, 2, 0, 0], [1, 0, 0, 0]], np.float32)
    shape = {"classification": (3, 4), "regression": (3, 4), "tokens": (3, 4, 6), "spans": (3, 4, 2)}[task]
    labels = random.integers(0, 1 if task == "spans" else 3, shape)
    if task == "regression":
        labels = labels.astype(np.float32)
    model = student(trainable_set, task, **changes)
    start = get_theta(model)
    theta = start + (random.standard_normal((3, start.size)) * 0.1).astype(np.float32)
    alone = []
    for k in range(3):
        set_theta(model, theta[k])
        trained = [p for p in model.parameters() if p.requires_grad]
        logits = model(torch.from_numpy(ids[k]), torch.from_numpy(mask[k]))
        given = (
            torch.from_numpy(mask[k]),
            torch.from_numpy(labels[k]),
            torch.from_numpy(weights[k]),
            torch.tensor(0.1),
        )
        loss, correct, _ = task_loss(task, logits, *given)
        gradients = torch.autograd.grad(loss, trained)
        alone.append((loss.item(), int(correct), torch.cat([g.reshape(-1) for g in gradients]).numpy()))
    assert StackedStudent.takes(model)
    stacked = StackedStudent(model)
    prefix = None
    if model.depth == SMALL["num_hidden_layers"]:
        with torch.no_grad():
            prefix = model.prefix(torch.from_numpy(ids).flatten(0, 1), torch.from_numpy(mask).flatten(0, 1))
        prefix = prefix.unflatten(0, (3, 4)).numpy()
    for hidden in [None] if prefix is None else [None, prefix]:
        losses, right, gradients = stacked.gradient(theta, hidden, ids, mask, labels, weights, 0.1)
        for k, (loss, correct, gradient) in enumerate(alone):
            assert losses[k] == pytest.approx(loss, abs=1e-5)
            assert right[k] == correct
            assert np.abs(gradient).max() > 1e-4
            assert np.abs(gradients[k] - gradient).max() < 1e-5


@pytest.mark.parametrize(("trainable_set", "activations"), [("full", "float32"), ("bias", "int8")])
def test_embeddings_and_products_of_8_bit_activations_have_no_batched_form(
    trainable_set: str, activations: str
) -> None:
    model = student(trainable_set, activations=activations)
    assert not StackedStudent.takes(model)
    with pytest.raises(ValueError, match="which is not trained for many devices at once"):
        StackedStudent(model)
