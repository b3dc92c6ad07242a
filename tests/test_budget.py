"""A limit on memory: batches are cut, the numbers stay, and where nothing would fit the least that would is named."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest

from pocketfed.client_sdk import budget
from pocketfed.client_sdk.activations import MemoryCache
from pocketfed.client_sdk.artifacts import Artifact, Needs, TrainableSet
from pocketfed.client_sdk.budget import OVERHEAD_BYTES, SLACK, Budget, resident_bytes
from pocketfed.client_sdk.errors import ArtifactError, ConfigurationError
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Batch, Examples, TrainConfig, make_batch, train
from pocketfed.model.tasks import Dataset

HELD = 100e6  # what the process is said to hold: the rest is arithmetic


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "resident_bytes", lambda: int(HELD))


@pytest.fixture
def by_hand(held: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Round figures in place of the measured ones."""
    for name, value in (("COPIES_OF_WEIGHTS", 2.0), ("SLACK", 1.5), ("OVERHEAD_BYTES", 50e6)):
        monkeypatch.setattr(budget, name, value)


def of(activations: tuple[int, int, int, int], weights: int = 0) -> TrainableSet:
    needs = {"train": Needs(weights, activations), "predict": Needs(weights, activations)}
    return TrainableSet("t.onnx", "e.onnx", "p.onnx", "i.safetensors", 1, needs=needs)


@pytest.mark.parametrize(("count", "parts_of"), [(1, 1), (10, 10), (11, 6), (16, 8), (33, 9), (64, 10)])
def test_parts_of_a_batch_are_as_large_as_fit_and_about_equal(by_hand: None, count: int, parts_of: int) -> None:
    """10 MB an example, 1.5 times: of the 300 - 100 - 50 = 150 MB that are left, ten examples take all."""
    given = Budget(of((0, 10_000_000, 0, 0)), "head", 300)
    given.opened("train")
    assert given.micro_batch("train", count, tokens=7) == parts_of


def test_longer_texts_go_in_smaller_parts(by_hand: None) -> None:
    """10 kB a token and 1 kB a pair of tokens: (10 T + T^2) kB an example, of 150 / 1.5 = 100 MB: 500, 9 and 1 fit."""
    given = Budget(of((0, 0, 10_000, 1_000)), "norms", 300)
    given.opened("train")
    assert {tokens: given.micro_batch("train", 1000, tokens) for tokens in (10, 100, 300)} == {10: 500, 100: 9, 300: 1}


def test_without_a_limit_a_batch_stays_whole() -> None:
    assert Budget(of((10**15, 10**15, 0, 0)), "full").micro_batch("train", 4096, 512) == 4096


def test_the_refusal_names_the_least_that_would_do_and_with_exactly_that_it_works(by_hand: None) -> None:
    """100 + 50 + 1.5 * 10 = 165 MB for one example."""
    with pytest.raises(
        ConfigurationError,
        match=r"max_memory_mb is 164; head on texts of 7 tokens needs 165: allow that, shorten the texts or choose",
    ):
        Budget(of((0, 10_000_000, 0, 0)), "head", 164).before_opening("train", 7)
    enough = Budget(of((0, 10_000_000, 0, 0)), "head", 165)
    enough.before_opening("train", 7)
    enough.opened("train")
    assert enough.micro_batch("train", 64, 7) == 1
    less = Budget(of((0, 10_000_000, 0, 0)), "head", 164)
    less.opened("train")
    with pytest.raises(ConfigurationError, match="needs 165"):
        less.micro_batch("train", 64, 7)


def test_before_a_plan_is_opened_its_weights_are_counted_as_often_as_they_are_held(by_hand: None) -> None:
    """50 MB of weights, twice: 100 + 100 + 50."""
    Budget(of((0, 0, 0, 0), 50_000_000), "x", 250).before_opening("train", 7)
    with pytest.raises(ConfigurationError, match="needs 250"):
        Budget(of((0, 0, 0, 0), 50_000_000), "x", 249).before_opening("train", 7)


def test_the_cache_gets_a_fifth_of_a_limit_and_all_it_wants_without_one() -> None:
    assert Budget(of((0, 0, 0, 0)), "x", 100).cache_bytes(256e6) == 20_000_000
    assert Budget(of((0, 0, 0, 0)), "x", 100).cache_bytes(5e6) == 5_000_000
    assert Budget(of((0, 0, 0, 0)), "x").cache_bytes(256e6) == 256_000_000


@pytest.mark.parametrize("limit", [-1.0, math.nan, math.inf])
def test_a_limit_that_is_no_amount_is_refused(limit: float) -> None:
    with pytest.raises(ConfigurationError, match="give a positive number, or 0 for no limit"):
        Budget(of((0, 0, 0, 0)), "x", limit)


def test_what_this_process_holds_grows_with_what_it_touches() -> None:
    before = resident_bytes()
    block = np.ones(8_000_000)  # 64 MB, written to
    assert resident_bytes() - before > 50e6
    assert block.any()


# ---- with a real artifact's plans ------------------------------------------------------------------------------------


def encoded(trainer: PlanTrainer, dataset: Dataset, count: int = 24) -> Examples:
    chosen = dataset.train[:count]
    labels = trainer.artifact.manifest.labels
    return Examples(trainer.encode([e.text for e in chosen]), np.array([labels.index(e.label or "") for e in chosen]))


def limited(artifact: Artifact, name: str, parts_of: int, tokens: int, **more: Any) -> PlanTrainer:
    """With a limit under which so many examples of that length fit into one step, by the manifest's own figures."""
    plans = artifact.manifest.set_named(name)
    needs = plans.needs["train_suffix" if plans.prefix else "train"]
    return PlanTrainer(
        artifact, name, max_memory_mb=(HELD + OVERHEAD_BYTES + SLACK * needs.bytes(parts_of, tokens) + 1) / 1e6, **more
    )


def opened_first(trainer: PlanTrainer) -> PlanTrainer:
    """Without asking whether the weights fit: here only the batch is to be cut."""
    trainer.budget.before_opening = lambda plan, tokens: None  # type: ignore[method-assign]
    return trainer


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["norms", "full", "lora:4"])
def test_the_gradient_of_a_batch_cut_into_parts_is_the_whole_ones(
    name: str, weighted: bool, held: None, nano_artifact: Artifact, tiny_dataset: Dataset
) -> None:
    whole = PlanTrainer(nano_artifact, name)
    examples = encoded(whole, tiny_dataset)
    if weighted:
        weights = np.linspace(0, 2, len(examples), dtype=np.float32)
        weights[8:16] = 0  # a whole part counts for nothing
        examples = dataclasses.replace(examples, weights=weights)
    batch = make_batch(examples, range(24), label_smoothing=0.1 if weighted else 0.0)
    cut = opened_first(limited(nano_artifact, name, 8, batch.ids.shape[1]))
    assert [len(part.ids) for part in cut._parts("train", batch)] == [8, 8, 8]
    theta = whole.initial_theta()
    loss, right, gradient = whole.gradient(theta, batch)
    got_loss, got_right, got = cut.gradient(theta, batch)
    assert np.abs(got - gradient).max() <= 1e-6 * max(1.0, np.abs(gradient).max())
    assert got_loss == pytest.approx(loss, abs=1e-6)
    assert got_right == right
    assert cut.evaluate(theta, batch) == pytest.approx(whole.evaluate(theta, batch), abs=1e-6)


def test_what_the_prefix_gives_is_the_same_bits_however_its_batch_is_cut(held: None, nano_artifact: Artifact) -> None:
    whole = PlanTrainer(nano_artifact, "head")
    needs = nano_artifact.manifest.set_named("head").needs["prefix"]
    ids = np.random.default_rng(0).integers(5, 100, (7, 11))
    wanted = whole.run_prefix(ids).tobytes()
    for at_once in (1, 2, 3):
        limit = (HELD + OVERHEAD_BYTES + SLACK * needs.bytes(at_once, 11) + 1) / 1e6
        cut = opened_first(PlanTrainer(nano_artifact, "head", max_memory_mb=limit, cache=MemoryCache(0, 1, False)))
        cut._open("prefix", 11)
        assert cut.budget.micro_batch("prefix", 7, 11) <= at_once
        assert cut.run_prefix(ids).tobytes() == wanted


@pytest.mark.parametrize("name", ["head", "norms"])
def test_a_trainer_with_too_little_says_what_it_needs_stays_usable_and_trains_with_exactly_that(
    name: str, held: None, nano_artifact: Artifact, tiny_dataset: Dataset
) -> None:
    examples = encoded(PlanTrainer(nano_artifact, name), tiny_dataset)
    config = TrainConfig(batch_size=8)
    limit, asked = 101.0, []
    while True:
        trainer = PlanTrainer(nano_artifact, name, max_memory_mb=limit)
        theta = trainer.initial_theta()
        before = theta.tobytes()
        try:
            got = train(trainer, theta, examples, config)
            break
        except ConfigurationError as error:
            sentence = str(error)
            assert theta.tobytes() == before
            needed = re.search(rf"max_memory_mb is {limit:g}; {name} on texts of \d+ tokens needs (\d+):", sentence)
            assert needed, sentence
            assert float(needed[1]) > limit
            asked.append(limit := float(needed[1]))
            assert len(asked) <= 6, "a plan, or a longer text, may ask for more, but not for ever"
    wanted = train(PlanTrainer(nano_artifact, name), theta, examples, config)
    np.testing.assert_allclose(got.delta, wanted.delta, rtol=0, atol=1e-3)
    assert asked


# ---- plans that are not what the manifest says -------------------------------------------------------------------------


def test_a_plan_whose_parameters_are_not_those_of_the_manifest_is_refused(
    nano_artifact: Artifact, tiny_dataset: Dataset
) -> None:
    stated = nano_artifact.manifest.sets["norms"]
    sets = {**nano_artifact.manifest.sets, "norms": dataclasses.replace(stated, size=stated.size + 1)}
    wrong = dataclasses.replace(nano_artifact, manifest=dataclasses.replace(nano_artifact.manifest, sets=sets))
    trainer = PlanTrainer(wrong, "norms")
    examples = encoded(trainer, tiny_dataset, 4)
    message = rf"takes theta of shape \[\[{stated.size}\]\], the manifest says {stated.size + 1} values; publish again"
    with pytest.raises(ArtifactError, match=message):
        train(trainer, np.zeros(stated.size + 1, np.float32), examples, TrainConfig())
    with pytest.raises(ArtifactError, match="theta"):
        trainer.initial_theta()


def test_a_set_that_the_manifest_does_not_carry_is_refused_with_those_it_does(nano_artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match=r"has no trainable set 'bias', only .*head"):
        PlanTrainer(nano_artifact, "bias")


def test_a_part_of_a_batch_has_no_padding_that_only_the_others_needed() -> None:
    examples = Examples(
        (np.array([1, 2, 3, 4]), np.array([5]), np.array([6, 7])), (np.arange(4), *map(np.arange, (1, 2)))
    )
    batch = make_batch(examples, [0, 1, 2])
    part: Batch = batch.part(1, 3)
    assert part.ids.tolist() == [[5, 0], [6, 7]]
    assert part.mask.tolist() == [[1, 0], [1, 1]]
    assert part.labels.tolist() == [[0, -1], [0, 1]]
    assert (part.weight, part.answers) == (3.0, 3)
