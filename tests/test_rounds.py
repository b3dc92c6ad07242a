"""A run, round by round: what it writes, what it survives, and that the same seed gives the same bits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.flower_app import make_client_app
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples, TrainConfig, evaluate

# isort: split
from flwr.app import Array, ArrayRecord, Context, Message

from pocketfed.coordinator.artifacts import BuiltArtifact, publish_artifact
from pocketfed.coordinator.config import LocalTraining, RunConfig
from pocketfed.coordinator.rounds import RoundResult, RunError, create_run, drive_run, starting_theta
from pocketfed.coordinator.standing import last_refusal, last_step, recall
from pocketfed.coordinator.store import (
    Assignment,
    Device,
    Metric,
    Release,
    Round,
    Run,
    Store,
    Update,
    device_named,
    get_blob,
    latest_release,
    put_artifact,
    put_blob,
)
from pocketfed.coordinator.strategy import StrategyError
from pocketfed.coordinator.validation import History
from pocketfed.model.parameters import Vector, decode_vector
from pocketfed.model.tasks import Dataset
from pocketfed.simulations.central import train_centrally
from pocketfed.simulations.grids import InProcessGrid
from pocketfed.simulations.run import SimulationConfig, SimulationResult, device_names, encode_examples, simulate

Tamper = Callable[[Message], Message]
LOCAL = LocalTraining(batch_size=4, learning_rate=0.01, max_length=32)


class Fleet:
    """Virtual devices of 12 examples each, training the head of the nano student."""

    def __init__(
        self, database: str, built: BuiltArtifact, artifact: Artifact, dataset: Dataset, count: int = 4
    ) -> None:
        self.store = Store(database)
        self.trainer = PlanTrainer(artifact, "head")
        self.artifact = artifact
        everything = encode_examples(self.trainer, dataset.train, 32)
        self.test = encode_examples(self.trainer, dataset.test, 32)
        self.local = {f"device-{i}": everything.take(range(12 * i, 12 * i + 12)) for i in range(count)}
        self.tamper: dict[str, Tamper] = {}
        self.results: list[RoundResult] = []
        self.settled: list[list[str]] = []
        with self.store.write() as session:
            publish_artifact(session, built, "stable", "head")
            self.nodes = {device_named(session, name).id: name for name in self.local}
        self.app = make_client_app(lambda: self.trainer, self.examples_of)

    def examples_of(self, context: Context) -> tuple[str, Examples]:
        name = str(context.node_config["device"])
        return name, self.local[name]

    def call(self, message: Message, context: Context) -> Message:
        """What a device does; a tampering one changes its reply afterwards."""
        reply = self.app(message, context)
        return self.tamper.get(self.nodes[message.metadata.dst_node_id], lambda same: same)(reply)

    def drive(self, measure: bool = True, should_stop: Callable[[], bool] = lambda: False, **settings: Any) -> Vector:
        config = RunConfig(**({"min_devices": 1, "rounds": 2, "seed": 3, "local": LOCAL} | settings))
        self.run_id = create_run(self.store, config)
        grid = InProcessGrid(self.store, self.run_id, self.call, self.nodes, self.artifact.manifest.bytes)
        self.results, self.settled = [], []
        measured = (lambda theta: evaluate(self.trainer, theta, self.test)) if measure else None
        return drive_run(
            self.store,
            self.run_id,
            grid,
            config,
            measured,
            self.results.append,
            self.settled.append,
            should_stop=should_stop,
        )

    def rows(self, table: type[Any]) -> list[Any]:
        with self.store.read() as session:
            mine = sa.select(table)
            if table is Update:
                mine = mine.join(Assignment).where(Assignment.run_id == self.run_id).order_by(Update.assignment_id)
            else:
                mine = mine.where((table.id if table is Run else table.run_id) == self.run_id)
            return list(session.scalars(mine))


@pytest.fixture
def fleet(database: str, nano_built: BuiltArtifact, nano_artifact: Artifact, tiny_dataset: Dataset) -> Iterator[Fleet]:
    made = Fleet(database, nano_built, nano_artifact, tiny_dataset)
    yield made
    made.store.close()


# ---- what is written -------------------------------------------------------------------------------------------------


def test_a_run_writes_its_rounds_with_accuracy_bytes_and_parameters(fleet: Fleet) -> None:
    theta = fleet.drive()
    (run,) = fleet.rows(Run)
    assert (run.status, run.reason, run.rounds_planned, run.trainable_set) == ("finished", None, 2, "head")
    assert run.config == RunConfig(min_devices=1, rounds=2, seed=3, local=LOCAL).to_dict()
    assert run.created_at <= run.started_at <= run.finished_at

    start, first, last = fleet.rows(Round)
    assert [(r.number, r.status, r.devices, r.failed) for r in (start, first, last)] == [
        (0, "finished", 0, 0),
        (1, "finished", 4, 0),
        (2, "finished", 4, 0),
    ]
    assert last.loss < first.loss < start.loss
    assert last.accuracy > start.accuracy
    assert start.train_loss is None
    assert first.train_loss > last.train_loss
    vector = 4 * fleet.trainer.size  # bytes of float32 values
    updates = fleet.rows(Update)
    assert first.bytes_up == last.bytes_up == 4 * updates[0].bytes
    assert vector < updates[0].bytes < vector + 200  # a safetensors header
    assert last.bytes_down == first.bytes_up  # theta, as long as a delta but for its name
    assert first.bytes_down == last.bytes_down + 4 * fleet.artifact.manifest.bytes
    with fleet.store.read() as session:
        assert (
            decode_vector("theta", get_blob(session, last.parameters), fleet.trainer.size).tobytes() == theta.tobytes()
        )


def test_every_assignment_and_update_is_kept_with_what_became_of_it(fleet: Fleet) -> None:
    fleet.drive()
    assignments, updates = fleet.rows(Assignment), fleet.rows(Update)
    assert sorted(a.id for a in assignments) == [u.assignment_id for u in updates]
    assert {(a.round, a.device_id, a.kind, a.status, a.attempt) for a in assignments} == {
        (n, d, "train", "aggregated", 1) for n in (1, 2) for d in fleet.nodes
    }
    assert all(u.num_examples == 12 and u.norm > 0 and u.reason is None and u.metrics["loss"] > 0 for u in updates)
    assert all(a.finished_at is not None and a.error is None for a in assignments)
    assert [sorted(ids) for ids in fleet.settled] == [sorted(a.id for a in assignments if a.round == n) for n in (1, 2)]
    assert {(m.round, m.name) for m in fleet.rows(Metric)} >= {
        (2, "train_loss"),
        (2, "train_accuracy"),
        (2, "accuracy"),
        (2, "loss"),
    }


def test_what_is_told_is_what_is_stored(fleet: Fleet) -> None:
    fleet.drive()
    for told, kept in zip(fleet.results, fleet.rows(Round), strict=True):
        for name in (
            "number",
            "status",
            "accuracy",
            "loss",
            "train_loss",
            "devices",
            "failed",
            "bytes_up",
            "bytes_down",
            "seconds",
        ):
            assert getattr(told, name) == getattr(kept, name)


def test_a_run_of_one_device_is_training_on_that_device(fleet: Fleet) -> None:
    from pocketfed.client_sdk.order import derive_seed

    fleet.nodes = dict(list(fleet.nodes.items())[:1])
    theta = fleet.drive(rounds=1)
    (name,) = fleet.nodes.values()
    config = TrainConfig(**dataclasses.asdict(LOCAL), seed=derive_seed(3, 1, name))
    assert np.array_equal(theta, train_centrally(fleet.trainer, fleet.local[name], config))


def test_a_rate_that_falls_over_the_rounds_is_what_devices_step_by(fleet: Fleet) -> None:
    fleet.nodes = dict(list(fleet.nodes.items())[:1])
    # One step of a gradient that is cut to length 0.01: a round goes 0.01 times its rate.
    local = LocalTraining(optimizer="sgd", learning_rate=1.0, max_grad_norm=0.01, batch_size=4, max_steps=1)
    fleet.drive(rounds=4, round_schedule="linear", local=local, measure=False)
    walked = [m.value for m in sorted(fleet.rows(Metric), key=lambda m: m.round) if m.name == "step_norm"]
    assert walked == pytest.approx([0.01, 0.0075, 0.005, 0.0025], rel=1e-3)


def test_the_result_is_released_and_the_next_run_starts_from_it(fleet: Fleet) -> None:
    theta = fleet.drive(rounds=1)
    with fleet.store.read() as session:
        release = latest_release(session, "stable")
        assert release is not None
        assert release.run_id == fleet.run_id
        assert (
            decode_vector("theta", get_blob(session, release.parameters), fleet.trainer.size).tobytes()
            == theta.tobytes()
        )
    following = create_run(fleet.store, RunConfig())
    assert starting_theta(fleet.store, following)[0].tobytes() == theta.tobytes()


def test_a_run_told_not_to_release_leaves_the_channel_alone(fleet: Fleet) -> None:
    fleet.drive(rounds=1, release=False)
    with fleet.store.read() as session:
        release = latest_release(session, "stable")
        assert release is not None
        assert release.run_id is None


def test_a_result_is_not_released_over_what_was_published_meanwhile(fleet: Fleet) -> None:
    def publish(reply: Message) -> Message:
        with fleet.store.write() as session:
            put_artifact(session, {}, "f" * 64, [])
            other = Release(channel="stable", artifact_version="f" * 64, trainable_set="head")
            other.parameters = put_blob(session, b"")
            session.add(other)
        return reply

    fleet.tamper = {"device-0": publish}
    fleet.drive(rounds=1)
    (run,) = fleet.rows(Run)
    why = "not released: 'stable' has gone on to the artifact ffffffffffff"
    assert (run.status, run.reason) == ("finished", why)
    with fleet.store.read() as session:
        release = latest_release(session, "stable")
        assert release is not None
        assert (release.artifact_version, release.run_id) == ("f" * 64, None)


def test_a_cohort_is_that_many_devices_a_round_and_not_always_the_same(fleet: Fleet) -> None:
    fleet.drive(rounds=6, cohort=2, measure=False)
    cohorts = [frozenset(a.device_id for a in fleet.rows(Assignment) if a.round == n) for n in range(1, 7)]
    assert {len(cohort) for cohort in cohorts} == {2}
    assert len(set(cohorts)) > 1
    assert [r.devices for r in fleet.results] == [0, 2, 2, 2, 2, 2, 2]


def test_devices_measure_the_result_on_their_own_examples(fleet: Fleet) -> None:
    theta = fleet.drive(rounds=1, measure=False, evaluate_on_devices=True)
    last = fleet.rows(Round)[-1]
    everything = [evaluate(fleet.trainer, theta, local) for local in fleet.local.values()]  # 12 examples each
    assert last.accuracy == pytest.approx(np.mean([m["accuracy"] for m in everything]))
    assert last.loss == pytest.approx(np.mean([m["loss"] for m in everything]))
    metrics = {m.name: m.value for m in fleet.rows(Metric) if m.round == 1}
    assert metrics["device_accuracy"] == last.accuracy
    assert {(a.kind, a.status) for a in fleet.rows(Assignment)} == {("train", "aggregated"), ("evaluate", "aggregated")}


def test_with_a_test_set_the_devices_own_numbers_stand_beside_its(fleet: Fleet) -> None:
    theta = fleet.drive(rounds=1, evaluate_on_devices=True)
    assert fleet.rows(Round)[-1].accuracy == evaluate(fleet.trainer, theta, fleet.test)["accuracy"]
    assert "device_accuracy" in {m.name for m in fleet.rows(Metric)}


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def with_theta(change: Callable[[Vector], np.ndarray[Any, Any]]) -> Tamper:
    def tamper(reply: Message) -> Message:
        reply.content["arrays"] = ArrayRecord({"theta": Array(change(reply.content["arrays"]["theta"].numpy()))})
        return reply

    return tamper


def with_weight(value: float) -> Tamper:
    def tamper(reply: Message) -> Message:
        reply.content["metrics"]["num-examples"] = value
        return reply

    return tamper


def one_nan(theta: Vector) -> Vector:
    return np.concatenate([theta[:-1], np.array([np.nan], np.float32)])


@pytest.mark.parametrize(
    ("tamper", "why"),
    [
        (with_theta(one_nan), "values are not finite"),
        (with_theta(lambda theta: np.zeros(1, np.float32)), "expected shape ("),
        (with_theta(lambda theta: theta.astype(np.float64)), "'theta' is float64"),
        (with_theta(lambda theta: theta * np.float32(1e6)), "exceeds the run's limit 1000"),
        (with_weight(0), "num-examples is 0; expected a number of at least 1"),
        (with_weight(-9), "num-examples is -9"),
    ],
)
def test_a_hostile_update_is_quarantined_and_the_aggregate_is_as_without_that_device(
    fleet: Fleet, tamper: Tamper, why: str
) -> None:
    """Round after round: the hostile device is asked every time, and never heard."""
    settings: dict[str, Any] = {"max_update_norm": 1000.0, "release": False}
    everyone = dict(fleet.nodes)
    fleet.tamper = {"device-1": tamper}
    attacked = fleet.drive(**settings)
    bad = [a for a in fleet.rows(Assignment) if fleet.nodes[a.device_id] == "device-1"]
    assert [a.status for a in bad] == ["quarantined", "quarantined"]
    assert all(why in str(a.error) for a in bad)
    assert all(why in str(u.reason) for u in fleet.rows(Update) if u.assignment_id in {a.id for a in bad})
    assert [(r.devices, r.failed) for r in fleet.results[1:]] == [(3, 1), (3, 1)]

    fleet.nodes = {node: name for node, name in everyone.items() if name != "device-1"}
    fleet.tamper = {}
    assert fleet.drive(**settings).tobytes() == attacked.tobytes()


def test_flowers_strategies_are_shielded_in_the_same_way(fleet: Fleet) -> None:
    fleet.tamper = {"device-1": with_theta(one_nan)}
    attacked = fleet.drive(strategy="FedAvg", release=False)
    assert np.isfinite(attacked).all()
    fleet.nodes = {node: name for node, name in fleet.nodes.items() if name != "device-1"}
    assert fleet.drive(strategy="FedAvg", release=False).tobytes() == attacked.tobytes()


def test_metrics_of_a_hostile_device_cannot_end_the_run(fleet: Fleet) -> None:
    """Long names that are equal once cut, names that others lack, and an evaluation that claims no examples."""

    def tamper(reply: Message) -> Message:
        for name in ("a" * 99 + "b", "a" * 99 + "c"):
            reply.content["metrics"][name] = 1.0
        if "arrays" not in reply.content:
            reply.content["metrics"]["num-examples"] = 0
        return reply

    fleet.tamper = dict.fromkeys(fleet.local, tamper)
    fleet.drive(rounds=1, evaluate_on_devices=True)
    fleet.tamper = {"device-1": tamper}
    fleet.drive(rounds=1, evaluate_on_devices=True, strategy="FedAvg")
    assert fleet.rows(Run)[0].status == "finished"


def test_a_loss_too_large_to_average_is_not_stored_as_infinity(fleet: Fleet) -> None:
    def boast(reply: Message) -> Message:
        reply.content["metrics"]["loss"] = 1e308
        return reply

    fleet.tamper["device-1"] = boast
    with np.errstate(over="ignore"):
        fleet.drive(rounds=1)
    assert fleet.results[1].status == "finished"
    assert fleet.results[1].train_loss is None
    assert fleet.rows(Round)[1].train_loss is None


def test_fault_09_a_giant_update_is_refused_by_default_from_the_first_round_on(fleet: Fleet) -> None:
    everyone = dict(fleet.nodes)
    fleet.tamper = {"device-0": with_theta(lambda theta: theta * np.float32(1e6))}
    attacked = fleet.drive(release=False)
    bad = [a for a in fleet.rows(Assignment) if fleet.nodes[a.device_id] == "device-0"]
    assert [(a.status, str(a.error).split(":")[0]) for a in bad] == [("quarantined", "norm")] * 2
    fleet.nodes = {node: name for node, name in everyone.items() if name != "device-0"}
    fleet.tamper = {}
    assert fleet.drive(release=False).tobytes() == attacked.tobytes()


def test_a_device_that_offends_again_and_again_is_set_aside_and_told_why(fleet: Fleet) -> None:
    fleet.tamper = {"device-1": with_theta(one_nan)}
    fleet.drive(rounds=4, max_offences=2)
    node = next(node for node, name in fleet.nodes.items() if name == "device-1")
    asked = [a.round for a in fleet.rows(Assignment) if a.device_id == node]
    assert asked == [1, 2]
    assert [(r.devices, r.failed) for r in fleet.results[1:]] == [(3, 1), (3, 1), (3, 0), (3, 0)]
    with fleet.store.read() as session:
        assert last_refusal(session, node) == (
            f"the update for round 2 was not used: not_finite: 1 of the update's {fleet.trainer.size} values are not "
            "finite; after 2 such updates this run asks the device no more"
        )
        assert all(last_refusal(session, other) is None for other in fleet.nodes if other != node)


def test_nobody_is_set_aside_where_offences_do_not_count(fleet: Fleet) -> None:
    fleet.tamper = {"device-1": with_theta(one_nan)}
    fleet.drive(rounds=3, max_offences=0)
    assert [(r.devices, r.failed) for r in fleet.results[1:]] == [(3, 1)] * 3


def test_what_earlier_rounds_accepted_is_recalled_from_the_store(fleet: Fleet) -> None:
    fleet.tamper = {"device-1": with_theta(one_nan)}
    fleet.drive(rounds=2)
    good = [u for u in fleet.rows(Update) if u.reason is None]
    assert recall(fleet.store, fleet.run_id, 1) == History((), (), {})
    told = recall(fleet.store, fleet.run_id, 3)
    assert sorted(told.norms) == sorted(u.norm for u in good)
    assert told.examples == (12,) * 6
    assert told.digests == {u.digest: int(u.assignment_id.split("-")[1]) for u in good}
    assert set((recall(fleet.store, fleet.run_id, 2).digests or {}).values()) == {1}


def test_from_the_second_round_on_the_store_knows_where_each_update_pointed(fleet: Fleet) -> None:
    """Against how the round before moved theta: device-0 goes on as the fleet went, device-1 back."""
    starts: list[Vector] = []

    def call(message: Message, context: Context) -> Message:
        start, name = message.content["arrays"]["theta"].numpy(), fleet.nodes[message.metadata.dst_node_id]
        if not starts or not np.array_equal(starts[-1], start):
            starts.append(start)
        reply = fleet.app(message, context)
        if len(starts) > 1 and name in ("device-0", "device-1"):
            step = (start - starts[-2]) * np.float32(0.5 if name == "device-0" else -0.25)
            reply.content["arrays"] = ArrayRecord({"theta": Array(start + step)})
        return reply

    fleet.call = call  # type: ignore[method-assign]
    fleet.drive(rounds=3)
    told = {(a.round, fleet.nodes[a.device_id]): a.id for a in fleet.rows(Assignment)}
    cosines = {u.assignment_id: u.cosine for u in fleet.rows(Update)}
    for device in fleet.nodes.values():
        assert cosines[told[1, device]] is None  # there was no round before
    for number in (2, 3):
        assert cosines[told[number, "device-0"]] == pytest.approx(1.0, abs=1e-3)
        assert cosines[told[number, "device-1"]] == pytest.approx(-1.0, abs=1e-3)
        assert abs(cosines[told[number, "device-2"]]) < 0.99
    assert len(starts) == 3


def test_the_last_step_is_that_of_the_newest_round_that_moved_theta(fleet: Fleet) -> None:
    fleet.drive(rounds=1)
    theta, _ = starting_theta(fleet.store, fleet.run_id)
    (start,) = [r.parameters for r in fleet.rows(Round) if r.number == 0]
    with fleet.store.write() as session:
        before = decode_vector("theta", get_blob(session, start), len(theta))
        (done,) = [r for r in fleet.rows(Round) if r.number == 1]
        session.add(Round(run_id=fleet.run_id, number=2, status="failed", parameters=done.parameters))
        session.add(Round(run_id=fleet.run_id, number=3))
    step = last_step(fleet.store, fleet.run_id, theta)
    assert step is not None
    assert np.array_equal(step, theta - before)
    with fleet.store.write() as session:
        session.execute(sa.update(Round).where(Round.number == 0).values(parameters=None))
    assert last_step(fleet.store, fleet.run_id, theta) is None  # forgotten


def test_where_the_last_step_is_forgotten_the_way_from_the_start_is_not_taken_for_it(fleet: Fleet) -> None:
    theta = fleet.drive(rounds=3, retain_rounds=1)
    assert [r.number for r in fleet.rows(Round) if r.parameters] == [0, 3]
    assert last_step(fleet.store, fleet.run_id, theta) is None
    assert [u.cosine for u in fleet.rows(Update)] == [None] * 4  # of round 3


def test_what_was_clipped_and_capped_is_counted_among_the_rounds_metrics(fleet: Fleet) -> None:
    def boast(reply: Message) -> Message:
        reply.content["metrics"]["num-examples"] = 10**6
        return with_theta(lambda theta: theta + np.float32(0.5))(reply)

    fleet.tamper = {"device-1": boast}
    fleet.drive(rounds=1)
    counted = {m.name: m.value for m in fleet.rows(Metric) if m.name in ("train_clipped", "train_capped")}
    assert counted == {"train_clipped": 1.0, "train_capped": 1.0}


def test_a_device_without_examples_fails_and_the_run_goes_on(fleet: Fleet) -> None:
    fleet.local["device-2"] = Examples((), np.zeros(0, np.int64))
    fleet.drive()
    bad = [a for a in fleet.rows(Assignment) if fleet.nodes[a.device_id] == "device-2"]
    assert [a.status for a in bad] == ["failed", "failed"]
    assert all("NoExamples: the device has no labelled examples" in a.error for a in bad)
    assert [(r.status, r.devices, r.failed) for r in fleet.results[1:]] == [("finished", 3, 1)] * 2


def test_a_round_below_its_quorum_fails_and_leaves_the_model_as_it_was(fleet: Fleet) -> None:
    """Two devices fail in round 1 only."""
    hopeless = {"device-0": with_theta(one_nan), "device-1": with_theta(one_nan)}
    fleet.tamper = hopeless
    config = RunConfig(min_devices=1, rounds=2, seed=3, quorum=3, max_attempts=1, local=LOCAL)
    fleet.run_id = create_run(fleet.store, config)
    grid = InProcessGrid(fleet.store, fleet.run_id, fleet.call, fleet.nodes, 0)

    def heal(result: RoundResult) -> None:
        fleet.results.append(result)
        if result.number == 1:
            fleet.tamper = {}

    drive_run(fleet.store, fleet.run_id, grid, config, on_round=heal)
    start, failed, last = fleet.rows(Round)
    assert (failed.status, failed.reason) == ("failed", "2 of at least 3 updates were usable")
    assert failed.parameters == start.parameters
    assert (last.status, last.devices) == ("finished", 4)
    assert last.parameters != start.parameters
    assert fleet.rows(Run)[0].status == "finished"


def test_a_run_is_given_up_after_so_many_failed_rounds_in_a_row(fleet: Fleet) -> None:
    fleet.tamper = dict.fromkeys(fleet.local, with_theta(one_nan))
    with pytest.raises(
        RunError, match=r"2 rounds failed in a row, the last because 0 of at least 1 updates were usable"
    ):
        fleet.drive(rounds=9, max_failed_rounds=2, quorum=1, max_attempts=1)
    (run,) = fleet.rows(Run)
    assert run.status == "failed"
    assert run.reason.startswith("2 rounds failed in a row")
    assert run.finished_at is not None
    assert [r.status for r in fleet.rows(Round)] == ["finished", "failed", "failed"]
    with fleet.store.read() as session:
        assert latest_release(session, "stable").run_id is None  # type: ignore[union-attr]


def test_a_run_that_breaks_in_the_middle_leaves_nothing_open(fleet: Fleet) -> None:
    def burn(reply: Message) -> Message:
        raise ZeroDivisionError("a bug")

    fleet.tamper = {"device-2": burn}
    with pytest.raises(ZeroDivisionError):
        fleet.drive()
    (run,) = fleet.rows(Run)
    assert (run.status, run.reason) == ("failed", "ZeroDivisionError: a bug")
    assert [(r.status, r.reason) for r in fleet.rows(Round)][-1] == ("failed", run.reason)
    assert {a.status for a in fleet.rows(Assignment)} == {"uploaded", "expired"}


def test_a_run_can_be_stopped_between_rounds(fleet: Fleet) -> None:
    with pytest.raises(RunError, match="stopped before round 2"):
        fleet.drive(rounds=5, should_stop=lambda: len(fleet.results) > 1)
    (run,) = fleet.rows(Run)
    assert (run.status, run.reason, run.finished_at) == ("waiting", "stopped before round 2", None)


def test_too_few_devices_are_told_in_a_sentence(fleet: Fleet) -> None:
    with pytest.raises(RunError, match=r"4 of at least 5 devices came within 1 s; start more or lower min_devices"):
        fleet.drive(min_devices=5, wait_s=1.0)


def test_a_run_of_nothing_or_of_an_unknown_set_or_strategy_is_refused(fleet: Fleet) -> None:
    with pytest.raises(RunError, match=r"nothing is published on channel 'beta' of .*; run `pocketfed publish` first"):
        create_run(fleet.store, RunConfig(channel="beta"))
    with pytest.raises(RunError, match="has no trainable set 'last:2', only full, norms, lora:4, head"):
        create_run(fleet.store, RunConfig(trainable_set="last:2"))
    with pytest.raises(StrategyError, match="there is no strategy 'Nope'"):
        fleet.drive(strategy="Nope")
    with fleet.store.read() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Device)) == 4


# ---- whole simulations -----------------------------------------------------------------------------------------------


def config_for(data: Path, seed: int = 5, **settings: Any) -> SimulationConfig:
    run = RunConfig(
        rounds=2, min_devices=1, seed=seed, local=LocalTraining(batch_size=8, learning_rate=0.005, max_length=16)
    )
    return dataclasses.replace(SimulationConfig(data, "nano", devices=3, train="head", run=run), **settings)


def without_seconds(result: SimulationResult) -> Mapping[str, Any]:
    told = result.to_dict()
    told["costs"] = {k: v for k, v in told["costs"].items() if k.startswith("bytes_")}
    return told | {"rounds": [{k: v for k, v in r.items() if k != "seconds"} for r in told["rounds"]]}


@pytest.fixture(scope="module")
def reference(tiny_folder: Path) -> SimulationResult:
    return simulate(config_for(tiny_folder))


def test_the_same_seed_gives_the_same_result_to_the_last_bit(
    tiny_folder: Path, reference: SimulationResult, tmp_path: Path
) -> None:
    again = simulate(config_for(tiny_folder), database=str(tmp_path / "kept.db"))
    assert without_seconds(again) == without_seconds(reference)
    assert again.theta.tobytes() == reference.theta.tobytes()
    assert reference.to_dict()["final"]["parameters_sha256"] == sha256(reference.theta.tobytes()).hexdigest()
    assert reference.to_dict()["final"]["test_examples"] == 24


def test_another_seed_gives_another_result(tiny_folder: Path, reference: SimulationResult) -> None:
    other = simulate(config_for(tiny_folder, seed=6))
    assert other.theta.tobytes() != reference.theta.tobytes()


def test_devices_can_be_the_users_of_the_data(tiny_folder: Path, tiny_dataset: Dataset, tmp_path: Path) -> None:
    users = {e.user for e in tiny_dataset.train}
    result = simulate(
        config_for(tiny_folder, devices=len(users), partition="by:user"), database=str(tmp_path / "kept.db")
    )
    assert [r.devices for r in result.rounds] == [0, len(users), len(users)]
    store = Store(str(tmp_path / "kept.db"), create=False)
    with store.read() as session:
        held = sorted(session.scalars(sa.select(Device.examples)))
    store.close()
    assert held == sorted(sum(e.user == user for e in tiny_dataset.train) for user in users)


def test_pairs_of_texts_are_trained_on_as_pairs(tmp_path: Path) -> None:
    """Only the second text tells the label: whoever drops it is right half of the time."""
    words, answers = ("lamp", "radio", "rain", "noon"), {"yes please": "yes", "not now": "no"}
    lines = [
        json.dumps({"text": a, "text_pair": b, "label": answers[b]}) for _ in range(4) for a in words for b in answers
    ]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    run = dataclasses.replace(config_for(tmp_path).run, rounds=12)
    result = simulate(config_for(tmp_path, train="full", devices=2, run=run))
    assert result.test_examples == 32
    assert result.rounds[-1].accuracy == 1.0


def test_device_names_sort_as_their_numbers() -> None:
    assert device_names(3) == ["device-000", "device-001", "device-002"]
    assert sorted(device_names(1200)) == device_names(1200)
