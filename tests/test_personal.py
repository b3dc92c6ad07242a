"""Personal heads: where devices mean different things by the same labels, a shared head fails and their own succeed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.flower_app import make_client_app
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples
from pocketfed.coordinator.artifacts import BuiltArtifact, publish_artifact
from pocketfed.coordinator.config import LocalTraining, RunConfig, UpdateForm
from pocketfed.coordinator.rounds import RoundResult, create_run, drive_run, personal_means
from pocketfed.coordinator.store import Store, Update, device_named
from pocketfed.model.tasks import Dataset
from pocketfed.simulations.grids import InProcessGrid
from pocketfed.simulations.run import encode_examples

DEVICES = 4
LOCAL = LocalTraining(epochs=2, batch_size=8, learning_rate=5e-3, max_length=32)


def permuted(trainer: PlanTrainer, dataset: Dataset) -> dict[str, Examples]:
    """24 examples a device; device d calls label l what is label l + d to the first."""
    whole = encode_examples(trainer, dataset.train, 32)
    made: dict[str, Examples] = {}
    for d in range(DEVICES):
        part = whole.take(range(24 * d, 24 * d + 24))
        made[f"device-{d}"] = Examples(part.rows, (np.asarray(part.labels) + d) % 4)
    return made


def run(folder: Path, built: BuiltArtifact, artifact: Artifact, dataset: Dataset, update: UpdateForm) -> RoundResult:
    """12 rounds; the last one, with the accuracy on the devices' own examples."""
    trainer, results = PlanTrainer(artifact, "full"), list[RoundResult]()
    local = permuted(trainer, dataset)
    store = Store(str(folder / "fleet.db"))
    with store.write() as session:
        publish_artifact(session, built, "stable", "full")
        nodes = {device_named(session, name).id: name for name in local}
    config = RunConfig(rounds=12, min_devices=DEVICES, seed=1, local=LOCAL, update=update, evaluate_on_devices=True)
    run_id = create_run(store, config)
    app = make_client_app(
        lambda: trainer, lambda c: (str(c.node_config["device"]), local[str(c.node_config["device"])])
    )
    drive_run(store, run_id, InProcessGrid(store, run_id, app, nodes, 0), config, None, results.append)
    with store.read() as session:
        told = {name for update in session.query(Update) if update.bytes == 0 for name in update.metrics}
    store.close()
    assert told == ({"examples", "correct", "loss_sum"} if update.private else {"loss", "accuracy"})
    return results[-1]


def test_a_private_head_learns_what_a_shared_one_cannot(
    tmp_path: Path, nano_built: BuiltArtifact, nano_artifact: Artifact, tiny_dataset: Dataset
) -> None:
    """To a shared head every text has all four labels: a quarter is the best it can do."""
    for name in ("shared", "personal"):
        (tmp_path / name).mkdir()
    shared = run(tmp_path / "shared", nano_built, nano_artifact, tiny_dataset, UpdateForm())
    personal = run(tmp_path / "personal", nano_built, nano_artifact, tiny_dataset, UpdateForm(private=("classifier",)))
    assert shared.accuracy is not None
    assert personal.accuracy is not None
    assert shared.accuracy < 0.5
    assert personal.accuracy > 0.9
    assert personal.bytes_up < shared.bytes_up


def test_totals_over_devices_are_sums_of_counts_and_no_device_counts_more_than_its_examples() -> None:
    told = [
        {"examples": 10.0, "correct": 5.0, "loss_sum": 20.0, "num-examples": 10},
        {"examples": 30.0, "correct": 30.0, "loss_sum": 0.0, "num-examples": 10},  # capped by the run
        {"examples": 10.0, "correct": 99.0, "loss_sum": 0.0, "num-examples": 10},  # cannot be
        {"examples": 10.0, "correct": 1.0, "loss_sum": float("nan"), "num-examples": 10},
    ]
    means = {"examples": 1.0, "correct": 1.0, "loss_sum": 1.0, "other": 3.0}
    assert personal_means(told, means) == {
        "examples": 20.0,
        "correct": 15.0,
        "loss_sum": 20.0,
        "accuracy": 0.75,
        "loss": 1.0,
        "other": 3.0,
    }
    assert personal_means([], {"accuracy": 0.5}) == {"accuracy": 0.5}
    assert personal_means(told[2:], means) == {"examples": 0.0, "correct": 0.0, "loss_sum": 0.0, "other": 3.0}


@pytest.mark.parametrize("seeded", [True, False])
def test_noise_in_a_simulation_is_reproducible_where_it_is_asked_to_be(
    tmp_path: Path, nano_built: BuiltArtifact, nano_artifact: Artifact, tiny_dataset: Dataset, seeded: bool
) -> None:
    ends = set()
    for attempt in range(2):
        trainer = PlanTrainer(nano_artifact, "head")
        local = {"device-0": encode_examples(trainer, tiny_dataset.train[:12], 32)}
        store = Store(str(tmp_path / f"{attempt}.db"))
        with store.write() as session:
            publish_artifact(session, nano_built, "stable", "head")
            nodes = {device_named(session, name).id: name for name in local}
        update = UpdateForm(clip_norm=0.1, noise=0.5)
        config = RunConfig(rounds=1, min_devices=1, seed=1, local=LOCAL, update=update)
        run_id = create_run(store, config)
        app = make_client_app(lambda t=trainer: t, lambda c, e=local["device-0"]: ("device-0", e), seeded)  # type: ignore[misc]
        theta = drive_run(store, run_id, InProcessGrid(store, run_id, app, nodes, 0), config)
        store.close()
        ends.add(theta.tobytes())
    assert len(ends) == (1 if seeded else 2)
