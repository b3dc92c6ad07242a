"""Turning updates into one: ours equals Flower's, order does not matter, and Flower's strategies drive our devices."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from pocketfed.client_sdk.flower_app import make_client_app
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import TrainConfig
from pocketfed.coordinator import flwr_compat

# isort: split
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.coordinator.artifacts import BuiltArtifact, publish_artifact
from pocketfed.coordinator.config import LocalTraining, RunConfig
from pocketfed.coordinator.grid import Cohort
from pocketfed.coordinator.rounds import create_run, local_config
from pocketfed.coordinator.screening import Tally, screen, with_common_metrics
from pocketfed.coordinator.store import Assignment, Round, Store, device_named
from pocketfed.coordinator.strategy import DEFAULT, OURS, StrategyError, asks_more, make_strategy, strategy_names
from pocketfed.coordinator.validation import Limits
from pocketfed.model.parameters import Vector
from pocketfed.model.tasks import Dataset
from pocketfed.simulations.grids import InProcessGrid
from pocketfed.simulations.run import encode_examples

# What some strategies cannot do without: QFedAvg our loss's name and a learning rate, the robust ones an assumption.
OPTIONS: dict[str, dict[str, Any]] = {
    "QFedAvg": {"client_learning_rate": 0.1, "train_loss_key": "loss"},
    "FedProx": {"proximal_mu": 0.1},
    "Bulyan": {"num_malicious_nodes": 1},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 4},
    "FedTrimmedAvg": {"beta": 0.2},
}


@pytest.fixture(autouse=True)
def in_a_run() -> None:
    """A message belongs to a run, which Flower keeps in a process-global: a grid sets it, here there often is none."""
    flwr_compat.enter_run(1)


def replies_of(thetas: Sequence[Vector], weights: Sequence[float]) -> list[Message]:
    replies = []
    for node, (theta, weight) in enumerate(zip(thetas, weights, strict=True), start=1):
        asked = flwr_compat.name_message(Message(RecordDict(), node, MessageType.TRAIN), f"m{node}")
        metrics = MetricRecord({"num-examples": weight, "loss": 0.5 + node, "accuracy": 1 / node})
        replies.append(
            Message(RecordDict({"arrays": ArrayRecord({"theta": Array(theta)}), "metrics": metrics}), reply_to=asked)
        )
    return replies


def rounds_of(strategy: Any, start: float, rounds: Sequence[Sequence[float]], weights: Sequence[int]) -> list[float]:
    """Where the only parameter is after each round whose devices end at these values."""

    class Some(InProcessGrid):
        def __init__(self) -> None:
            self.devices = {node: f"d{node}" for node in range(1, len(weights) + 1)}
            self.cohort = Cohort(1, 1, self.devices)

    ends = [start]
    for number, trained in enumerate(rounds, start=1):
        given = ArrayRecord({"theta": Array(np.array(ends[-1:], np.float32))})
        list(strategy.configure_train(number, given, ConfigRecord({}), Some()))
        arrays, _ = strategy.aggregate_train(number, replies_of([np.array([t], np.float32) for t in trained], weights))
        ends.append(float(arrays["theta"].numpy()[0]))
    return ends[1:]


def random_updates(count: int, size: int, seed: int) -> tuple[list[Vector], list[int]]:
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.integers(-3, 3, count)
    return [(scale[i] * rng.standard_normal(size)).astype(np.float32) for i in range(count)], rng.integers(
        1, 500, count
    ).tolist()


def test_two_updates_are_averaged_by_their_examples() -> None:
    replies = replies_of([np.array([1, 10], np.float32), np.array([4, 10], np.float32)], [1, 2])
    arrays, metrics = make_strategy(DEFAULT, {}).aggregate_train(1, replies)
    assert arrays["theta"].numpy().tolist() == [3.0, 10.0]  # (1·1 + 2·4) / 3
    assert metrics["loss"] == pytest.approx((1 * 1.5 + 2 * 2.5) / 3)
    assert "num-examples" not in metrics


@pytest.mark.parametrize(("count", "size"), [(1, 1), (2, 7), (5, 1000), (33, 4099)])
def test_stock_fedavg_and_ours_give_the_same_parameters(count: int, size: int) -> None:
    for seed in range(3):
        thetas, weights = random_updates(count, size, seed)
        ours, our_metrics = make_strategy(DEFAULT, {}).aggregate_train(1, replies_of(thetas, weights))
        stock, stock_metrics = make_strategy("FedAvg", {}).aggregate_train(1, replies_of(thetas, weights))
        scale = max(float(np.abs(t).max()) for t in thetas)
        assert np.abs(ours["theta"].numpy() - stock["theta"].numpy()).max() <= 1e-6 * scale
        assert dict(our_metrics) == pytest.approx(dict(stock_metrics))


def test_a_generator_and_a_list_of_replies_give_the_same_bits() -> None:
    thetas, weights = random_updates(9, 501, 4)
    listed, _ = make_strategy(DEFAULT, {}).aggregate_train(1, replies_of(thetas, weights))
    streamed, _ = make_strategy(DEFAULT, {}).aggregate_train(1, (reply for reply in replies_of(thetas, weights)))
    assert listed["theta"].numpy().tobytes() == streamed["theta"].numpy().tobytes()


def test_our_strategy_holds_one_reply_at_a_time() -> None:
    import gc
    import weakref

    alive: list[weakref.ref[Message]] = []
    most = 0

    def one_by_one() -> Iterator[Message]:
        nonlocal most
        for i in range(6):
            reply = replies_of([np.full(10, i, np.float32)], [1])[0]
            alive.append(weakref.ref(reply))
            gc.collect()
            most = max(most, sum(r() is not None for r in alive))
            yield reply
            del reply

    make_strategy(DEFAULT, {}).aggregate_train(1, one_by_one())
    assert most == 2  # the one being made, and the loop variable of the one before


@pytest.mark.parametrize("name", [name for name in strategy_names() if not asks_more(name)])
def test_every_strategy_that_is_offered_aggregates_finite_updates(name: str) -> None:
    rng = np.random.default_rng(0)
    start = rng.standard_normal(50).astype(np.float32)
    thetas = [start + 0.1 * rng.standard_normal(50).astype(np.float32) for _ in range(9)]
    strategy = make_strategy(name, OPTIONS.get(name, {}))

    class Nine(InProcessGrid):
        def __init__(self) -> None:
            self.devices = {i: f"d{i}" for i in range(1, 10)}
            self.cohort = Cohort(1, 1, self.devices)

    sent = list(strategy.configure_train(1, ArrayRecord({"theta": Array(start)}), ConfigRecord({}), Nine()))
    assert sorted(m.metadata.dst_node_id for m in sent) == list(range(1, 10))
    arrays, metrics = strategy.aggregate_train(1, replies_of(thetas, [3] * 9))
    result = arrays["theta"].numpy()
    assert result.shape == start.shape
    assert np.isfinite(result).all()
    assert not np.array_equal(result, start)
    # FedAdam and its kin step by about their server learning rate, 0.1, whatever the size of the mean difference.
    assert np.abs(result - np.mean(thetas, 0)).max() < 0.5
    assert {"loss", "accuracy"} <= set(metrics)


def test_flowers_server_optimizers_take_the_mean_update_as_a_gradient() -> None:
    """From 1, devices at 3 and 6 weighing 1 and 3: the mean update is 5.25 - 1 = 4.25 (Reddi et al. 2021, algorithm 2)."""
    update = 4.25
    first, second = (1 - 0.9) * update, (1 - 0.99) * update**2  # the moments after one round
    unbiased = np.sqrt(1 - 0.99**2) / (1 - 0.9**2)  # Flower counts rounds from 1, and adds one
    expected = {
        "FedAvg": 1 + update,
        "FedAdam": 1 + 0.5 * unbiased * first / (np.sqrt(second) + 0.001),
        "FedYogi": 1 + 0.5 * first / (np.sqrt(second) + 0.001),
        "FedAdagrad": 1 + 0.5 * update / (update + 0.001),
    }
    for name, value in expected.items():
        strategy = make_strategy(name, {"eta": 0.5} if name != "FedAvg" else {})
        assert rounds_of(strategy, 1.0, [[3, 6]], [1, 3]) == pytest.approx([value], rel=1e-5), name


def test_fedavgm_goes_on_in_the_direction_of_earlier_rounds() -> None:
    """Hsu et al. 2019, section 4.3: v = 0.9 v + (theta - mean), theta - 0.5 v."""
    strategy = make_strategy("FedAvgM", {"server_momentum": 0.9, "server_learning_rate": 0.5})
    ends = rounds_of(strategy, 1.0, [[3, 6], [4.125, 4.125]], [1, 3])
    # the mean of 3 and 6 is 5.25: v = -4.25; then 3.125 - 4.125 = -1: v = -3.825 - 1
    assert ends == pytest.approx([1 + 0.5 * 4.25, 3.125 + 0.5 * 4.825], rel=1e-6)


def test_qfedavg_weighs_devices_by_their_loss() -> None:
    """Li et al. 2020b, algorithm 2, with q = 1 and L = 1 / 0.1; the devices' losses are 1.5 and 2.5."""
    strategy = make_strategy("QFedAvg", {"client_learning_rate": 0.1, "train_loss_key": "loss", "q": 1.0})
    # differences times L: -20 and -50; times the losses: -30 and -125; h: 20² + 10 · 1.5 and 50² + 10 · 2.5
    assert rounds_of(strategy, 1.0, [[3, 6]], [1, 3]) == pytest.approx([1 + 155 / 2940], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "trained", "result"),
    [
        ("FedMedian", [1, 2, 3, 9, 50], 3.0),
        ("FedTrimmedAvg", [1, 2, 3, 9, 50], 14 / 3),  # without the least and the greatest fifth
        ("Krum", [1, 2, 3, 9, 50], 2.0),  # its two nearest are at distance 1
        ("MultiKrum", [1, 2, 4, 9, 50], (1 + 2 + 4 + 9) / 4),
        ("Bulyan", [1, 2, 3, 4, 5, 50, 60], 3.0),  # of the five that Krum takes the three nearest to their median
    ],
)
def test_flowers_robust_rules_leave_out_whoever_is_far_off(name: str, trained: Sequence[float], result: float) -> None:
    ends = rounds_of(make_strategy(name, OPTIONS.get(name, {})), 0.0, [trained], [1] * len(trained))
    assert ends == pytest.approx([result], rel=1e-6)


def test_what_flowers_strategy_asks_of_a_device_counts_in_whatever_order_it_comes() -> None:
    for values in ({"proximal-mu": 0.5, "proximal_mu": 0.0}, {"proximal_mu": 0.0, "proximal-mu": 0.5}):
        assert TrainConfig.from_mapping(values).proximal_mu == 0.5


def test_the_page_on_strategies_has_every_name_and_every_option_of_ours() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "strategies.md").read_text()
    for name in strategy_names():
        assert f"`{name}`" in page, name
    for kind in OURS.values():
        for option in inspect.signature(kind).parameters:
            assert f"`{option}`" in page, option


def test_every_strategy_of_ours_cites_its_paper() -> None:
    for name, kind in OURS.items():
        assert re.search(r"\b(19|20)\d\d\b", kind.__doc__ or ""), name


def test_the_names_are_ours_first_then_flowers_and_none_for_trees() -> None:
    names = strategy_names()
    assert names[0] == DEFAULT
    assert {"FedAvg", "FedProx", "FedAdam", "FedAdagrad", "FedYogi", "FedAvgM", "FedMedian", "Krum"} <= set(names)
    assert not any("Xgb" in name or "Privacy" in name for name in names)


def test_what_flower_exports_is_offered_or_cannot_be() -> None:
    """So that test_recovery.py, which resumes every strategy that is offered, leaves out no other by accident."""
    import flwr.serverapp.strategy as flower

    not_strategies = {"Strategy", "Result"}
    of_trees = {"FedXgbBagging", "FedXgbCyclic"}
    wants = {name: inspect.signature(getattr(flower, name)).parameters for name in flower.__all__}
    around_another = {name for name, parameters in wants.items() if "strategy" in parameters}
    assert around_another == {
        f"DifferentialPrivacy{where}{how}Clipping"
        for where in ("ClientSide", "ServerSide")
        for how in ("Adaptive", "Fixed")
    }
    offered = set(strategy_names()) - set(OURS)
    assert offered | not_strategies | of_trees | around_another == set(flower.__all__)
    assert len(offered) == 12


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("FedMagic", {}, "there is no strategy 'FedMagic'; choose one of StreamingFedAvg, .*StreamingKrum, .*Bulyan,"),
        ("StreamingFedAvg", {"eta": 1}, "StreamingFedAvg takes no option 'eta'; it takes workers"),
        ("FedAdam", {"etta": 1}, "FedAdam takes no option 'etta'; it takes .*eta"),
        ("FedProx", {}, "FedProx without strategy_options.proximal_mu is FedAvg; set it, e.g. to 0.01"),
        ("Scaffold", {"devices": -1}, "Scaffold does not take the options {'devices': -1}: devices is -1"),
        ("QFedAvg", {}, "QFedAvg does not take the options {}: .*client_learning_rate"),
    ],
)
def test_a_strategy_or_option_that_does_not_exist_is_one_sentence(
    name: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(StrategyError, match=says) as caught:
        make_strategy(name, options)
    assert "\n" not in str(caught.value)


def test_a_strategy_is_found_in_any_case() -> None:
    assert type(make_strategy("fedadam", {"eta": 0.01})).__name__ == "FedAdam"


def test_the_weight_of_a_device_is_capped() -> None:
    theta = np.zeros(2, np.float32)
    replies = replies_of([np.array([1, 0], np.float32), np.array([0, 1], np.float32)], [10, 10**9])
    tally = Tally()
    arrays, _ = make_strategy(DEFAULT, {}).aggregate_train(1, screen(replies, theta, Limits(2, max_examples=30), tally))
    assert arrays["theta"].numpy().tolist() == [0.25, 0.75]  # 10 to 30
    assert tally.accepted == 2


def test_metrics_that_only_some_devices_tell_do_not_stop_flowers_strategies() -> None:
    thetas, weights = random_updates(3, 5, 0)
    replies = replies_of(thetas, weights)
    replies[1].content["metrics"]["battery"] = 0.5
    arrays, metrics = make_strategy("FedAvg", {}).aggregate_train(1, with_common_metrics(iter(replies)))
    assert arrays is not None
    assert set(metrics) == {"loss", "accuracy"}


# ---- on the grid -----------------------------------------------------------------------------------------------------


class Fleet:
    """Three virtual devices on a store, training the head of the nano student."""

    def __init__(self, store: Store, built: BuiltArtifact, artifact: Artifact, dataset: Dataset) -> None:
        self.trainer = PlanTrainer(artifact, "head")
        everything = encode_examples(self.trainer, dataset.train, 32)
        self.local = {f"device-{i}": everything.take(range(8 * i, 8 * i + 8)) for i in range(3)}
        self.configs: list[dict[str, Any]] = []
        with store.write() as session:
            publish_artifact(session, built, "stable", "head")
            nodes = {device_named(session, name).id: name for name in self.local}
        self.run_id = create_run(store, RunConfig())
        app = make_client_app(
            lambda: self.trainer, lambda c: (str(c.node_config["device"]), self.local[str(c.node_config["device"])])
        )
        self.grid = InProcessGrid(store, self.run_id, app, nodes, 0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(str(tmp_path / "fleet.db"))
    yield opened
    opened.close()


@pytest.fixture
def fleet(store: Store, nano_built: BuiltArtifact, nano_artifact: Artifact, tiny_dataset: Dataset) -> Fleet:
    return Fleet(store, nano_built, nano_artifact, tiny_dataset)


def one_round(fleet: Fleet, strategy_name: str, options: dict[str, Any]) -> Vector:
    strategy = make_strategy(strategy_name, options)
    fleet.grid.enter(Cohort(1, 1, fleet.grid.devices))
    arrays = ArrayRecord({"theta": Array(fleet.trainer.initial_theta())})
    messages = strategy.configure_train(
        1, arrays, local_config(RunConfig(local=LocalTraining(batch_size=2)), 1), fleet.grid
    )
    aggregated, _ = strategy.aggregate_train(1, list(fleet.grid.send_and_receive(messages)))
    return np.asarray(aggregated["theta"].numpy())


def test_the_proximal_term_of_fedprox_reaches_the_devices(store: Store, fleet: Fleet) -> None:
    start = fleet.trainer.initial_theta()
    strong = one_round(fleet, "FedProx", {"proximal_mu": 1000.0})
    with store.read() as session:
        assert [a.config["proximal-mu"] for a in session.scalars(sa.select(Assignment))] == [1000.0] * 3
    fleet.grid.run_id = create_run(store, RunConfig())
    weak = one_round(fleet, "FedProx", {"proximal_mu": 1e-30})  # lost in float32
    fleet.grid.run_id = create_run(store, RunConfig())
    plain = one_round(fleet, "FedAvg", {})
    assert np.array_equal(weak, plain)
    assert not np.array_equal(strong, plain)
    assert np.linalg.norm(strong - start) < np.linalg.norm(plain - start)


def test_flowers_own_start_runs_unchanged_over_our_grid(store: Store, fleet: Fleet) -> None:
    initial = ArrayRecord({"theta": Array(fleet.trainer.initial_theta())})
    result = FedAvg().start(
        fleet.grid, initial_arrays=initial, num_rounds=2, train_config=ConfigRecord({"batch-size": 4})
    )
    assert set(result.train_metrics_clientapp) == {1, 2}
    assert result.train_metrics_clientapp[2]["loss"] < result.train_metrics_clientapp[1]["loss"]
    assert set(result.evaluate_metrics_clientapp) == {1, 2}
    assert not np.array_equal(result.arrays["theta"].numpy(), fleet.trainer.initial_theta())
    with store.read() as session:
        rows = session.execute(
            sa.select(Assignment.round, Assignment.kind, sa.func.count()).group_by(Assignment.round, Assignment.kind)
        )
        assert {tuple(row) for row in rows} == {
            (1, "train", 3),
            (1, "evaluate", 3),
            (2, "train", 3),
            (2, "evaluate", 3),
        }
        assert session.scalars(sa.select(Round)).all() == []  # rounds are written by drive_run
