"""What leaves a device: cut, clipped, noised, fed back and coded in that order, and nothing that was not declared."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.errors import ConfigurationError
from pocketfed.client_sdk.outgoing import METRICS, NOTHING, Kept, UpdateForm, clip, make_outgoing, norm
from pocketfed.client_sdk.perform import Reply, Task, perform, split_of
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples, TrainConfig, count, evaluate, train
from pocketfed.model.codecs import decode, parse_codec
from pocketfed.model.parameters import Vector
from pocketfed.model.tasks import Dataset

CONFIG = TrainConfig(epochs=2, batch_size=8, learning_rate=5e-3, seed=11, max_length=32)
LOSSY = ("int8", "topk:0.1", "topk:0.01", "ternary:0.1")


def drawn(seed: int, size: int = 2000) -> Vector:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---- clipping and noise -------------------------------------------------------------------------------------------------


def test_clipping_keeps_the_direction_and_leaves_short_updates_alone() -> None:
    three_four = np.array([3.0, 4.0], np.float32)
    np.testing.assert_allclose(clip(three_four, 1.0), [0.6, 0.8], rtol=1e-6)
    assert clip(three_four, 5.0) is three_four
    assert clip(three_four, 0.0) is three_four


@pytest.mark.parametrize("codec", ["float32", "float16", *LOSSY])
def test_what_is_said_is_never_longer_than_the_bound_whatever_rounding_does(codec: str) -> None:
    form = UpdateForm(codec, clip_norm=0.7)
    for seed in range(30):
        vector = drawn(seed, 1 + 97 * seed) ** 3 * 10
        out = make_outgoing(form, vector, NOTHING, generator())
        assert norm(out.said) <= 0.7
        assert norm(decode(parse_codec(codec), out.data, vector.size)) <= 0.7


def test_noise_has_the_size_declared_and_comes_after_clipping() -> None:
    still = np.zeros(200_000, np.float32)
    out = make_outgoing(UpdateForm(clip_norm=2.0, noise=0.25), still, NOTHING, generator())
    assert abs(float(out.said.std()) / 0.5 - 1) < 0.01
    assert abs(float(out.said.mean())) < 0.01
    moved = make_outgoing(UpdateForm(clip_norm=2.0, noise=0.25), still + 100, NOTHING, generator())
    assert abs(norm(moved.said - out.said) - 2.0) < 1e-4, "of the update itself only the bound is left"


def test_forms_that_cannot_be_are_refused() -> None:
    for values, says in (
        ({"codec": "int8", "clip_norm": 1.0, "noise": 0.1}, "a codec without error feedback"),
        ({"noise": 0.1}, "it needs a clip_norm"),
        ({"clip_norm": float("nan")}, "clip_norm is nan"),
        ({"noise": float("inf"), "clip_norm": 1.0}, "noise is inf"),
        ({"codec": "gzip"}, "there is no codec 'gzip'.*or update the app"),
        ({"colour": "red"}, "a form with 'colour'; update the app"),
    ):
        with pytest.raises(ConfigurationError, match=says):
            UpdateForm.from_mapping(values)
    assert UpdateForm.from_mapping({"codec": "", "metrics": ["loss"]}) == UpdateForm(metrics=("loss",))


# ---- error feedback -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", LOSSY)
def test_what_was_said_and_what_is_left_to_say_add_up_to_what_was_trained(codec: str) -> None:
    form, residual = UpdateForm(codec), NOTHING
    trained, said = np.zeros(2000), np.zeros(2000)
    for seed in range(12):
        out = make_outgoing(form, drawn(seed), residual, generator())
        residual, trained, said = out.residual, trained + drawn(seed), said + out.said
    np.testing.assert_allclose(said + residual, trained, atol=1e-4)
    assert norm(residual) > 0


@pytest.mark.parametrize("codec", ["float32", "float16"])
def test_codecs_without_feedback_leave_nothing_behind(codec: str) -> None:
    assert make_outgoing(UpdateForm(codec), drawn(0), NOTHING, generator()).residual.size == 0


def test_what_clipping_cuts_off_is_gone_and_the_residual_stays_bounded() -> None:
    form, residual = UpdateForm("topk:0.01", clip_norm=1.0), NOTHING
    for seed in range(40):
        residual = make_outgoing(form, 1000 * drawn(seed), residual, generator()).residual
        assert norm(residual) <= 1.0


def test_with_feedback_one_value_in_a_hundred_is_enough_to_arrive() -> None:
    """Steps of a fiftieth of the way to a target: what is sent of each is the rest of the way to its largest values."""
    target = drawn(1, 200)
    arrived, forgetful = np.zeros_like(target), np.zeros_like(target)
    form, residual = UpdateForm("topk:0.01"), NOTHING
    for _ in range(1500):
        out = make_outgoing(form, np.float32(0.02) * (target - arrived), residual, generator())
        residual, arrived = out.residual, arrived + out.said
        forgetful = forgetful + make_outgoing(form, np.float32(0.02) * (target - forgetful), NOTHING, generator()).said
    assert norm(target - arrived) < 0.02 * norm(target)
    assert norm(target - forgetful) > 10 * norm(target - arrived)


# ---- one assignment -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainer(nano_artifact: Artifact) -> PlanTrainer:
    return PlanTrainer(nano_artifact, "head")


@pytest.fixture(scope="module")
def examples(trainer: PlanTrainer, tiny_dataset: Dataset) -> Examples:
    mine = [e for e in tiny_dataset.train if e.user == "user-1"]
    labels = trainer.artifact.manifest.labels
    return Examples(trainer.encode([e.text for e in mine]), np.array([labels.index(e.label or "") for e in mine]))


def task(trainer: PlanTrainer, form: UpdateForm, **changes: Any) -> Task:
    asked = Task("train", trainer.initial_theta(), CONFIG, round=3, device="ada", form=form, seeded_noise=True)
    return dataclasses.replace(asked, **changes)


def test_the_manifest_says_what_theta_holds(trainer: PlanTrainer) -> None:
    assert [p.name for p in trainer.layout] == ["classifier.weight", "classifier.bias"]
    assert sum(p.size for p in trainer.layout) == trainer.size


def test_a_reply_says_what_its_bytes_say(trainer: PlanTrainer, examples: Examples) -> None:
    for codec in ("float32", "float16", *LOSSY):
        reply = perform(trainer, task(trainer, UpdateForm(codec)), examples)
        assert decode(parse_codec(codec), reply.data, trainer.size).tobytes() == reply.delta.tobytes()


def test_a_residual_goes_out_with_the_next_update(trainer: PlanTrainer, examples: Examples) -> None:
    asked = task(trainer, UpdateForm("topk:0.1"))
    first = perform(trainer, asked, examples)
    second = perform(trainer, asked, examples, kept=first.kept)
    assert second.data != first.data
    both = 2 * perform(trainer, task(trainer, UpdateForm()), examples).delta
    np.testing.assert_allclose(first.delta + second.delta + second.kept.residual, both, atol=1e-5)
    again = perform(trainer, asked, examples, kept=first.kept)
    assert again.data == second.data, "made again it is the same, not the residual twice"


def test_local_noise_is_not_from_the_runs_seed(trainer: PlanTrainer, examples: Examples) -> None:
    form = UpdateForm(clip_norm=0.1, noise=1.0)
    sent = {perform(trainer, task(trainer, form, seeded_noise=False), examples).data for _ in range(3)}
    assert len(sent) == 3
    simulated = {perform(trainer, task(trainer, form), examples).data for _ in range(3)}
    assert len(simulated) == 1
    assert len({perform(trainer, task(trainer, form, device=d), examples).data for d in ("ada", "bob")}) == 2


def test_only_declared_metrics_are_told(trainer: PlanTrainer, examples: Examples) -> None:
    for declared in ((), ("loss",), ("steps", "colour")):
        reply = perform(trainer, task(trainer, UpdateForm(metrics=declared)), examples)
        assert set(reply.metrics) == set(declared) - {"colour"}
    measured = perform(trainer, task(trainer, UpdateForm(metrics=("loss",)), kind="evaluate"), examples)
    assert set(measured.metrics) == {"loss"}
    assert set(perform(trainer, task(trainer, UpdateForm()), examples).metrics) <= set(METRICS)


# ---- personal -----------------------------------------------------------------------------------------------------------

BIAS = UpdateForm(private=("classifier.bias",))


def test_private_parameters_are_trained_and_not_sent(trainer: PlanTrainer, examples: Examples) -> None:
    asked = task(trainer, BIAS)
    reply = perform(trainer, asked, examples)
    split = split_of(trainer, BIAS)
    everything = train(
        trainer, asked.theta, examples, dataclasses.replace(CONFIG, seed=_own_seed(trainer, asked, examples))
    ).delta
    sent = decode(parse_codec("float32"), reply.data, trainer.size - 4)
    assert sent.tobytes() == split.shared(everything).tobytes()
    assert not split.private(reply.delta).any()
    np.testing.assert_array_equal(reply.kept.private, split.private(asked.theta + everything))
    assert np.abs(split.private(everything)).min() > 0


def _own_seed(trainer: PlanTrainer, asked: Task, examples: Examples) -> int:
    from pocketfed.client_sdk.order import derive_seed

    return derive_seed(CONFIG.seed, asked.round, asked.device)


def test_the_next_round_starts_from_the_devices_own_values(trainer: PlanTrainer, examples: Examples) -> None:
    own = np.array([9.0, -9.0, 0.0, 1.0], np.float32)
    asked = task(trainer, BIAS, config=dataclasses.replace(CONFIG, learning_rate=1e-9))
    reply = perform(trainer, asked, examples, kept=Kept(private=own))
    np.testing.assert_allclose(reply.kept.private, own, atol=1e-6)


def test_an_evaluation_with_private_parameters_tells_counts_and_sums_only(
    trainer: PlanTrainer, examples: Examples
) -> None:
    own = np.array([50.0, 0.0, 0.0, 0.0], np.float32)
    reply: Reply = perform(trainer, task(trainer, BIAS, kind="evaluate"), examples, kept=Kept(private=own))
    theta = split_of(trainer, BIAS).overlay(trainer.initial_theta(), own)
    counted = count(trainer, theta, examples)
    assert dict(reply.metrics) == {
        "examples": len(examples),
        "correct": counted.right,
        "loss_sum": counted.loss_sum,
    }
    assert counted.right == int((np.asarray(examples.labels) == 0).sum()), "such a bias always says the first label"
    assert evaluate(trainer, theta, examples)["accuracy"] == counted.accuracy
    assert reply.data == b""


def test_private_parameters_that_do_not_exist_end_the_assignment(trainer: PlanTrainer, examples: Examples) -> None:
    with pytest.raises(ConfigurationError, match="no parameter of the trainable set is named 'pooler'"):
        perform(trainer, task(trainer, UpdateForm(private=("pooler",))), examples)
    with pytest.raises(ConfigurationError, match="all parameters are private"):
        perform(trainer, task(trainer, UpdateForm(private=("classifier",))), examples)
