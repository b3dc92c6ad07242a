"""SCAFFOLD: its equations by hand on one parameter, control variates that stay with their device, and what they are for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketfed.client_sdk.errors import ConfigurationError
from pocketfed.client_sdk.keeping import Keeping, Part
from pocketfed.client_sdk.outgoing import NOTHING, Kept, UpdateForm
from pocketfed.client_sdk.perform import Reply, Task, perform
from pocketfed.client_sdk.trainer import Batch, Examples, TrainConfig
from pocketfed.coordinator import config, flwr_compat

# isort: split
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict

from pocketfed.coordinator.aggregation import Delta
from pocketfed.coordinator.config import LocalTraining, RunConfig
from pocketfed.coordinator.grid import Cohort
from pocketfed.coordinator.rounds import local_config
from pocketfed.coordinator.scaffold import Scaffold
from pocketfed.coordinator.strategy import THETA, DeltaArray, StrategyError, make_strategy
from pocketfed.coordinator.strategy_state import capture, restore
from pocketfed.model.parameters import (
    CONTROL,
    Parameter,
    ParametersError,
    Vector,
    decode_start,
    encode_start,
    encode_vector,
)
from pocketfed.simulations.grids import InProcessGrid

RATE = 0.25
SGD = TrainConfig(batch_size=1, learning_rate=RATE, optimizer="sgd", max_grad_norm=0.0)
RUN = RunConfig(local=LocalTraining(learning_rate=RATE, optimizer="sgd", max_grad_norm=100.0))


class Quadratic:
    """theta (1,), the loss curvature / 2 · (theta - label)² of each example: gradients that can be reckoned by hand."""

    identity, size, layout, task, outputs = "quadratic", 1, (Parameter("x", (1,), 0),), "regression", 1

    def __init__(self, curvature: float) -> None:
        self.curvature = curvature

    def encode(self, texts: Sequence[str], pairs: Any, max_length: int) -> Sequence[Any]:
        raise NotImplementedError

    def prepare(self, rows: Sequence[Any], should_stop: Callable[[], bool]) -> None:
        pass

    def gradient(self, theta: Vector, batch: Batch) -> tuple[float, int, Vector]:
        off = float(theta[0]) - float(batch.labels.mean())
        return self.curvature / 2 * off**2, 0, np.array([self.curvature * off], np.float32)

    def evaluate(self, theta: Vector, batch: Batch) -> tuple[float, int, float]:
        raise NotImplementedError

    def logits(self, theta: Vector, ids: Any, mask: Any) -> Any:
        raise NotImplementedError


def examples(label: float, count: int = 2) -> Examples:
    """Two steps a round."""
    return Examples([np.array([1])] * count, np.full(count, label, np.float32))


def step(theta: float, control: float | None, own: float | None, **changes: Any) -> Reply:
    """Two steps from theta towards 4 with curvature 1."""
    how = dataclasses.replace(SGD, **{k: v for k, v in changes.items() if k != "form"})
    given = None if control is None else np.array([control], np.float32)
    task = Task("train", np.array([theta], np.float32), how, 1, "ada", changes.get("form", UpdateForm()), control=given)
    kept = None if own is None else Kept(control=np.array([own], np.float32))
    return perform(Quadratic(1.0), task, examples(4.0), kept=kept)


@pytest.fixture(autouse=True)
def in_a_run() -> None:
    flwr_compat.enter_run(1)


def test_a_devices_steps_and_its_new_control_variate_are_those_of_the_equations() -> None:
    first = step(0.0, 0.0, None)  # c = c_i = 0: as FedAvg. 0 -> 1 -> 1.75
    assert first.delta.tolist() == step(0.0, None, None).delta.tolist() == [1.75]
    assert first.kept.control.tolist() == [-3.5]  # 0 - 0 + (0 - 1.75) / (2 · 0.25): the mean of its gradients -4 and -3
    assert step(0.0, None, None).kept.control.size == 0
    second = step(0.0, 1.0, -3.5)
    # g - c_i + c = g + 4.5: 0 - 0.25 · (-4 + 4.5) = -0.125; then -0.125 - 0.25 · (-4.125 + 4.5) = -0.21875
    assert second.delta.tolist() == [-0.21875]
    assert second.kept.control.tolist() == [-3.5 - 1.0 + 0.21875 / 0.5]


def test_a_gradient_is_clipped_before_the_control_variate_comes_in() -> None:
    clipped = step(0.0, 0.5, 0.0, max_grad_norm=1.0)  # both gradients are cut to -1, then + 0.5
    assert clipped.delta.tolist() == [0.25]
    assert clipped.kept.control.tolist() == [-1.0]  # 0 - 0.5 - 0.25 / 0.5: the mean clipped gradient


ODD: list[dict[str, Any]] = [
    *({"optimizer": "adamw"}, {"momentum": 0.9}, {"proximal_mu": 0.1}, {"schedule": "linear"}, {"warmup": 0.5}),
    *({"learning_rate": 0.0}, {"form": UpdateForm("int8")}, {"form": UpdateForm(clip_norm=1.0, noise=1.0)}),
]


@pytest.mark.parametrize("odd", ODD)
def test_a_device_refuses_a_control_variate_for_steps_that_it_is_not_defined_for(odd: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="a control variate is defined for plain sgd at a constant rate"):
        step(0.0, 0.0, None, **odd)


# ---- on the coordinator ----------------------------------------------------------------------------------------------


def replies_of(deltas: Sequence[float], steps: Sequence[Any], start: float = 0.0) -> list[Message]:
    made = []
    for node, (delta, told) in enumerate(zip(deltas, steps, strict=True), start=1):
        asked = flwr_compat.name_message(Message(RecordDict(), node, MessageType.TRAIN), f"m{node}")
        arrays = ArrayRecord()
        arrays[THETA] = DeltaArray(np.array([start], np.float32), Delta(np.array([delta], np.float32), 1))
        metrics = MetricRecord({"num-examples": 10 * node, **({} if told is None else {"steps": told})})
        made.append(Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=asked))
    return made


class Two(InProcessGrid):
    def __init__(self) -> None:
        self.devices = {1: "ada", 2: "bob"}
        self.cohort = Cohort(1, 1, self.devices)


def round_of(strategy: Scaffold, replies: Sequence[Message], start: float = 0.0) -> tuple[float, float]:
    """(theta, the c that went down)"""
    given = ArrayRecord({THETA: Array(np.array([start], np.float32))})
    sent = list(strategy.configure_train(1, given, local_config(RUN, 1), Two()))
    (control,) = {float(m.content["arrays"][CONTROL].numpy()[0]) for m in sent}
    assert {float(m.content["arrays"][THETA].numpy()[0]) for m in sent} == {start}
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    return float(arrays[THETA].numpy()[0]), control


def prepared(**options: Any) -> Scaffold:
    strategy = make_strategy("scaffold", options)
    assert isinstance(strategy, Scaffold)
    strategy.prepare(RUN, ())
    return strategy


def test_the_control_variate_is_the_mean_of_the_devices_own_and_nothing_more_came_up() -> None:
    strategy = prepared()
    theta, sent = round_of(strategy, replies_of([1.75, -1.0], [2, 2]))
    assert (theta, sent) == (0.375, 0.0)  # unweighted: (1.75 - 1) / 2
    assert strategy.total.tolist() == [-3.5 + 2.0]  # c_1 = -1.75 / 0.5, c_2 = 1 / 0.5
    assert strategy.control().tolist() == [-0.75]
    _, sent = round_of(strategy, replies_of([0.5], [1]))  # ada alone: c_1+ - c_1 = 0.75 - 0.5 / 0.25
    assert sent == -0.75
    assert strategy.total.tolist() == [-1.5 + 0.75 - 2.0]
    assert strategy.control().tolist() == [-2.75 / 2], "bob keeps his"


def test_device_and_coordinator_agree_on_every_control_variate() -> None:
    strategy, own, theta = prepared(), [NOTHING, NOTHING], 0.0
    pulls = (Quadratic(1.0), 4.0), (Quadratic(2.0), -1.0)
    falling = dataclasses.replace(RUN, rounds=3, round_schedule="linear")
    for number in (1, 2, 3):
        given = ArrayRecord({THETA: Array(np.array([theta], np.float32))})
        asked = local_config(falling, number)
        sent = list(strategy.configure_train(number, given, asked, Two()))
        how = dataclasses.replace(SGD, learning_rate=float(asked["learning_rate"]))
        control, deltas, steps = sent[0].content["arrays"][CONTROL].numpy(), [], []
        for i, (trainer, label) in enumerate(pulls):
            task = Task("train", np.array([theta], np.float32), how, number, f"d{i}", control=control)
            reply = perform(trainer, task, examples(label), kept=Kept(control=own[i]))
            own[i] = reply.kept.control
            deltas.append(float(reply.delta[0]))
            steps.append(reply.metrics["steps"])
        arrays, _ = strategy.aggregate_train(number, replies_of(deltas, steps, theta))
        assert arrays is not None
        theta = float(arrays[THETA].numpy()[0])
        assert strategy.total[0] == pytest.approx(float(own[0][0] + own[1][0]), rel=1e-5)


def test_unlike_devices_end_where_their_losses_sum_is_least_as_fedavg_does_not() -> None:
    """Curvatures 1 and 3, minima at 4 and 0: the sum's is at (1 · 4 + 3 · 0) / 4 = 1."""
    pulls = (Quadratic(1.0), 4.0), (Quadratic(3.0), 0.0)
    ends = {}
    for controlled in (False, True):
        strategy, own, theta = prepared(), [NOTHING, NOTHING], 0.0
        for number in range(60):
            given = ArrayRecord({THETA: Array(np.array([theta], np.float32))})
            sent = list(strategy.configure_train(number, given, local_config(RUN, 1), Two()))
            control = sent[0].content["arrays"][CONTROL].numpy() if controlled else None
            deltas, steps = [], []
            for i, (trainer, label) in enumerate(pulls):
                task = Task("train", np.array([theta], np.float32), SGD, number, f"d{i}", control=control)
                reply = perform(trainer, task, examples(label, 4), kept=Kept(control=own[i]))
                own[i] = reply.kept.control
                deltas.append(float(reply.delta[0]))
                steps.append(reply.metrics["steps"])
            if controlled:
                arrays, _ = strategy.aggregate_train(number, replies_of(deltas, steps, theta))
                assert arrays is not None
                theta = float(arrays[THETA].numpy()[0])
            else:
                theta += sum(deltas) / 2
        ends[controlled] = theta
    assert ends[True] == pytest.approx(1.0, abs=0.01)
    # FedAvg's fixed point: Σ (1 - (1 - η curvature)^4) (minimum - theta) = 0, so 4 · 0.6836 / (0.6836 + 0.9961)
    assert ends[False] == pytest.approx(4 * (1 - 0.75**4) / (2 - 0.75**4 - 0.25**4), abs=0.01)


@pytest.mark.parametrize("lie", [None, 0, -3, 0.5, float("nan"), float("inf"), 1e-300])
def test_a_device_that_lies_about_its_steps_moves_theta_as_any_but_not_the_control_variate(lie: Any) -> None:
    strategy = prepared()
    theta, _ = round_of(strategy, replies_of([0.5, 0.5, 0.5], [2, 2, lie]))
    assert theta == 0.5
    assert strategy.total.tolist() == [-2.0]


def test_no_device_changes_the_control_variate_by_more_than_two_clipped_gradients() -> None:
    strategy = prepared()
    round_of(strategy, replies_of([0.5, 0.5, 60.0], [2, 2, 1]))  # the last alone would make it -240
    assert strategy.total.tolist() == [-1.0 - 1.0 - 200.0]


def test_the_control_variate_and_who_was_seen_are_in_the_checkpoint() -> None:
    first, second = prepared(), prepared()
    round_of(first, replies_of([1.75, -1.0], [2, 2]))
    restore(second, capture(first))
    assert second.total.tolist() == [-1.5]
    assert second.control().tolist() == [-0.75]
    restore(second, capture(prepared()))
    assert second.total.size == 0
    assert prepared(devices=10).devices == 10


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"local": LocalTraining()}, "Scaffold is defined for local.optimizer = 'sgd', not 'adamw'"),
        ({"local": LocalTraining(optimizer="sgd", momentum=0.9)}, "local.momentum = 0, not 0.9"),
        ({"mode": "fedbuff", "min_devices": 10}, "mode = 'sync', not 'fedbuff'"),
        ({"update": config.UpdateForm(private=("x",))}, r"update.private = \[\], not \['x'\]"),
        ({"local": LocalTraining(optimizer="sgd", max_grad_norm=0)}, "max_grad_norm, 0; set both above 0"),
        ({"update": config.UpdateForm("int8")}, r"a codec without error feedback \(not int8\)"),
        ({"update": config.UpdateForm(metrics=("loss",))}, r"devices to tell their steps \(update.metrics\)"),
    ],
)
def test_a_run_that_scaffold_is_not_defined_for_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(StrategyError, match=says):
        Scaffold().prepare(dataclasses.replace(RUN, **changes), ())


# ---- on the wire and on disk -----------------------------------------------------------------------------------------


def test_a_round_may_begin_with_two_vectors_and_with_nothing_else() -> None:
    theta, control = np.arange(3, dtype=np.float32), np.arange(3, 6, dtype=np.float32)
    found, none = decode_start(encode_start(theta), 3)
    assert (found.tolist(), none) == ([0, 1, 2], None)
    assert encode_start(theta) == encode_vector("theta", theta)
    both = decode_start(encode_start(theta, control), 3)
    assert both[1] is not None
    assert (both[0].tolist(), both[1].tolist()) == ([0, 1, 2], [3, 4, 5])
    for bad in (
        b"",
        b"x" * 40,
        encode_vector("control", theta),
        encode_start(theta, control[:2]),
        encode_vector("c", theta),
    ):
        with pytest.raises(ParametersError):
            decode_start(bad, 3)
    with pytest.raises(ParametersError, match="too many for twice 3"):
        decode_start(encode_start(np.zeros(2000, np.float32), np.zeros(2000, np.float32)), 3)


def test_a_devices_own_control_variate_is_kept_once_its_update_was_taken_and_ends_with_its_run(tmp_path: Path) -> None:
    trainer, theta = Quadratic(1.0), np.zeros(1, np.float32)

    def part(number: int, run: int = 1, controlled: bool = True) -> Part:
        return Part(f"{run}-{number}", f"digest {number}", run, UpdateForm(), theta, controlled)

    keeping = Keeping(tmp_path, lambda assignment: True)
    assert keeping.before(trainer, part(1)).control.size == 0
    made = Reply(b"bytes", NOTHING, 2, {"loss": 1.0}, Kept(control=np.array([-3.5], np.float32)))
    keeping.hold(trainer, part(1), made)
    again = keeping.reply(part(1))
    assert again is not None
    assert again.kept.control.tolist() == [-3.5]
    keeping.settle(part(1).assignment, taken=True)
    for reopened in (keeping, Keeping(tmp_path, lambda assignment: True)):
        assert reopened.before(trainer, part(2)).control.tolist() == [-3.5]
    assert keeping.before(trainer, part(2, run=2)).control.size == 0
    assert keeping.before(trainer, part(2, controlled=False)).control.size == 0
    for file in tmp_path.iterdir():
        assert file.stat().st_mode & 0o777 == 0o600
    keeping.forget()
    assert list(tmp_path.iterdir()) == []
