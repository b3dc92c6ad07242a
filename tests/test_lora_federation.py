"""Federations of LoRA on matrices small enough to multiply by hand: what each mean is, what is lost, what is not sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.errors import ConfigurationError
from pocketfed.client_sdk.outgoing import Kept, UpdateForm
from pocketfed.client_sdk.perform import Reply, Task, perform, sent_of
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples, TrainConfig
from pocketfed.coordinator import flwr_compat

# isort: split
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict

from pocketfed.coordinator.aggregation import Delta
from pocketfed.coordinator.config import RunConfig
from pocketfed.coordinator.config import UpdateForm as ConfigForm
from pocketfed.coordinator.grid import Cohort
from pocketfed.coordinator.lora import ExactLoRA, factored
from pocketfed.coordinator.strategy import THETA, DeltaArray, StrategyError, make_strategy
from pocketfed.coordinator.strategy_base import Ours
from pocketfed.model.parameters import (
    ParametersError,
    Vector,
    frozen_mask,
    lay_out,
    lora_pairs,
    split_withheld,
)
from pocketfed.model.tasks import Dataset
from pocketfed.simulations.grids import InProcessGrid
from pocketfed.simulations.run import encode_examples

# y = W x + B A x with A (1, 2) and B (2, 1), and a head of one value: theta = [a0, a1, b0, b1, h].
LAYOUT = lay_out([("query.lora_A", (1, 2)), ("query.lora_B", (2, 1)), ("classifier.bias", (1,))])
START = np.array([1, 0, 0, 0, 0], np.float32)
FIRST, SECOND = [1, 0, 2, 0, 1], [0, 1, 0, 2, 3]  # what two devices make of it


@pytest.fixture(autouse=True)
def in_a_run() -> None:
    flwr_compat.enter_run(1)


def replies_of(trained: Sequence[Sequence[float]], weights: Sequence[float]) -> list[Message]:
    made = []
    for node, (theta, weight) in enumerate(zip(trained, weights, strict=True), start=1):
        asked = flwr_compat.name_message(Message(RecordDict(), node, MessageType.TRAIN), f"m{node}")
        arrays = ArrayRecord()
        delta = np.array(theta, np.float32) - START
        arrays[THETA] = DeltaArray(START, Delta(delta, len(START)))
        metrics = MetricRecord({"num-examples": weight, "loss": 1.0})
        made.append(Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=asked))
    return made


def make_ours(name: str, options: dict[str, Any]) -> Ours:
    strategy = make_strategy(name, options)
    assert isinstance(strategy, Ours)
    return strategy


def aggregated(name: str, weights: Sequence[float], **options: Any) -> tuple[Vector, dict[str, Any]]:
    strategy = make_ours(name, options)
    strategy.prepare(RunConfig(), LAYOUT)
    arrays, metrics = strategy.aggregate_train(1, replies_of([FIRST, SECOND], weights))
    assert arrays is not None
    assert metrics is not None
    return arrays[THETA].numpy(), dict(metrics)


def product(theta: Vector) -> list[list[float]]:
    return np.outer(theta[2:4], theta[:2]).round(6).tolist()


def test_naive_averaging_makes_the_product_of_the_means() -> None:
    theta, _ = aggregated("StreamingFedAvg", [1, 1])
    assert theta.tolist() == [0.5, 0.5, 1, 1, 2]
    assert product(theta) == [[0.5, 0.5], [0.5, 0.5]]  # and not the mean of the products, the identity


@pytest.mark.parametrize(
    ("name", "number", "updates", "mean"),
    [  # of the products 3 · (1, 0)ᵀ (3, 4) and 1 · (0, 3)ᵀ (3, 4): A is one for all
        ("FFALoRA", 1, [[3, 4, 1, 0, 1], [3, 4, 0, 3, 3]], [[2.25, 3], [2.25, 3]]),
        ("RoLoRA", 1, [[3, 4, 1, 0, 1], [3, 4, 0, 3, 3]], [[2.25, 3], [2.25, 3]]),
        # of 3 · (2, 1)ᵀ (1, 0) and 1 · (2, 1)ᵀ (0, 4): B is one for all
        ("RoLoRA", 2, [[1, 0, 2, 1, 1], [0, 4, 2, 1, 3]], [[1.5, 2], [0.75, 1]]),
    ],
)
def test_where_one_half_is_frozen_the_means_product_is_the_mean_of_the_products(
    name: str, number: int, updates: list[list[float]], mean: list[list[float]]
) -> None:
    strategy = make_ours(name, {})
    strategy.prepare(RunConfig(), LAYOUT)
    arrays, _ = strategy.aggregate_train(number, replies_of(updates, [3, 1]))
    assert arrays is not None
    theta = arrays[THETA].numpy()
    assert product(theta) == mean
    assert theta[4] == 1.5  # the head is averaged as ever: (3 · 1 + 1 · 3) / 4


def test_the_exact_mean_of_the_products_is_cut_to_the_rank_and_its_loss_is_told() -> None:
    theta, metrics = aggregated("ExactLoRA", [3, 1])  # the products' mean is diag(1.5, 0.5)
    assert product(theta) == [[1.5, 0], [0, 0]]
    assert theta[4] == 1.5  # the head: (3 · 1 + 1 · 3) / 4
    assert metrics["lora_residual"] == pytest.approx(0.5 / np.sqrt(1.5**2 + 0.5**2))
    assert metrics["loss"] == 1.0


def test_what_fits_the_rank_is_exact_and_a_keeps_the_length_it_had() -> None:
    strategy = ExactLoRA()
    strategy.prepare(RunConfig(), LAYOUT)
    same_a = [[3, 4, 1, 0, 0], [3, 4, 0, 3, 0]]
    arrays, metrics = strategy.aggregate_train(1, replies_of(same_a, [1, 1]))
    assert arrays is not None
    assert metrics is not None
    theta = arrays[THETA].numpy()
    assert product(theta) == [[1.5, 2], [4.5, 6]]  # (0.5, 1.5)ᵀ (3, 4)
    assert metrics["lora_residual"] == pytest.approx(0, abs=1e-7)
    assert np.linalg.norm(theta[:2]) == pytest.approx(5)


def test_factors_of_rank_two_keep_the_two_largest_of_three_directions() -> None:
    down, up, lost, norm = factored(np.diag([2.0, 1.0, 5.0]), np.eye(2, 3))
    np.testing.assert_allclose(up @ down, np.diag([2.0, 0, 5.0]), atol=1e-12)
    assert (lost, norm) == (pytest.approx(1.0), pytest.approx(np.sqrt(30)))
    np.testing.assert_allclose(down @ down.T, np.eye(2), atol=1e-12)  # as long as the rows of eye(2, 3)
    assert down[0].tolist() == [0, 0, 1], "the strongest first: it is the one that a device of rank 1 trains"


def test_nothing_to_factor_leaves_rows_that_can_still_be_trained() -> None:
    down, up, lost, norm = factored(np.zeros((2, 3)), np.full((1, 3), 2.0))
    assert (lost, norm, up.tolist()) == (0, 0, [[0], [0]])
    assert np.linalg.norm(down) == pytest.approx(np.sqrt(12))


# ---- what is frozen --------------------------------------------------------------------------------------------------


def test_a_frozen_half_is_left_out_of_the_update_and_a_rank_is_rows_of_a_and_columns_of_b() -> None:
    layout = lay_out(
        [("q.lora_A", (2, 3)), ("q.lora_B", (2, 2)), ("classifier.weight", (2,)), ("classifier.bias", (1,))]
    )
    assert [p.name for pair in lora_pairs(layout) for p in pair] == ["q.lora_A", "q.lora_B"]
    theta = np.arange(13, dtype=np.float32)
    assert split_withheld(layout, [], ["lora_A"]).shared(theta).tolist() == [6, 7, 8, 9, 10, 11, 12]
    assert split_withheld(layout, ["classifier"], ["lora_A"]).shared(theta).tolist() == [6, 7, 8, 9]
    ranked = split_withheld(layout, [], lora_rank=1)
    assert ranked.shared(theta).tolist() == [0, 1, 2, 6, 8, 10, 11, 12]
    assert ranked.spread(ranked.shared(theta)).tolist() == [0, 1, 2, 0, 0, 0, 6, 0, 8, 0, 10, 11, 12]
    assert split_withheld(layout, [], lora_rank=2).shared_size == 13
    assert frozen_mask(layout, ["q"]).sum() == 10  # a name's first part will do, too


@pytest.mark.parametrize(
    ("private", "frozen", "rank", "says"),
    [
        ((), ("lora_C",), 0, "no parameter of the trainable set has 'lora_C' in its name"),
        ((), ("lora",), 0, "'lora' in its name"),  # a whole part
        ((), ("query", "classifier"), 0, "all parameters are frozen"),
        (("classifier",), ("query",), 0, "nothing is left to be sent"),
    ],
)
def test_freezing_nothing_or_everything_is_refused(
    private: tuple[str, ...], frozen: tuple[str, ...], rank: int, says: str
) -> None:
    with pytest.raises(ParametersError, match=says):
        split_withheld(LAYOUT, private, frozen, rank)


def test_a_rank_without_lora_is_refused() -> None:
    with pytest.raises(ParametersError, match="lora_rank is 4, but the trainable set has no LoRA"):
        frozen_mask(lay_out([("classifier.bias", (3,))]), [], 4)


def test_a_private_head_goes_with_exact_lora() -> None:
    make_ours("ExactLoRA", {}).prepare(RunConfig(update=ConfigForm(private=("classifier",))), LAYOUT)


def asked_of(name: str, rounds: int, **options: Any) -> list[list[dict[str, Any]]]:
    """The configs of the messages to phone-1, phone-2 and pi, in these rounds."""
    strategy = make_ours(name, options)
    strategy.prepare(RunConfig(), lay_out([("q.lora_A", (4, 2)), ("q.lora_B", (2, 4))]))

    class Three(InProcessGrid):
        def __init__(self) -> None:
            self.devices = {1: "phone-1", 2: "phone-2", 3: "pi"}
            self.cohort = Cohort(1, 1, self.devices)

    arrays = ArrayRecord()
    arrays[THETA] = DeltaArray(np.zeros(16, np.float32), Delta(np.zeros(16, np.float32), 16))
    return [
        [
            dict(m.content["config"])
            for m in strategy.configure_train(number, arrays, ConfigRecord({"update.frozen": ["classifier"]}), Three())
        ]
        for number in range(1, rounds + 1)
    ]


def test_ffa_freezes_a_and_rolora_one_of_the_two_in_turn_beside_what_the_run_freezes() -> None:
    assert [[c["update.frozen"] for c in r] for r in asked_of("FFALoRA", 2)] == [[["classifier", "lora_A"]] * 3] * 2
    in_turn = [[c["update.frozen"][-1] for c in r] for r in asked_of("RoLoRA", 3)]
    assert in_turn == [["lora_A"] * 3, ["lora_B"] * 3, ["lora_A"] * 3]


def test_a_device_trains_the_rank_of_the_longest_pattern_that_its_name_fits() -> None:
    (configs,) = asked_of("ExactLoRA", 1, ranks={"*": 4, "phone-*": 2, "phone-2": 1})
    assert [c["update.lora_rank"] for c in configs] == [2, 1, 4]
    (plain,) = asked_of("ExactLoRA", 1)
    assert "update.lora_rank" not in plain[0]


@pytest.mark.parametrize(
    ("name", "options", "run", "says"),
    [
        ("FFALoRA", {}, {"layout": ()}, "FFALoRA needs a trainable set with LoRA, e.g. lora:8"),
        ("RoLoRA", {}, {"mode": "fedbuff"}, "RoLoRA with mode 'fedbuff' would mix updates"),
        ("ExactLoRA", {}, {"mode": "fedbuff"}, "ExactLoRA with mode 'fedbuff' would mix updates"),
        (
            "ExactLoRA",
            {},
            {"update": ConfigForm("int8")},
            "nothing of A and B can stay on a device: not update.codec int8",
        ),
        ("ExactLoRA", {}, {"update": ConfigForm(private=("query.lora_B",))}, r"with private \['query.lora_B'\]"),
        ("ExactLoRA", {"ranks": {"a": 2}}, {}, "ranks has 2 for 'a'; the trainable set has rank 1"),
        ("ExactLoRA", {"ranks": {"a": 0}}, {}, "ranks is {'a': 0}, not a table of whole numbers from 1"),
        ("ExactLoRA", {"ranks": 4}, {}, "ranks is 4, not a table"),
    ],
)
def test_a_run_that_a_strategy_cannot_drive_is_refused_in_a_sentence(
    name: str, options: dict[str, Any], run: dict[str, Any], says: str
) -> None:
    layout = run.pop("layout", LAYOUT)
    config = RunConfig(**run, min_devices=10) if run else RunConfig()
    with pytest.raises(StrategyError, match=says) as caught:
        make_ours(name, options).prepare(config, layout)
    assert "\n" not in str(caught.value)


# ---- on a device -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainer(nano_artifact: Artifact) -> PlanTrainer:
    return PlanTrainer(nano_artifact, "lora:4")


@pytest.fixture(scope="module")
def examples(trainer: PlanTrainer, tiny_dataset: Dataset) -> Examples:
    return encode_examples(trainer, tiny_dataset.train[:12], 32)


def performed(
    trainer: PlanTrainer, examples: Examples, form: UpdateForm, kept: Kept | None = None, **settings: Any
) -> Reply:
    rng = np.random.default_rng(0)  # B is not 0, so that A has a gradient
    theta = trainer.initial_theta() + (0.1 * rng.standard_normal(trainer.size)).astype(np.float32)
    config = TrainConfig(**{"batch_size": 4, "learning_rate": 0.01, "max_length": 32} | settings)
    return perform(trainer, Task("train", theta, config, 1, "ada", form), examples, kept=kept)


def test_what_is_frozen_neither_moves_by_weight_decay_nor_counts_in_the_clipped_norm(
    trainer: PlanTrainer, examples: Examples
) -> None:
    mask = frozen_mask(trainer.layout, ["lora_A"])
    settings: dict[str, Any] = {"learning_rate": 10.0, "max_grad_norm": 0.01, "max_steps": 1}
    whole = performed(trainer, examples, UpdateForm(), optimizer="sgd", **settings).delta
    half = performed(trainer, examples, UpdateForm(frozen=("lora_A",)), optimizer="sgd", **settings).delta
    assert whole[mask].any()
    assert not half[mask].any()
    assert np.linalg.norm(whole) == pytest.approx(10 * 0.01, rel=1e-3)  # rate times the clipped gradient
    assert np.linalg.norm(half) == pytest.approx(10 * 0.01, rel=1e-3), "the gradient of B alone fills the bound"
    decayed = performed(trainer, examples, UpdateForm(frozen=("lora_A",)), weight_decay=10.0).delta
    assert not decayed[mask].any()
    assert (decayed[~mask] != 0).all()


def test_the_bytes_are_those_of_what_is_trained(trainer: PlanTrainer, examples: Examples) -> None:
    whole = performed(trainer, examples, UpdateForm())
    for form in (UpdateForm(frozen=("lora_A",)), UpdateForm(lora_rank=2), UpdateForm("int8", lora_rank=1)):
        reply, split = performed(trainer, examples, form), sent_of(trainer, form)
        values = split.shared_size
        assert values < trainer.size
        coded = values + 4 * -(-values // 256) if form.codec == "int8" else 4 * values
        assert 0 < len(reply.data) - coded < 250
        assert len(reply.data) < len(whole.data)
        assert not split.private(reply.delta).any()


def test_what_one_rounds_codec_leaves_out_of_a_half_waits_while_the_other_half_is_trained(
    trainer: PlanTrainer, examples: Examples
) -> None:
    sent_a, sent_b = (UpdateForm("topk:0.1", frozen=(name,)) for name in ("lora_B", "lora_A"))
    first = performed(trainer, examples, sent_b).kept
    assert first.residual.size == trainer.size
    second = performed(trainer, examples, sent_a, first).kept
    a, b = (frozen_mask(trainer.layout, [name]) for name in ("lora_A", "lora_B"))
    assert not first.residual[a].any()
    assert second.residual[a].any()
    np.testing.assert_array_equal(second.residual[b], first.residual[b])


def test_a_device_refuses_to_freeze_what_it_does_not_have(trainer: PlanTrainer, examples: Examples) -> None:
    with pytest.raises(ConfigurationError, match="no parameter of the trainable set has 'lora_C'"):
        performed(trainer, examples, UpdateForm(frozen=("lora_C",)))
