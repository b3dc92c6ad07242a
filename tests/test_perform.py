"""One assignment, one reply: the same bits on a device, in a simulation and under Flower."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np
import pytest

from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.errors import NoExamples, TrainingStopped
from pocketfed.client_sdk.order import derive_seed
from pocketfed.client_sdk.perform import Task, perform
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples, TrainConfig, evaluate, train
from pocketfed.model.parameters import encode_vector
from pocketfed.model.tasks import Dataset

CONFIG = TrainConfig(epochs=2, batch_size=8, learning_rate=2e-3, proximal_mu=0.1, seed=11, max_length=32)


def examples_of(trainer: PlanTrainer, dataset: Dataset, user: str) -> Examples:
    mine = [e for e in dataset.train if e.user == user]
    labels = trainer.artifact.manifest.labels
    return Examples(trainer.encode([e.text for e in mine]), np.array([labels.index(e.label or "") for e in mine]))


@pytest.fixture(scope="module")
def trainer(nano_artifact: Artifact) -> PlanTrainer:
    return PlanTrainer(nano_artifact, "lora:4")


@pytest.fixture(scope="module")
def examples(trainer: PlanTrainer, tiny_dataset: Dataset) -> Examples:
    return examples_of(trainer, tiny_dataset, "user-1")


def task(trainer: PlanTrainer, **changes: Any) -> Task:
    return dataclasses.replace(Task("train", trainer.initial_theta(), CONFIG, round=3, device="ada"), **changes)


def test_a_reply_is_the_same_bits_with_a_fresh_trainer(
    trainer: PlanTrainer, examples: Examples, nano_artifact: Artifact
) -> None:
    first = perform(trainer, task(trainer), examples)
    again = perform(PlanTrainer(nano_artifact, "lora:4"), task(trainer), examples)
    assert first.delta.tobytes() == again.delta.tobytes()
    assert first.num_examples == again.num_examples == len(examples) == 16
    assert set(first.metrics) == {"loss", "accuracy", "steps", "seconds"}
    assert all(first.metrics[k] == again.metrics[k] for k in ("loss", "accuracy", "steps"))
    assert np.abs(first.delta).max() > 0


def test_every_device_and_round_trains_in_an_order_of_its_own(trainer: PlanTrainer, examples: Examples) -> None:
    reseeded = dataclasses.replace(CONFIG, seed=12)
    changes: list[dict[str, Any]] = [{}, {"device": "bob"}, {"round": 4}, {"config": reseeded}]
    deltas = {perform(trainer, task(trainer, **c), examples).delta.tobytes() for c in changes}
    assert len(deltas) == 4


def test_training_is_the_loop_with_the_devices_own_seed(trainer: PlanTrainer, examples: Examples) -> None:
    asked = task(trainer)
    by_hand = train(trainer, asked.theta, examples, dataclasses.replace(CONFIG, seed=derive_seed(11, 3, "ada")))
    assert perform(trainer, asked, examples).delta.tobytes() == by_hand.delta.tobytes()


def test_an_evaluation_sends_measurements_and_no_delta(trainer: PlanTrainer, examples: Examples) -> None:
    asked = task(trainer, kind="evaluate")
    before = asked.theta.tobytes()
    reply = perform(trainer, asked, examples)
    assert reply.delta.size == 0
    assert reply.num_examples == 16
    assert reply.metrics == evaluate(trainer, asked.theta, examples)
    assert set(reply.metrics) == {"loss", "accuracy"}
    assert asked.theta.tobytes() == before


def test_nothing_to_train_on_or_a_stop_gives_no_reply_at_all(trainer: PlanTrainer, examples: Examples) -> None:
    nobody = Examples((), np.zeros(0, np.int64))
    for kind in ("train", "evaluate"):
        with pytest.raises(NoExamples):
            perform(trainer, task(trainer, kind=kind), nobody)
    with pytest.raises(TrainingStopped):
        perform(trainer, task(trainer), examples, should_stop=lambda: True)


def message(kind: str, theta: Any, config: TrainConfig, round_number: int) -> Any:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

    from pocketfed.coordinator import flwr_compat

    flwr_compat.enter_run(1)
    values = {name.replace("_", "-"): value for name, value in dataclasses.asdict(config).items()}
    settings = ConfigRecord({**values, "server-round": round_number})
    content = RecordDict({"arrays": ArrayRecord({"theta": Array(theta)}), "config": settings})
    return Message(content, dst_node_id=1, message_type=kind)


def context(device: str) -> Any:
    from flwr.app import Context, RecordDict

    return Context(run_id=1, node_id=1, node_config={"device": device}, state=RecordDict(), run_config={})


@pytest.fixture(scope="module")
def app(trainer: PlanTrainer, examples: Examples) -> Any:
    from pocketfed.client_sdk.flower_app import make_client_app

    return make_client_app(lambda: trainer, lambda c: (str(c.node_config["device"]), examples))


def test_flowers_client_app_replies_theta_plus_the_delta_of_perform_to_the_bit(
    trainer: PlanTrainer, examples: Examples, app: Any
) -> None:
    asked = task(trainer)
    reply = app(message("train", asked.theta, CONFIG, 3), context("ada"))
    expected = perform(trainer, asked, examples)
    assert not reply.has_error()
    sent = reply.content["arrays"]["theta"].numpy()
    assert sent.dtype == np.float32
    assert sent.tobytes() == (asked.theta + expected.delta).tobytes()
    metrics = dict(reply.content["metrics"])
    assert metrics["num-examples"] == 16
    assert metrics["loss"] == expected.metrics["loss"]
    wire = encode_vector("delta", expected.delta)
    assert dict(reply.content["update"]) == {"bytes": len(wire), "digest": hashlib.sha256(wire).hexdigest()}


def test_flowers_client_app_evaluates_as_perform_does_and_sends_no_arrays(
    trainer: PlanTrainer, examples: Examples, app: Any
) -> None:
    theta = trainer.initial_theta()
    reply = app(message("evaluate", theta, CONFIG, 3), context("ada"))
    assert set(reply.content) == {"metrics"}
    expected = perform(trainer, task(trainer, kind="evaluate"), examples)
    assert dict(reply.content["metrics"]) == {"num-examples": 16, **expected.metrics}
