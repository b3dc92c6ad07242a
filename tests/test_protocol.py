"""docs/protocol.md: the numbers that other clients check themselves by are those of the SDK."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pocketfed.client_sdk.optimizers import AdamW, Optimizer, Sgd
from pocketfed.client_sdk.order import derive_seed, epoch_order, permutation, split
from pocketfed.client_sdk.trainer import Batch, Examples, TrainConfig, learning_rate_at, train
from pocketfed.client_sdk.trust import Trust
from pocketfed.model.parameters import Vector, encode_vector

PAGE = Path(__file__).resolve().parents[1] / "docs" / "protocol.md"
NUMBERS: dict[str, Any] = json.loads(PAGE.read_text().rsplit("```json\n", 1)[1].split("```")[0])


def test_the_order() -> None:
    stated = NUMBERS["order"]
    seed = derive_seed(int(stated["seed"]), stated["round"], stated["name"])
    assert str(seed) == stated["derived"]
    assert permutation(5, 0).tolist() == stated["permutation_of_5_from_0"]
    for epoch, batches in enumerate(stated["epochs"]):
        assert [b.tolist() for b in epoch_order(stated["tokens"], stated["batch_size"], seed, epoch)] == batches
    assert split(5, stated["holdout"], seed)[0].tolist() == stated["held_out"]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rates(schedule: str) -> None:
    config = TrainConfig(learning_rate=0.1, warmup=0.25, schedule=schedule)
    stated = NUMBERS["rates"][schedule]
    assert [learning_rate_at(step, 10, config) for step in range(10)] == pytest.approx(stated, rel=1e-8)


class Stated:
    """A model that gives the page's gradients, one after the other; the other half of the test is `train` itself."""

    identity, size, task, outputs = "stated", 2, "classification", 2

    def __init__(self, gradients: list[list[float]]) -> None:
        self.left = list(gradients)
        self.at: list[Vector] = []

    def encode(self, texts: Any, pairs: Any, max_length: int) -> Any:
        raise NotImplementedError

    def prepare(self, rows: Any, should_stop: Any) -> None:
        pass

    def gradient(self, theta: Vector, batch: Batch) -> tuple[float, int, Vector]:
        self.at.append(theta.copy())
        return 1.0, 1, np.array(self.left.pop(0), np.float32)

    def evaluate(self, theta: Vector, batch: Batch) -> Any:
        raise NotImplementedError

    def logits(self, theta: Vector, ids: Any, mask: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("name", "own"), [("sgd", {"momentum": 0.9}), ("adamw", {"weight_decay": 0.1})], ids=["sgd", "adamw"]
)
def test_the_steps(name: str, own: dict[str, float]) -> None:
    """The rates 0.05 and 0.1 are those of a warm-up over both of two steps."""
    stated = NUMBERS["steps"]
    config = TrainConfig(
        epochs=2, batch_size=1, optimizer=name, learning_rate=0.15, warmup=1.0, max_grad_norm=0.25, proximal_mu=0.5
    )
    config = dataclasses.replace(config, **own)
    assert [learning_rate_at(step, 2, config) for step in (0, 1)] == pytest.approx([0.05, 0.1])
    start = np.array(stated["theta_0"], np.float32)
    model = Stated(stated["gradients"])
    trained = train(model, start, Examples((np.array([1]),), np.array([0])), config)
    assert model.at[1] == pytest.approx(stated[name][0], rel=1e-7)
    assert start + trained.delta == pytest.approx(stated[name][1], rel=2e-7)


def test_the_optimizers_alone() -> None:
    """As other languages will test them: gradients as they are after FedProx and clipping."""
    made: dict[str, Optimizer] = {"sgd": Sgd(0.0, 0.9), "adamw": AdamW(0.0, 0.1)}
    for name, optimizer in made.items():
        theta = np.array(NUMBERS["steps"]["theta_0"], np.float32)
        optimizer.learning_rate = 0.05
        optimizer.step(theta, np.array([0.15, 0.2], np.float32))  # [0.3, 0.4] has norm 0.5, and 0.25 is allowed
        assert theta == pytest.approx(NUMBERS["steps"][name][0], rel=1e-7)


def test_the_bytes_of_a_vector() -> None:
    stated = NUMBERS["vector"]
    data = encode_vector("delta", np.array(stated["delta"], np.float32))
    assert data.hex() == stated["bytes"]
    assert hashlib.sha256(data).hexdigest() == stated["sha256"]


@dataclasses.dataclass
class Said:
    statement: bytes
    signature: bytes


def test_the_signed_list(tmp_path: Path) -> None:
    stated = NUMBERS["signed"]
    statement = stated["statement"].encode()
    root = Ed25519PrivateKey.from_private_bytes(bytes(32))
    assert root.sign(statement).hex() == stated["signature"]
    trust = Trust(tmp_path / "trust.json", root.public_key().public_bytes_raw().hex())
    trust.learn_keys(Said(statement, bytes.fromhex(stated["signature"])))
    assert trust.list_sequence == 1
